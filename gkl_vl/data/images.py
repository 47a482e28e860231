"""Decoding of images to RGB: one set of rules for training, labels and evaluation."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

from gkl_vl.errors import UserError, first_line

DECODE_RULES = 2
"""Version of the rules of `to_rgb`, part of the keys of stored results: raise it when pixels change."""

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_SIXTEEN_BIT_AS_32 = ("PNG", "PPM")
"""Formats whose 16-bit grey images PIL may open with mode I, its 32-bit integers."""
_PIXEL_FACTORS = {"1": 255, "L;2": 85, "L;4": 17}
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
"""TIFF's tags; photometric interpretation 0 means that 0 is white."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientations, and the operation that makes the image upright."""


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
        """Reads and decodes the image by the rules of `to_rgb`.

        Raises: BrokenImage; UserError for a file that cannot be read.
        """
        try:
            return decode(self.read())
        except BrokenSample as error:
            raise BrokenImage(
                f"{self.where} cannot be decoded ({first_line(error)}): fetch it again or remove it"
            ) from error


def decode(image: Any) -> Image.Image:
    """Decodes encoded bytes, a path or a PIL image by the rules of `to_rgb`.

    Raises: BrokenSample.
    """
    try:
        if image is None or image == b"":
            raise ValueError("no image")
        if isinstance(image, Image.Image):
            return to_rgb(image)
        if not isinstance(image, bytes | str):
            raise ValueError(f"a {type(image).__name__}, not an encoded image or its path")
        # `with`, because PIL leaves the file open if the pixel data end early
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return to_rgb(opened)
    except Exception as error:  # PIL raises nearly any exception type on broken files, all with the same meaning
        raise BrokenSample(f"image: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB, upright.

        animation             its first frame
        EXIF orientation      applied
        transparency          composed over white, partial transparency included
        16-bit grey           x / 257, rounded: 0 to 65535 become 0 to 255
        float                 255 x, rounded, for values in [0, 1]
        32-bit integers       refused, for their white is unknown
        all other modes       PIL's conversion; colour profiles are not applied

    Raises: ValueError for 32-bit integers, and floats that are not finite or outside [0, 1].
    """
    stored = _stored_as(image)  # known before loading only
    image.load()  # TIFF and AVIF apply the orientation themselves while loading
    _scale_transparency(image, stored)
    upright = _TURNS.get(_orientation(image))
    rgb = _eight_bit(image) if image.mode in (*_SIXTEEN_BIT, "I", "F") else _over_white(image)
    return rgb if upright is None else rgb.transpose(upright)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF data can be damaged in any way, and the pixels are whole
        return 1


def _stored_as(image: Image.Image) -> str:
    """How a PNG stores its pixels, in PIL's terms: "L;2", "RGB;16B", ...; "" for other formats."""
    if image.format != "PNG" or not getattr(image, "tile", None):
        return ""
    return str(image.tile[0][3])  # pyright: ignore[reportAttributeAccessIssue]


def _scale_transparency(image: Image.Image, stored: str) -> None:
    """Scales the transparent value of a PNG as PIL scales its pixels, which PIL itself leaves out."""
    value = image.info.get("transparency")
    if isinstance(value, int) and stored in _PIXEL_FACTORS:
        image.info["transparency"] = value * _PIXEL_FACTORS[stored]
    elif isinstance(value, tuple) and stored.startswith("RGB;16"):
        image.info["transparency"] = tuple(channel >> 8 for channel in value)


def _full_range(image: Image.Image, pixels: np.ndarray) -> np.ndarray:
    """16-bit pixels with white as 65535. Raises: ValueError for TIFFs of fewer bits, which PIL reads as 16."""
    if not isinstance(image, TiffImageFile):
        return pixels
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))
    if bits[0] != 16:
        raise ValueError(f"a TIFF of {bits[0]} bits: save it with 8 or 16 bits")
    return 65535 - pixels if image.tag_v2.get(_PHOTOMETRIC) == 0 else pixels


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    if image.mode == "F":
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"float pixels from {low:g} to {high:g}: floats must be in [0, 1]")
        grey = np.rint(255 * pixels)
    elif image.mode == "I" and image.format not in _SIXTEEN_BIT_AS_32:
        raise ValueError("32-bit integer pixels, whose white is unknown: save it with 8 or 16 bits")
    else:
        pixels = _full_range(image, pixels)
        grey = np.rint(pixels / 257)
    transparent = image.info.get("transparency")
    if transparent is not None:  # a grey value of the same depth
        grey = np.where(pixels == transparent, 255, grey)
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
