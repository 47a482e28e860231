"""Synthesized images with labels, one to fifty million, memory-mapped from disk.

The released files are `.npz` written by numpy.savez: a zip with uncompressed members, so that an array can be mapped at
its offset in the archive.

Axis letters: M = synthesized images, n = images of a batch, h w = pixels.
"""

import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64, Integer, UInt8
from PIL import Image
from torch import Tensor

from gkl_vl.data.labelled import LabelledSet
from gkl_vl.errors import UserError, first_line

KEYS = ("image", "label")
LOCAL_HEADER = "<26x2H"  # of a zip member, 30 bytes: its last two fields are the lengths of name and extra


@dataclass(frozen=True, kw_only=True)
class Synthesized:
    """Images by index with one label each, both memory-mapped: only requested images are read, and none are cached."""

    name: str
    """The path that was opened."""
    num_classes: int
    images: UInt8[np.ndarray, "M h w 3"]
    labels: Integer[np.ndarray, " M"]

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Callable[[str], "Synthesized"], tuple[str]]:
        # By its path: pickling a mapped array for a worker process would read and send all of it.
        return partial(open_synthesized, num_classes=self.num_classes), (self.name,)

    def read(self, index: int) -> Image.Image:
        """Image by index, RGB."""
        return Image.fromarray(np.array(self.images[index]))

    def pixels(self, index: Int[Tensor, " n"]) -> UInt8[Tensor, "n 3 h w"]:
        """The images at `index`."""
        return torch.from_numpy(np.asarray(self.images[index.numpy()])).permute(0, 3, 1, 2)

    def labels_of(self, index: Int[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """The labels at `index`."""
        return torch.from_numpy(np.array(self.labels[index.numpy()], dtype=np.int64))


@dataclass(frozen=True)
class WithSynthesized:
    """Images of a set followed by synthesized images, under consecutive indices; for a `DiskViews` of mixed batches."""

    original: LabelledSet
    synthesized: Synthesized

    def read(self, index: int) -> Image.Image:
        """Image by index, RGB. Raises: UserError for an image that cannot be decoded."""
        num_original = len(self.original)
        if index < num_original:
            return self.original.read(index)
        return self.synthesized.read(index - num_original)


def open_synthesized(path: str, *, num_classes: int) -> Synthesized:
    """Opens a `.npz`, or a folder with `image.npy` and `label.npy`: `image` [M, h, w, 3] uint8, `label` [M] integers.

    Args:
        num_classes: of the data set that they extend. All labels are checked, which takes 0.1 s for 50 million.

    Source: Wang et al. 2023, "Better Diffusion Models Further Improve Adversarial Training", the layout of its files.

    Raises: UserError for missing, compressed or damaged files, another shape or type, or labels out of range.
    """
    if not Path(path).exists():
        raise UserError(
            f"the synthesized data {path!r} does not exist: name an .npz, or a folder with image.npy and label.npy"
        )
    images, labels = _arrays(path)
    _check(path, images, labels, num_classes)
    return Synthesized(name=path, num_classes=num_classes, images=images, labels=labels)


def synthesized_per_batch(batch_size: int, fraction: float) -> int:
    """Number of synthesized images in a batch: fraction * batch_size, rounded down as in Wang et al.'s sampler.

    Source: `SemiSupervisedSampler` in the code of Wang et al. 2023.

    Raises: UserError if that is none or all of the batch.
    """
    count = int(fraction * batch_size + 1e-6)  # 0.29 of 100 is 28.999999999999996
    if not 1 <= count < batch_size:
        raise UserError(
            f"a fraction of {fraction} makes {count} of a batch of {batch_size} synthesized, but a batch needs at "
            "least one synthesized and one original image: change the fraction or the batch size"
        )
    return count


# ---- mapped arrays -----------------------------------------------------------------------------------------------


def _arrays(path: str) -> tuple[np.memmap, np.memmap]:
    """Maps images and labels."""
    folder = Path(path).is_dir()
    places = {file.stem: (str(file), 0) for file in Path(path).glob("*.npy")} if folder else _members(path)
    for key in KEYS:
        if key not in places:
            existing = ", ".join(sorted(places)) or "nothing"
            raise UserError(f"{path!r} has no {key!r}, only {existing}: name the data with 'image' and 'label'")
    images, labels = (_map_array(path, key, *places[key]) for key in KEYS)
    return images, labels


def _members(path: str) -> dict[str, tuple[str, int]]:
    """File and first byte of each array in a zip, by name."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            for key in KEYS:
                if key in members and members[key].compress_type != zipfile.ZIP_STORED:
                    raise UserError(
                        f"{path!r}: {key!r} is compressed and cannot be memory-mapped: unpack it with "
                        f"`python -m zipfile -e {path} FOLDER` and name the folder"
                    )
            return {key: (path, _first_byte(archive, file, info)) for key, info in members.items()}
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path!r} is not an .npz or ends early ({first_line(error)}): fetch it again") from error


def _first_byte(archive: zipfile.ZipFile, file: Any, info: zipfile.ZipInfo) -> int:
    """First byte of a member's content. The local header may be longer than its copy in the zip's directory."""
    archive.open(info).close()  # raises BadZipFile if the local header is damaged
    file.seek(info.header_offset)
    size = struct.calcsize(LOCAL_HEADER)
    return info.header_offset + size + sum(struct.unpack(LOCAL_HEADER, file.read(size)))


def _map_array(path: str, key: str, file_path: str, first_byte: int) -> np.memmap:
    """Memory-maps the array in .npy format that starts at `first_byte`."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with open(file_path, "rb") as file:
            file.seek(first_byte)
            shape, fortran_order, dtype = readers[np.lib.format.read_magic(file)](file)
            if dtype.hasobject or 0 in shape:
                raise ValueError(f"{dtype} of {list(shape)}")
            order = "F" if fortran_order else "C"
            return np.memmap(file_path, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order=order)
    except (ValueError, KeyError, OSError) as error:  # from numpy, the type depends on the damage
        raise UserError(
            f"{path!r}: {key!r} is not an array that can be memory-mapped ({first_line(error)}): fetch it again"
        ) from error


def _check(path: str, images: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    """Raises: UserError for arrays of the wrong type, shape or length, or labels out of range."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"{path!r}: 'image' is {_dtype_and_shape(images)}: save it as uint8 of [M, h, w, 3]")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(f"{path!r}: 'label' is {_dtype_and_shape(labels)}: save it as integers of [M]")
    if len(images) != len(labels):
        raise UserError(f"{path!r} has {len(images)} images and {len(labels)} labels: fetch it again")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise UserError(
            f"{path!r} has labels from {lowest} to {highest}, the data's {num_classes} classes are 0 to "
            f"{num_classes - 1}: name synthesized images of the same classes"
        )


def _dtype_and_shape(array: np.ndarray) -> str:
    return f"{array.dtype} of {list(array.shape)}"
