"""Commit and command line of a run, for its records."""

import shlex
import subprocess
import sys
from pathlib import Path


def git_commit() -> str | None:
    """Short commit hash of this project's checkout; None if it is installed without one."""
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return result.stdout.strip() or None


def command_line() -> str:
    """The shell command that repeats this process."""
    return shlex.join(["accelerate", "launch", *sys.argv])
