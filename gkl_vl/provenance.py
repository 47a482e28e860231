"""Where a number comes from."""

import shlex
import subprocess
import sys
from pathlib import Path


def git_commit() -> str | None:
    """Of this project's checkout; None where it is installed."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or None


def command_line() -> str:
    """What a user types to have it again."""
    return shlex.join(["accelerate", "launch", *sys.argv])
