"""What a user can cause, said in one line."""


class UserError(ValueError):
    """A mistake that the user can mend: the message is one line that names the value and the remedy."""


def first_line(error: Exception) -> str:
    """What another library's error says, short enough to stand in ours."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
