"""Commit, command line and versions of a run, for its records."""

import importlib.metadata
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

_PACKAGES = ("torch", "open_clip_torch", "transformers", "gkl-vl")
_SECRETS = (
    (r"(?<=://)[^/@\s]+@", "***@"),  # user and password
    (r"(?i)([?&][^=&\s]*(?:sig|token|key|credential|secret|password)[^=&\s]*=)[^&\s'\"]+", r"\1***"),
    (r"(?i)\b(bearer\s+)[^\s'\"]+", r"\1***"),
    (r"\bhf_[A-Za-z0-9]{20,}", "hf_***"),
)


def git_commit() -> str | None:
    """Short commit hash of this project's checkout; None if it is installed without one."""
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return result.stdout.strip() or None


def command_line() -> str:
    """The shell command that repeats this process."""
    return shlex.join(["accelerate", "launch", *sys.argv])


def without_secrets(text: str) -> str:
    """`text` with *** in place of passwords and signatures in addresses, of bearer tokens and of the Hub's tokens."""
    for pattern, replacement in _SECRETS:
        text = re.sub(pattern, replacement, text)
    return text


def versions() -> dict[str, str]:
    """Package -> installed version, and that of Python; packages without metadata are left out."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # gkl_vl on the path, not installed
            continue
    return found
