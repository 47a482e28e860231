"""Files at addresses that fsspec reads: https://, s3://, gs://, hf://, memory:// and others, and `pipe:` commands.

A scheme may need a package of its own, s3:// for example s3fs; fsspec's error names it.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from fsspec.core import url_to_fs
from webdataset.gopen import gopen

from gkl_vl.errors import UserError, first_line


def is_local(name: str) -> bool:
    """Whether a name is a path of this machine."""
    return "://" not in name and not name.startswith("pipe:")


@contextmanager
def opened(address: str) -> Iterator[Any]:
    """An open binary file, to be read from its start; the output of a `pipe:` command.

    Raises: UserError for an address that cannot be opened; OSError inside of the block for a lost connection.
    """
    try:
        if address.startswith("pipe:"):
            file: Any = gopen(address)
        else:
            system, path = url_to_fs(address)
            file = system.open(path, "rb")
    except Exception as error:  # each file system has its own kinds
        kind = type(error).__name__
        raise UserError(f"{address!r} cannot be read ({kind}: {first_line(error)}): check the address") from error
    with file:
        try:
            yield file
        except aiohttp.ClientError as error:
            raise OSError(f"{address!r}: {first_line(error)}") from error


@contextmanager
def fetched(address: str) -> Iterator[Path]:
    """A temporary copy of a file. Raises: UserError as `opened`."""
    with tempfile.TemporaryDirectory(prefix="gkl_vl-") as folder:
        path = Path(folder) / address.rpartition("/")[2]
        with opened(address) as file, open(path, "wb") as copy:
            shutil.copyfileobj(file, copy, 2**20)
        yield path


def names_in(address: str) -> set[str] | None:
    """Names of the files in the folder at an address; None where they cannot be listed, as on most web servers."""
    try:
        system, path = url_to_fs(address)
        return {entry["name"].rstrip("/").rpartition("/")[2] for entry in system.ls(path, detail=True)} or None
    except Exception:  # each file system has its own kinds
        return None


def exists(address: str) -> bool:
    """Whether a file can be read at an address; False where that cannot be found out, as without a network."""
    try:
        system, path = url_to_fs(address)
        return system.exists(path)
    except Exception:  # each file system has its own kinds
        return False
