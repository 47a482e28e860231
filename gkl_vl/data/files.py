"""Reading images, files and tables: helpers that all data sources share."""

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gkl_vl.errors import UserError, first_line

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg", "bmp", "tif", "tiff", "ppm", "pgm", "gif")
"""File name endings of images, in lower case, for every source. If a sample has several images, the first listed ending
is read; the order of the first four is CLIP_benchmark's."""
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")


# ---- files -------------------------------------------------------------------------------------------------------


def is_local(url: str) -> bool:
    return "://" not in url and not url.startswith("pipe:")


def read_file(path: str, offset: int = 0, size: int = -1) -> bytes:
    """Reads `size` bytes of a file from `offset` on; -1 = up to the end.

    Raises: UserError for a file that cannot be read or is too short.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            body = file.read(size)
    except OSError as error:
        raise UserError(f"{path!r} cannot be read ({first_line(error)}): fetch it again") from error
    if len(body) < size:
        raise UserError(f"{path!r} ends before byte {offset + size}: fetch it again")
    return body


def read_json(path: Path, expected: type) -> Any:
    """Reads a JSON file whose content is of the type `expected`.

    Raises: UserError for a file that is missing, is not JSON, or has content of another type.
    """
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # from json, or for bytes that are not UTF-8
        raise UserError(f"{str(path)!r} is no JSON ({first_line(error)}): fetch it again") from error
    if not isinstance(content, expected):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__} where a {expected.__name__} is expected")
    return content


def require_images(source: str, folder: str, paths: Sequence[str]) -> None:
    """Raises: UserError if a file that `source` lists is not below `folder`."""
    missing = [path for path in paths if not os.path.isfile(os.path.join(folder, path))]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(paths)} images of {source!r} are not below {folder!r}, the first is "
            f"{missing[0]!r}: fetch them or name another root"
        )


def require_end(shard: str, offset: int) -> None:
    """Raises: tarfile.ReadError for a tar without an end-of-archive mark at `offset`, where its members end."""
    # tarfile accepts the end of the file, or garbage, as the end of the archive; the real mark is a block of zeros.
    with open(shard, "rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no end-of-archive mark at byte {offset}")


def stable_hash(text: str) -> int:
    """A 63-bit hash of the text, the same in every process and run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


# ---- tables ------------------------------------------------------------------------------------------------------


def hub_table(path: str, split: str, *, subject: str, hint: str) -> Any:
    """Loads a split of a dataset on the Hub, a `datasets.Dataset`.

    Args:
        subject: what could not be loaded; the error message starts with it.
        hint: what else the user can do; the error message ends with it.

    Raises: UserError if the split cannot be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(path, split=split)
    except Exception as error:  # the client's errors for offline, unknown, private: the remedy is the same
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{subject} is no file here and could not be had from the Hub ({reason}): check the name "
            f"and the connection; {hint}"
        ) from error


def undecoded(table: Any, image_column: str) -> Any:
    """The `datasets.Dataset` with images left encoded, for `encoded_image`."""
    import datasets

    if isinstance(table.features[image_column], datasets.Image):
        return table.cast_column(image_column, datasets.Image(decode=False))
    return table


def encoded_image(cell: Any) -> Any:
    """The encoded bytes or path in a table cell, for `decode`; cells of the Hub are {"bytes": ..., "path": ...}."""
    return (cell["bytes"] or cell["path"]) if isinstance(cell, dict) else cell


def usual_column(usual: Sequence[str], existing: Sequence[str]) -> str:
    """The first of the usual names that exists; if none does, the last of them, which `need_columns` then reports."""
    return next((name for name in usual if name in existing), usual[-1])


def need_columns(name: str, columns: list[str], image_column: str, other_column: str | None) -> None:
    """Raises: UserError if a required column of the table `name` is missing."""
    for column in (image_column, other_column):
        if column is not None and column not in columns:
            raise UserError(f"{name!r} has no column {column!r}, only {', '.join(columns)}: name them with --columns")
