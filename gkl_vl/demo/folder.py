"""The images below a folder, and small JPEGs of them for the page. Nothing outside of the folder is read."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from gkl_vl.data.files import IMAGE_SUFFIXES, endings_text, image_paths
from gkl_vl.data.images import BrokenSample, decode
from gkl_vl.errors import UserError, first_line, notice

THUMBNAIL_PIXELS, LARGE_PIXELS = 256, 1600
"""Longest sides of the two sizes in which the page shows an image."""


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """The images below a folder."""

    root: Path
    """Without links."""
    names: tuple[str, ...]
    """Relative paths, sorted."""

    def read(self, number: int) -> bytes:
        """The bytes of an image.

        Raises: UserError for a file that is gone, cannot be read, or has become a link out of the folder.
        """
        name = self.names[number]
        if not _is_below(self.root / name, self.root):
            raise UserError(f"{name} is a link out of the folder.")
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror}).") from error


def open_folder(folder: str) -> ImageFolder:
    """Lists the images below a folder, at any depth. Links that lead out of it are left out.

    Raises: UserError for a folder that does not exist or holds no images.
    """
    if not Path(folder).is_dir():
        problem = "is a file" if Path(folder).exists() else "does not exist"
        raise UserError(f"--images {folder!r} {problem}: name a folder of images")
    root = Path(folder).resolve()
    listed, others = image_paths(root)
    names = [name for name in listed if _is_below(root / name, root)]
    if len(names) < len(listed):
        notice(f"{folder}: {len(listed) - len(names)} images are links out of this folder and are left out")
    if not names:
        endings = ", ".join(f".{ending}" for ending in IMAGE_SUFFIXES)
        raise UserError(f"--images {folder!r} holds no images but {endings_text(others)}: name one with {endings}")
    return ImageFolder(root=root, names=tuple(names))


def decode_named(content: bytes, name: str) -> Image.Image:
    """Decodes an image by the rules of `data/images.py`. Raises: UserError that names it."""
    try:
        return decode(content)
    except BrokenSample as error:
        cause = error.__cause__
        reason = "" if cause is None or isinstance(cause, UnidentifiedImageError) else f" ({first_line(cause)})"
        raise UserError(f"{name} cannot be decoded as an image{reason}.") from error


def as_jpeg(image: Image.Image, pixels: int) -> bytes:
    """The image as a JPEG without metadata, its longest side at most `pixels`."""
    file = io.BytesIO()
    smaller = image.copy()
    smaller.thumbnail((pixels, pixels))
    smaller.info = {}  # PIL writes a comment that it finds there
    smaller.save(file, "JPEG", quality=85)
    return file.getvalue()


def _is_below(path: Path, root: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root)
