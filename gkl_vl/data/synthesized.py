"""Synthesized images with labels, a million to fifty, which stay on disk and are mapped into memory.

The released files are `.npz` written by numpy.savez: a zip whose members are stored as they are, so that an array can
be mapped where it lies in the archive.

Axis letters: M = synthesized images, n = chosen ones, h w = pixels.
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
LOCAL_HEADER = "<26x2H"  # of a zip's member: the last two of its 30 bytes' fields are the lengths of name and extra


@dataclass(frozen=True, kw_only=True)
class Synthesized:
    """Images by number with one label each, both mapped: what is asked for is read, and nothing is kept."""

    name: str
    """The path that was opened."""
    num_classes: int
    images: UInt8[np.ndarray, "M h w 3"]
    labels: Integer[np.ndarray, " M"]

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Callable[[str], "Synthesized"], tuple[str]]:
        # By its path: pickled for a worker process, a mapped array would be read and sent as a whole.
        return partial(open_synthesized, num_classes=self.num_classes), (self.name,)

    def read(self, index: int) -> Image.Image:
        """Image by number, RGB."""
        return Image.fromarray(np.array(self.images[index]))

    def pixels(self, index: Int[Tensor, " n"]) -> UInt8[Tensor, "n 3 h w"]:
        """The images of these numbers."""
        return torch.from_numpy(np.asarray(self.images[index.numpy()])).permute(0, 3, 1, 2)

    def labels_of(self, index: Int[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """The labels of these numbers."""
        return torch.from_numpy(np.array(self.labels[index.numpy()], dtype=np.int64))


@dataclass(frozen=True)
class WithSynthesized:
    """A set's images and, numbered on behind them, synthesized ones: what `DiskViews` reads a mixed batch from."""

    original: LabelledSet
    synthesized: Synthesized

    def read(self, index: int) -> Image.Image:
        """Image by number, RGB. Raises: UserError for one that cannot be decoded."""
        own = len(self.original)
        return self.original.read(index) if index < own else self.synthesized.read(index - own)


def open_synthesized(path: str, *, num_classes: int) -> Synthesized:
    """The images of a `.npz`, or of a folder with `image.npy` and `label.npy`: `image` [M, h, w, 3] uint8, `label` [M].

    Args:
        num_classes: of the data that they extend; all labels are looked at once, 0.1 s for 50 million.

    Source: Wang et al. 2023, "Better Diffusion Models Further Improve Adversarial Training", the layout of its files.

    Raises: UserError for what is missing, compressed, damaged, of another shape or type, or labelled out of range.
    """
    if not Path(path).exists():
        raise UserError(
            f"the synthesized data {path!r} does not exist: name an .npz, or a folder with image.npy and label.npy"
        )
    images, labels = _arrays(path)
    _check(path, images, labels, num_classes)
    return Synthesized(name=path, num_classes=num_classes, images=images, labels=labels)


def synthesized_per_batch(batch_size: int, fraction: float) -> int:
    """Images of a batch that are synthesized: fraction of it, rounded down as in Wang et al.'s `SemiSupervisedSampler`.

    Raises: UserError when that is none or all of them.
    """
    count = int(fraction * batch_size + 1e-6)  # 0.29 of 100 is 28.999999999999996
    if not 1 <= count < batch_size:
        raise UserError(
            f"a fraction of {fraction} makes {count} of a batch of {batch_size} synthesized, and at least one image "
            "must be, and one original: change the fraction or the batch"
        )
    return count


# ---- where the arrays lie ----------------------------------------------------------------------------------------


def _arrays(path: str) -> tuple[np.memmap, np.memmap]:
    folder = Path(path).is_dir()
    places = {file.stem: (str(file), 0) for file in Path(path).glob("*.npy")} if folder else _members(path)
    for key in KEYS:
        if key not in places:
            there = ", ".join(sorted(places)) or "nothing"
            raise UserError(f"{path!r} has no {key!r}, only {there}: name the data with 'image' and 'label'")
    images, labels = (_mapped(path, key, *places[key]) for key in KEYS)
    return images, labels


def _members(path: str) -> dict[str, tuple[str, int]]:
    """Of each array in a zip: the file, and the byte where it begins."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            for key in KEYS:
                if key in members and members[key].compress_type != zipfile.ZIP_STORED:
                    raise UserError(
                        f"{path!r}: {key!r} is compressed and cannot be mapped: unpack it with "
                        f"`python -m zipfile -e {path} FOLDER` and name the folder"
                    )
            return {key: (path, _begin(archive, file, info)) for key, info in members.items()}
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path!r} is no .npz or ends early ({first_line(error)}): fetch it again") from error


def _begin(archive: zipfile.ZipFile, file: Any, info: zipfile.ZipInfo) -> int:
    """The first byte of a member's content. Its own header may be longer than the directory's copy says."""
    archive.open(info).close()  # raises BadZipFile where that header is damaged
    file.seek(info.header_offset)
    size = struct.calcsize(LOCAL_HEADER)
    return info.header_offset + size + sum(struct.unpack(LOCAL_HEADER, file.read(size)))


def _mapped(path: str, key: str, file_path: str, begin: int) -> np.memmap:
    """The array that numpy wrote from that byte on, mapped where it lies."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with open(file_path, "rb") as file:
            file.seek(begin)
            shape, by_columns, dtype = readers[np.lib.format.read_magic(file)](file)
            if dtype.hasobject or 0 in shape:
                raise ValueError(f"{dtype} of {list(shape)}")
            order = "F" if by_columns else "C"
            return np.memmap(file_path, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order=order)
    except (ValueError, KeyError, OSError) as error:  # of numpy, by what is damaged
        raise UserError(
            f"{path!r}: {key!r} is no array that can be mapped ({first_line(error)}): fetch it again"
        ) from error


def _check(path: str, images: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"{path!r}: 'image' is {_told(images)}, expected uint8 of [M, h, w, 3]: save it so")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(f"{path!r}: 'label' is {_told(labels)}, expected whole numbers of [M]: save it so")
    if len(images) != len(labels):
        raise UserError(f"{path!r} has {len(images)} images and {len(labels)} labels: fetch it again")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise UserError(
            f"{path!r} has labels from {lowest} to {highest}, the data's {num_classes} classes go from 0 to "
            f"{num_classes - 1}: name synthesized images of the same classes"
        )


def _told(array: np.ndarray) -> str:
    return f"{array.dtype} of {list(array.shape)}"
