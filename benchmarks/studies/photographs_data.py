"""Files of the study on photographs: CIFAR-10's images with captions that are made from their classes and pixels.

Axis letters: n = images, h w = pixels, k = number of colours.
"""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, UInt8
from PIL import Image

from gkl_vl.data.prompts import CIFAR_TEMPLATES
from gkl_vl.models.pretrained import BUNDLED_TOKENIZER_NAME

COLOURS = {
    "black": (25, 25, 25),
    "white": (240, 240, 240),
    "grey": (130, 130, 130),
    "red": (170, 45, 40),
    "orange": (215, 125, 55),
    "yellow": (210, 195, 75),
    "green": (80, 115, 55),
    "light blue": (150, 190, 230),
    "blue": (55, 90, 160),
    "brown": (105, 75, 50),
    "beige": (195, 175, 145),
}
"""Name: the middle of its range in RGB."""
DARK, BRIGHT = 105, 135
"""Mean pixel values: about a third of the images are below the first, and above the second."""
POSITIONS = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")
PLAIN_CAPTIONS = (
    "a photo of a {c}.",
    "a picture of the {c}.",
    "a small image of a {c}.",
    "one {c}",
)
FREE_CAPTIONS = (
    "a {colour} {c} on a {background} background",
    "a {light} photo of a {colour} {c}",
    "{c} {position} of a {light} picture",
    "a {c} {position}, {background} behind it",
    "{colour} and {background}: a {c}",
)
CAPTIONS_PER_IMAGE = (2, 3)
"""Plain and free."""
BORDER = 5
"""Width of the frame, in pixels, whose colour is the background's."""
ROWS_PER_GROUP = 1000
STUDENT_IMAGES = 20_000
TEACHER_DATA, STUDENT_DATA = "teacher.parquet", "student.parquet"
TEACHER_CONFIG, STUDENT_CONFIG = "teacher.json", "student.json"
TEMPLATES = "templates.txt"


def write_files(cifar: Path, folder: Path) -> None:
    """Writes the data, the model configs and the templates of the study into a folder, unless they are there."""
    if (folder / TEMPLATES).is_file():  # the last one
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_captioned(cifar / "train-00000-of-00001.parquet", folder / TEACHER_DATA)
    pq.write_table(pq.read_table(folder / TEACHER_DATA).slice(0, STUDENT_IMAGES), folder / STUDENT_DATA, ROWS_PER_GROUP)
    for name, size in ((TEACHER_CONFIG, 64), (STUDENT_CONFIG, 32)):
        (folder / name).write_text(json.dumps(model_config(size), indent=4))
    (folder / TEMPLATES).write_text("\n".join(CIFAR_TEMPLATES))


def model_config(image_size: int) -> dict[str, Any]:
    """open_clip's config of a small CLIP."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": image_size,
            "timm_model_name": "test_resnet",
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
        "text_cfg": {
            "context_length": 18,
            "vocab_size": 4096,
            "hf_tokenizer_name": BUNDLED_TOKENIZER_NAME,
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    }


def write_captioned(source: Path, target: Path) -> None:
    """Writes CIFAR-10's training table with a column of captions.

    The captions of a row depend only on its image, its class and its number.
    """
    table = pq.read_table(source)
    names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in table["img"].to_pylist()])
    words = measured_words(pixels)
    captions = [
        captions_of(row, names[label], {kind: column[row] for kind, column in words.items()})
        for row, label in enumerate(table["label"].to_pylist())
    ]
    table = table.append_column("caption", pa.array(captions, pa.list_(pa.string())))
    pq.write_table(table, target, row_group_size=ROWS_PER_GROUP)


def captions_of(row: int, name: str, words: dict[str, str]) -> list[str]:
    """Captions of one image: some of the plain ones and some of those with measured words."""
    rng = random.Random(row)
    plain, free = CAPTIONS_PER_IMAGE
    chosen = rng.sample(PLAIN_CAPTIONS, plain) + rng.sample(FREE_CAPTIONS, free)
    return [caption.format(c=name, **words) for caption in chosen]


def measured_words(pixels: UInt8[np.ndarray, "n h w 3"]) -> dict[str, list[str]]:
    """Words for each image: the colours of its middle and of its frame, its brightness, where its object is."""
    size = pixels.shape[1]
    middle = pixels[:, size // 3 : -(size // 3), size // 3 : -(size // 3)]
    in_frame = np.ones(pixels.shape[1:3], bool)
    in_frame[BORDER:-BORDER, BORDER:-BORDER] = False
    frame = np.median(pixels[:, in_frame], axis=1)  # [n, 3]
    brightness = pixels.mean(axis=(1, 2, 3))
    return {
        "colour": colour_names(np.median(middle, axis=(1, 2))),
        "background": colour_names(frame),
        "light": np.select([brightness < DARK, brightness > BRIGHT], ["dark", "bright"], "clear").tolist(),
        "position": positions(pixels, frame),
    }


def colour_names(colours: Float[np.ndarray, "n 3"]) -> list[str]:
    """The nearest of `COLOURS`."""
    palette = np.array(list(COLOURS.values()))  # [k, 3]
    distances = np.linalg.norm(colours[:, None] - palette, axis=2)  # [n, k]
    return np.array(list(COLOURS))[distances.argmin(axis=1)].tolist()


def positions(pixels: UInt8[np.ndarray, "n h w 3"], frame: Float[np.ndarray, "n 3"]) -> list[str]:
    """Where the centre of mass of what differs from the frame's colour lies."""
    size = pixels.shape[1]
    mass = np.stack([np.abs(image - colour).sum(axis=2) for image, colour in zip(pixels, frame, strict=True)])
    offsets = np.arange(size) - (size - 1) / 2
    total = mass.sum(axis=(1, 2)).clip(min=1)
    x = (mass.sum(axis=1) * offsets).sum(axis=1) / total
    y = (mass.sum(axis=2) * offsets).sum(axis=1) / total
    far = size / 24
    horizontal = np.abs(x) >= np.abs(y)
    conditions = [horizontal & (x < -far), horizontal & (x > far), ~horizontal & (y < -far), ~horizontal & (y > far)]
    return np.select(conditions, POSITIONS[:4], POSITIONS[4]).tolist()
