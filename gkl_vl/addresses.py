"""Files at addresses that fsspec reads: https://, s3://, gs://, hf://, memory:// and others, and `pipe:` commands.

A scheme may need a package of its own, s3:// for example s3fs; fsspec's error names it.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from webdataset.gopen import gopen

from gkl_vl.errors import UserError, disk_is_full, first_line
from gkl_vl.reading import read_json

ATTEMPTS = 4
"""How often a file is fetched before a fault counts, with a pause of 1, 2, 4 seconds between."""
OWN_ERRORS = ("builtins", "gkl_vl", "tarfile", "gzip", "zlib", "lzma", "pyarrow")
"""Modules of the errors that readers of a file handle themselves; each file system has more for a lost connection."""


def is_local(name: str) -> bool:
    """Whether a name is a path of this machine."""
    return "://" not in name and not name.startswith("pipe:")


@contextmanager
def opened(address: str, *, stream: bool) -> Iterator[Any]:
    """An open binary file, or the output of a `pipe:` command.

    Args:
        stream: it is read once from its start: over http by curl, which retries and needs no ranges of the server.

    Raises: UserError for an address that cannot be opened; OSError inside of the block for a lost connection.
    """
    try:
        if stream and address.startswith(("pipe:", "http:", "https:")):
            file: Any = gopen(address)
        else:
            system, path = url_to_fs(address)
            file = system.open(path, "rb")
    except Exception as error:  # each file system has its own kinds
        raise _unreadable(address, error) from error
    with file:
        try:
            yield file
        except Exception as error:
            if type(error).__module__.partition(".")[0] in OWN_ERRORS:
                raise
            raise OSError(f"{address!r}: {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def fetched(address: str) -> Iterator[Path]:
    """A temporary copy of a file, in TMPDIR. Raises: UserError as `opened`."""
    with tempfile.TemporaryDirectory(prefix="gkl_vl-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / address.rpartition("/")[2]
        for attempt in range(ATTEMPTS):
            try:
                system, remote = url_to_fs(address)
                with open(path, "wb") as copy, system.open(remote, "rb", **_whole(address)) as file:
                    shutil.copyfileobj(file, copy, 2**20)
                break
            except Exception as error:  # each file system has its own kinds
                if disk_is_full(error):
                    raise
                if attempt + 1 == ATTEMPTS or isinstance(error, ImportError | ValueError) or _is_missing(error):
                    raise _unreadable(address, error) from error
                time.sleep(2**attempt)
        yield path


def _whole(address: str) -> dict[str, int]:
    """Options of a file that is read once from its start, for which a web server need not know ranges."""
    return {"block_size": 0} if address.startswith(("http:", "https:")) else {}


def json_at(name: str) -> Any:
    """The object in a JSON file, at a path or an address; None where there is no such file.

    Raises: UserError as `reading.read_json`, and for an address that cannot be read.
    """
    if is_local(name):
        return read_json(name) if Path(name).is_file() else None
    try:
        with fetched(name) as copy:
            try:
                return read_json(copy)
            except UserError as error:
                raise UserError(str(error).replace(str(copy), name)) from error
    except UserError as error:
        if error.__cause__ is not None and _is_missing(error.__cause__):
            return None
        raise


def names_in(address: str) -> set[str]:
    """Names of the files in the folder at an address; none where they cannot be listed, as on many web servers."""
    try:
        system, path = url_to_fs(address)
        return {entry["name"].rstrip("/").rpartition("/")[2] for entry in system.ls(path, detail=True)}
    except Exception:  # each file system has its own kinds
        return set()


def _is_missing(error: BaseException) -> bool:
    """Whether there is no such file; public buckets forbid (403) what they do not have."""
    return isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (403, 404, 410)


def _unreadable(address: str, error: Exception) -> UserError:
    remedy = "install it" if isinstance(error, ImportError) else "check the address"
    return UserError(f"{address!r} cannot be read ({type(error).__name__}: {first_line(error)}): {remedy}")
