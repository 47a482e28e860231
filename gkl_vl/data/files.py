"""Reading images, files and tables: helpers that all data sources share."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gkl_vl.errors import UserError, first_line

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg", "bmp", "tif", "tiff", "ppm", "pgm", "gif")
"""File name endings of images, in lower case, for every source. If a sample has several images, the first listed ending
is read; the order of the first four is CLIP_benchmark's."""
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")


# ---- images ------------------------------------------------------------------------------------------------------


class BrokenSample(Exception):
    """An image that cannot be decoded, or a pair without a caption. Training skips and counts such samples."""


class BrokenImage(UserError):
    """An image that was read and cannot be decoded."""


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image that is not read yet; small, so that it can be sent to other processes."""

    where: str
    """File and position in it, for messages."""
    read: Callable[[], bytes]
    """Reads the encoded bytes, anew at each call. Raises: UserError for a file that cannot be read."""

    def decode(self) -> Image.Image:
        """Reads and decodes the image to RGB; of an animation, the first frame.

        Raises: BrokenImage; UserError for a file that cannot be read.
        """
        try:
            return decode(self.read())
        except BrokenSample as error:
            raise BrokenImage(
                f"{self.where} cannot be decoded ({first_line(error)}): fetch it again or remove it"
            ) from error


def decode(image: Any) -> Image.Image:
    """Decodes encoded bytes, a path or a PIL image to RGB; of an animation, the first frame.

    Raises: BrokenSample.
    """
    try:
        if image is None or image == b"":
            raise ValueError("no image")
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        # `with`, because PIL leaves the file open if the pixel data end early
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return opened.convert("RGB")
    except Exception as error:  # PIL raises nearly any exception type on broken files, all with the same meaning
        raise BrokenSample(f"image: {error}") from error


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
