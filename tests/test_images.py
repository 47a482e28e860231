"""Images of every mode become the same upright 8-bit RGB pixels, in training, labels and evaluation."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from gkl_vl.data.images import BrokenSample, decode

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
ORIENTATION = 0x0112


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def grey(image) -> np.ndarray:
    pixels = np.asarray(decode(image))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def logo() -> Image.Image:
    """A black square on a transparent ground, whose hidden colour is black as well."""
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[1:3, 1:3, 3] = 255
    return Image.fromarray(pixels)


SQUARE = np.full((4, 4), 255, np.uint8)
SQUARE[1:3, 1:3] = 0


@pytest.mark.parametrize("format", [None, "PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_to_eight(format):
    ramp = RAMP.astype(np.uint16) * 257
    if format == "PPM":
        image = b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes()
    else:
        image = Image.fromarray(ramp) if format is None else encoded(Image.fromarray(ramp), format)
    assert np.array_equal(grey(image), RAMP)


def test_sixteen_bits_are_rounded():
    assert grey(Image.fromarray(np.array([[0, 128, 129, 65535 - 128]], np.uint16))).tolist() == [[0, 0, 1, 255]]


@pytest.mark.parametrize("format", [None, "TIFF"])
def test_floats_in_0_to_1_are_scaled(format):
    image = Image.fromarray(RAMP.astype(np.float32) / 255)
    assert np.array_equal(grey(image if format is None else encoded(image, format)), RAMP)


@pytest.mark.parametrize(
    "pixels, message",
    [
        (np.array([[0, 255]], np.float32), r"float pixels from 0 to 255: floats must be in \[0, 1\]"),
        (np.array([[-0.5, 1]], np.float32), "float pixels from -0.5 to 1"),
        (np.array([[0, np.nan]], np.float32), "float pixels from nan to nan"),
        (np.array([[0, 255]], np.int32), "32-bit integer pixels, whose white is unknown: save it with 8 or 16 bits"),
    ],
)
def test_pixels_without_a_known_white_are_refused(pixels, message):
    with pytest.raises(BrokenSample, match=message):
        decode(encoded(Image.fromarray(pixels), "TIFF"))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparency_becomes_white(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(grey(encoded(logo(), format, **options)), SQUARE)


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBa"])
def test_transparency_of_every_mode_becomes_white(mode):
    assert np.array_equal(grey(logo().convert(mode)), SQUARE)


def test_half_transparent_pixels_are_mixed_with_white():
    assert decode(Image.new("RGBA", (1, 1), (255, 0, 0, 51))).getpixel((0, 0)) == (255, 204, 204)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_becomes_white(format):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    pixels = np.asarray(decode(encoded(image, format, transparency=1)))
    assert pixels.tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert np.asarray(decode(encoded(image, format))).tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize(
    "orientation, corners",
    [
        (1, "abcd"), (2, "badc"), (3, "dcba"), (4, "cdab"), (5, "acbd"), (6, "cadb"), (7, "dbca"), (8, "bdac"),
    ],
)  # fmt: skip
def test_the_exif_orientation_is_applied(format, orientation, corners):
    """`corners` = the upright quarters, row by row, of a picture stored with the quarters a b / c d."""
    quarters = {"a": (200, 0, 0), "b": (0, 200, 0), "c": (0, 0, 200), "d": (200, 200, 0)}
    pixels = np.array([[quarters["a"], quarters["b"]], [quarters["c"], quarters["d"]]], np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(pixels.repeat(16, axis=0).repeat(16, axis=1))
    upright = np.asarray(decode(encoded(stored, format, exif=exif)))[8::16, 8::16].reshape(4, 3).astype(int)
    nearest = [min(quarters, key=lambda name: abs(np.array(quarters[name]) - pixel).sum()) for pixel in upright]
    assert "".join(nearest) == corners


def test_damaged_exif_data_leave_the_pixels():
    image = encoded(Image.new("RGB", (2, 2), "red"), "PNG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert decode(image).getpixel((0, 0)) == (255, 0, 0)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        animated = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert decode(animated).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBX"])
def test_other_modes_are_converted(mode):
    colour = (255, 255, 255) if mode == "1" else (128, 128, 128)
    got = decode(Image.new("RGB", (2, 2), colour).convert(mode)).getpixel((0, 0))
    assert max(abs(a - b) for a, b in zip(got, colour, strict=True)) <= 26  # P has a palette of 6 levels a channel


@pytest.mark.parametrize("image", [None, b"", b"no image", [1, 2], 7, "no/such.png", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_a_broken_sample(image):
    with pytest.raises(BrokenSample, match="^image: "):
        decode(image)


def tiff(pixels: np.ndarray, *, bits: int, photometric: int) -> bytes:
    """A grey TIFF of one strip, little-endian; `pixels` as they are packed."""
    h, w = 2, 2
    tags = [
        (256, w),
        (257, h),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, h),
        (279, pixels.nbytes),
    ]
    directory = 8 + pixels.nbytes
    head = b"II*\0" + directory.to_bytes(4, "little") + pixels.tobytes()
    entries = b"".join(tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in tags)
    return head + len(tags).to_bytes(2, "little") + entries + bytes(4)


def test_a_tiff_says_what_is_white():
    pixels = np.array([[0, 65535], [257, 514]], "<u2")
    assert grey(tiff(pixels, bits=16, photometric=1)).tolist() == [[0, 255], [1, 2]]
    assert grey(tiff(pixels, bits=16, photometric=0)).tolist() == [[255, 0], [254, 253]]


def test_a_tiff_of_twelve_bits_is_refused():
    with pytest.raises(BrokenSample, match="a TIFF of 12 bits: save it with 8 or 16 bits"):
        decode(tiff(np.frombuffer(b"\xff\xf0\x00\xff\xf0\x00", np.uint8), bits=12, photometric=1))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_grey_of_few_bits_becomes_white(bits):
    levels = 2**bits
    image = b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, body)
        for kind, body in [
            (b"IHDR", struct.pack(">IIBBBBB", 1, 2, bits, 0, 0, 0, 0)),
            (b"tRNS", struct.pack(">H", 1)),
            (b"IDAT", zlib.compress(bytes([0, 1 << (8 - bits), 0, 0]))),
            (b"IEND", b""),
        ]
    )
    assert levels > 1 and grey(image).tolist() == [[255], [0]]


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
