"""Identity of images for the keys of stored results: what changes when an image changes.

For a file on disk that is its state (place, size, times of change), which costs no reading; for anything else, as a
cell of a table or pixels in memory, its content. `DECODE_RULES` is part of it: the same bytes may become other pixels.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from gkl_vl.data.files import read_file
from gkl_vl.data.images import DECODE_RULES


def images_identity(reads: Iterable[Callable[[], bytes]]) -> str:
    """A hash of the images that these functions read (`EncodedImage.read`), in their order."""
    digest = hashlib.sha256(f"rules {DECODE_RULES}".encode())
    for read in reads:
        add_image(digest, read)
    return digest.hexdigest()


def add_image(digest: Any, read: Callable[[], bytes]) -> None:
    """Hashes the identity of the image that `read` reads; `digest` is a hashlib object."""
    if isinstance(read, partial) and read.func is read_file:
        path, *extent = read.args
        digest.update(repr((file_state(path), extent, read.keywords)).encode())
    else:
        content = read()
        digest.update(len(content).to_bytes(8, "big") + content)


def file_state(path: str | os.PathLike[str]) -> tuple[str, int, int, int]:
    """Real path, size, and times of the last change of content and of inode, in nanoseconds.

    A tool that restores the first time (`touch`, `rsync`) changes the second. A missing file has size -1.
    """
    path = os.path.realpath(path)
    try:
        state = os.stat(path)
    except OSError:
        return path, -1, 0, 0
    return path, state.st_size, state.st_mtime_ns, state.st_ctime_ns
