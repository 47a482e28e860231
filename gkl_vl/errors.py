"""The error that a user can fix, and messages of one line."""

import os
import sys


class UserError(ValueError):
    """A mistake that the user can fix. The message is one line that names the value and the remedy."""


def notice(line: str) -> None:
    """Prints one line to stderr, on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {line}", file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    """First line of an error's message, at most 300 characters, to quote in a message of this package."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
