"""The error that a user can fix, and messages of one line."""

import errno
import os
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake that the user can fix. The message is one line that names the value and the remedy."""


class Stopped(Exception):
    """A run that was requested to stop has saved a checkpoint. Not an error; the message is one line."""


def notice(line: str) -> None:
    """Prints one line to stderr, on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {line}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """First line of an error's message, at most 300 characters, to quote in a message of this package."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and the chain of its causes and contexts."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def disk_is_full(error: BaseException) -> bool:
    """Recognises the errors of Python (errno), safetensors (message) and torch.save (an unexpected file position)."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    torch_save = isinstance(error, RuntimeError) and "inline_container.cc" in str(error)
    return "No space left on device" in str(error) or (torch_save and "unexpected pos" in str(error))


def refuse_full_disk(error: Exception) -> None:
    """Raises: UserError if a download failed for want of space, which other remedies would not mend."""
    full = next((cause for cause in causes(error) if disk_is_full(cause)), None)
    if full is not None:
        raise UserError(
            f"no space left on the disk of the download cache ({first_line(full)}): free some, or set HF_HOME to a "
            "folder on another disk"
        ) from error
