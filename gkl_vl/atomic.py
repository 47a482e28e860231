"""Files and folders that are replaced whole or not at all, and JSON lines that are appended.

A process that is killed, or a disk that is full, leaves the previous content in place. What is written lies beside its
target under a name that ends in `.writing` until it is renamed.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file to write, renamed to `path` when the block ends without an exception. Makes the parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _beside(path)
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new scratch folder to fill, which takes the place of `folder` when the block ends without an exception."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = _beside(folder)
    scratch.mkdir()
    try:
        yield scratch
        replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_folder(scratch: Path, folder: Path) -> None:
    """Renames `scratch` to `folder`. An existing folder is moved away first, and back if the second rename fails."""
    if not folder.exists():
        scratch.rename(folder)
        return
    old = _beside(folder)
    folder.rename(old)
    try:
        scratch.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, content: str) -> None:
    """Replaces a file by this text, in UTF-8."""
    with replacing(path) as scratch:
        scratch.write_text(content, encoding="utf-8")


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one line of JSON. Makes the parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _beside(path: Path) -> Path:
    # Not the process id: processes on several machines may share the disk.
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.writing")
