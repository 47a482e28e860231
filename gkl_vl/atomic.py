"""Files and folders that are replaced whole or not at all, strict JSON, and folders that one process holds.

A process that is killed, or a disk that is full, leaves the previous content in place. What is written lies beside its
target under a name that ends in `.writing` until it is renamed.

JSON has no NaN and no infinity: all writers of this project go through `json_text`, which writes null for them.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from gkl_vl.errors import UserError

LOCK = ".lock"
_held: dict[Path, int] = {}
"""Folders that this process holds, and the descriptors of their lock files."""


# ---- replacing -----------------------------------------------------------------------------------------------------


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
    """Renames `scratch` to `folder`. An existing folder is moved away first, and back if the second rename fails.

    Of several writers at a time the last one wins.
    """
    while True:
        old = _beside(folder)
        try:
            folder.rename(old)
        except FileNotFoundError:
            pass
        try:
            scratch.rename(folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another writer's folder came in between
                shutil.rmtree(old, ignore_errors=True)
                continue
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return


def remove_folder(folder: Path) -> None:
    """Removes a folder. It is renamed first, so that a kill leaves it complete or under a name of `leftovers`."""
    doomed = _beside(folder)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def leftovers(folder: Path) -> list[Path]:
    """Files and folders in `folder` that a killed writer left there."""
    return [path for path in folder.glob(".*.writing") if re.fullmatch(r"\..+\.[0-9a-f]{8}\.writing", path.name)]


def write_text(path: Path, content: str) -> None:
    """Replaces a file by this text, in UTF-8."""
    with replacing(path) as scratch:
        scratch.write_text(content, encoding="utf-8")


def _beside(path: Path) -> Path:
    # Not the process id: processes on several machines may share the disk.
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.writing")


# ---- JSON ----------------------------------------------------------------------------------------------------------


def json_text(content: Any, *, indent: int | None = None) -> str:
    """Strict JSON and a line end. Numbers that are not finite become null; `nan_for_null` is the way back."""
    return json.dumps(_null_for_nan(content), indent=indent, allow_nan=False) + "\n"


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Replaces a file by `json_text`."""
    write_text(path, json_text(content, indent=indent))


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one line of JSON in one piece, also beside other writers. Makes the parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        cut = file.read(1) not in (b"", b"\n")  # a killed writer's last line must not swallow this one
        line = (b"\n" if cut else b"") + json_text(record).encode()
        if file.write(line) != len(line):
            os.truncate(path, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """The object in a JSON file of this project. Raises: UserError with `remedy` for a damaged one."""
    try:
        return _object(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged ({error}): {remedy}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file that `append_line` wrote. A last line that a kill cut short is left out.

    Raises: UserError for another line that is no object.
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            records += [_object(line.decode())] if line.strip() else []
        except ValueError as error:
            raise UserError(f"{str(path)!r} line {number} is damaged ({error}): remove that line") from None
    return records


def nan_for_null(content: Any) -> Any:
    """`content` with nan for each None, at any depth: metrics as they were before `json_text`."""
    if isinstance(content, dict):
        return {key: nan_for_null(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [nan_for_null(value) for value in content]
    return math.nan if content is None else content


def _null_for_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _null_for_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_null_for_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"a JSON {type(content).__name__} in place of an object")
    return content


# ---- folders that one process holds --------------------------------------------------------------------------------


def hold_folder(folder: Path) -> None:
    """Takes a folder for this process until `release_folder`, or until the process ends in whichever way. Makes it.

    The lock is a POSIX record lock on a file in the folder: the system releases it with the process, and unlike that of
    flock, forked workers do not inherit it. On a disk without locks, a line on stderr says that there is none.

    Raises: UserError that names the folder and the process that holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if _is_held(folder):
        return
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    if (holder := _lock(file)) is not None:
        os.close(file)
        raise UserError(in_use(folder, holder))
    if not _is_at(file, folder / LOCK):  # its last holder removed it after it was opened here
        os.close(file)
        return hold_folder(folder)
    os.ftruncate(file, 0)
    os.pwrite(file, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held[folder.resolve()] = file


def release_folder(folder: Path) -> None:
    """Ends `hold_folder` and removes the lock file; no-op for a folder that this process does not hold."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        if _is_at(file, folder / LOCK):
            (folder / LOCK).unlink()
        os.close(file)


def holder_of(folder: Path) -> str | None:
    """The other process that holds a folder, as "pid 7 on host"; None if there is none. Writes nothing."""
    if _is_held(folder) or not (folder / LOCK).is_file():
        return None
    file = os.open(folder / LOCK, os.O_RDWR)
    try:
        return _lock(file)
    finally:
        os.close(file)


def in_use(folder: Path, holder: str) -> str:
    """The message for a folder that another process holds."""
    return f"{str(folder)!r} is in use by {holder}: wait for its end or stop it, or name another folder"


def _is_held(folder: Path) -> bool:
    file = _held.get(folder.resolve())
    if file is None:
        return False
    if _is_at(file, folder / LOCK):
        return True
    release_folder(folder)  # the folder was removed, and perhaps made again
    return False


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one at this path."""
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())


def _written_holder(file: int) -> str:
    """What the holder of a lock wrote, for which it may need a moment after it has the lock."""
    for _ in range(20):
        if holder := os.pread(file, 1000, 0).decode(errors="replace").strip():
            return holder
        time.sleep(0.05)
    return "another process"


def _lock(file: int) -> str | None:
    """Locks an open file; returns the process that holds it where one does."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return _written_holder(file)
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        print("this disk has no locks: do not start a second run in the same folder", file=sys.stderr)
    return None
