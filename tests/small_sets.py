"""Writes small data sets of plain pictures: CLIP_benchmark's layout, shards, single files and CIFAR's parquet."""

import io
import tarfile
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def picture(colour: str, *, ending: str = "png", size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), COLOURS[colour]).save(file, {"jpg": "jpeg"}.get(ending, ending))
    return file.getvalue()


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_set(root: Path, shards: list[list[tuple[str, dict[str, bytes]]]], **files: list[str]) -> Path:
    """Writes a set in CLIP_benchmark's layout; `files`: lines of text files by stem, e.g. classnames=["cat", "dog"]."""
    (root / "test").mkdir(parents=True)
    for index, samples in enumerate(shards):
        write_shard(root / "test" / f"{index}.tar", samples)
    (root / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
    for stem, lines in files.items():
        (root / f"{stem}.txt").write_text("".join(f"{line}\n" for line in lines))
    return root


def write_picture(path: Path, colour: str, **size: int) -> None:
    """Writes an image file and its parent folders; the ending sets the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = path.suffix[1:].lower()
    path.write_bytes(picture(colour, ending="jpg" if ending == "jpeg" else ending, **size))


def colour_of(image: Image.Image) -> str:
    """The nearest of COLOURS, because JPEG changes them slightly."""
    pixel = image.convert("RGB").getpixel((3, 3))
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], pixel, strict=True)))


def colour_set(root: Path, colours: list[str], *, shards: int = 2) -> Path:
    """Writes a classification set with pictures of `colours` in that order, and captions."""
    names = list(COLOURS)
    samples = [
        (
            f"s{index:04d}",
            {
                "png": picture(colour),
                "cls": str(names.index(colour)).encode(),
                "txt": f"something {colour}\na {colour} square\n".encode(),
            },
        )
        for index, colour in enumerate(colours)
    ]
    size = -(-len(samples) // shards)
    return write_set(
        root,
        [samples[start : start + size] for start in range(0, len(samples), size)],
        classnames=names,
        zeroshot_classification_templates=["{c}", "something {c}"],
    )


def write_cifar(folder: Path, counts: dict[str, int], *, classes: int, unlabelled: str | None = None) -> None:
    """Writes parquet in the layout of CIFAR-10 on the Hub: 32 x 32 noise, cyclic labels, none in split `unlabelled`."""
    random, names = np.random.default_rng(0), ClassLabel(names=[f"class {i}" for i in range(classes)])
    folder.mkdir()
    for split, count in counts.items():
        images = [Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        content = {"img": images, "label": [i % classes for i in range(count)]}
        features = Features({"img": ImageFeature(), "label": names})
        if split == unlabelled:
            del content["label"], features["label"]
        Dataset.from_dict(content, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
