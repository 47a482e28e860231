"""What a user can cause, said in one line."""


class UserError(ValueError):
    """A mistake that the user can mend: the message is one line that names the value and the remedy."""
