"""Reading images, tables and shards: the rules that every data source shares."""

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
"""Endings of image files, in lower case, for every source. Of several in one sample the first listed is read; the order
of the first four is CLIP_benchmark's."""
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")


def hub_table(path: str, split: str, *, asked: str, hint: str) -> Any:
    """A split of a dataset on the Hub, a `datasets.Dataset`.

    Raises: UserError where it cannot be had, a line that `asked` begins and `hint` ends.
    """
    import datasets

    try:
        return datasets.load_dataset(path, split=split)
    except Exception as error:  # the client's errors for offline, unknown, private: the remedy is the same
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{asked} is no file here and could not be had from the Hub ({reason}): check the name "
            f"and the connection; {hint}"
        ) from error


def undecoded(table: Any, image_column: str) -> Any:
    """The `datasets.Dataset` whose images stay encoded until `encoded_image` and `decode` are asked."""
    import datasets

    if isinstance(table.features[image_column], datasets.Image):
        return table.cast_column(image_column, datasets.Image(decode=False))
    return table


def encoded_image(cell: Any) -> Any:
    """What `RawPair.image` takes, from a cell of a table: the Hub's images are {"bytes": ..., "path": ...}."""
    return (cell["bytes"] or cell["path"]) if isinstance(cell, dict) else cell


def usual_column(usual: Sequence[str], there: Sequence[str]) -> str:
    """The first of the usual names that is there; the last of them where none is, for `need_columns` to name."""
    return next((name for name in usual if name in there), usual[-1])


def need_columns(name: str, columns: list[str], image_column: str, other_column: str | None) -> None:
    for column in (image_column, other_column):
        if column is not None and column not in columns:
            raise UserError(f"{name!r} has no column {column!r}, only {', '.join(columns)}: name them with --columns")


def is_local(url: str) -> bool:
    return "://" not in url and not url.startswith("pipe:")


class BrokenSample(Exception):
    """An image that does not decode, or a pair without a caption. Training skips and counts such samples."""


def decode(image: Any) -> Image.Image:
    """Decodes encoded bytes, a path or a PIL image to RGB; of an animation, the first frame.

    Raises: BrokenSample.
    """
    try:
        if image is None or image == b"":
            raise ValueError("no image")
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        # with: PIL itself leaves the file of an image open whose pixels end early
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return opened.convert("RGB")
    except Exception as error:  # PIL raises nearly anything on broken files, and all of it means the same
        raise BrokenSample(f"image: {error}") from error


def stable_hash(text: str) -> int:
    """A number that stands for the text, the same in every process and run; 63 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class BrokenImage(UserError):
    """An image that was read and cannot be decoded."""


@dataclass(frozen=True)
class EncodedImage:
    """An image as it lies in its file, not read yet; small, so that it can go to other processes."""

    where: str
    """File and place in it, for messages."""
    read: Callable[[], bytes]
    """Reads it, anew at each call. Raises: UserError for a file that cannot be read."""

    def decode(self) -> Image.Image:
        """The image as RGB, the first frame of an animated one.

        Raises: BrokenImage; UserError for a file that cannot be read.
        """
        try:
            return decode(self.read())
        except BrokenSample as error:
            raise BrokenImage(
                f"{self.where} cannot be decoded ({first_line(error)}): fetch it again or take it out"
            ) from error


def read_file(path: str, offset: int = 0, size: int = -1) -> bytes:
    """A file's bytes from `offset` on, `size` of them or all. Raises: UserError for a file that has not as many."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            body = file.read(size)
    except OSError as error:
        raise UserError(f"{path!r} cannot be read ({first_line(error)}): fetch it again") from error
    if len(body) < size:
        raise UserError(f"{path!r} ends before byte {offset + size}: fetch it again")
    return body


def require_images(source: str, folder: str, paths: Sequence[str]) -> None:
    """Raises: UserError when a file that `source` names is not below `folder`."""
    missing = [path for path in paths if not os.path.isfile(os.path.join(folder, path))]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(paths)} images of {source!r} are not below {folder!r}, the first is "
            f"{missing[0]!r}: fetch them or name another root"
        )


def require_end(shard: str, offset: int) -> None:
    """Raises: tarfile.ReadError for a tar whose end is not marked where its members end."""
    # tarfile takes the end of the file, or garbage, for the end of the archive, which is a block of zeros.
    with open(shard, "rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no end-of-archive mark at byte {offset}")


def read_json(path: Path, expected: type) -> Any:
    """What a JSON file holds, an `expected`. Raises: UserError for a file that is missing or holds something else."""
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of json, or bytes that are no text
        raise UserError(f"{str(path)!r} is no JSON ({first_line(error)}): fetch it again") from error
    if not isinstance(content, expected):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__} where a {expected.__name__} is expected")
    return content
