"""Splits for semi-supervised training: which images keep their label, drawn by seed or read from a file.

Axis letters: N = images of the training split, m = images that keep their label.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from gkl_vl.data.files import stable_hash
from gkl_vl.data.labelled import LabelledSet
from gkl_vl.errors import UserError, first_line
from gkl_vl.reading import read_text

UNKNOWN = -1
"""The hidden label of an image without label."""


def draw_labelled(data: LabelledSet, *, num_labels: int, seed: int) -> Int64[Tensor, " m"]:
    """Indices of the images that keep their label: the same number of each class, in ascending order.

    Of each class, the images with the smallest hash of (seed, index): the same on every platform and version of torch.

    Raises: UserError for fewer labels than classes, a number not divisible by the classes, or a class with too few
        images.
    """
    classes = data.num_classes
    if num_labels < classes:
        raise UserError(
            f"--num-labels {num_labels} is fewer than the {classes} classes of {data.name}: at least one of each"
        )
    if num_labels % classes:
        near = num_labels - num_labels % classes
        raise UserError(
            f"--num-labels {num_labels} is not divisible by the {classes} classes of {data.name}: use {near} or "
            f"{near + classes}"
        )
    each, counts = num_labels // classes, data.counts()
    if counts.min() < each:
        label = int(counts.argmin())
        raise UserError(
            f"--num-labels {num_labels} is {each} a class, {data.name} has {int(counts[label])} of class {label}: "
            "take fewer"
        )
    digests = torch.tensor([stable_hash(f"label of image {i}, seed {seed}") for i in range(len(data))])
    order = digests.argsort()
    chosen = [order[data.labels[order] == label][:each] for label in range(classes)]
    return torch.cat(chosen).sort().values


def read_labelled(file: str, data: LabelledSet) -> Int64[Tensor, " m"]:
    """Reads the indices of the images that keep their label.

    Args:
        file: `.npy` = indices as saved by USB (`lb_labels40_1.0_seed0_idx.npy`), the same number of each class. They
            refer to torchvision's order, that is the order of CIFAR's own files and not of parquet on the Hub. Any
            other file has lines `NUMBER LABEL`, see `labelled_lines`, or `NUMBER` alone.

    Raises:
        UserError: a missing or malformed file; indices or labels out of range; labels that differ from those of the
            data, which means another data set; an image listed twice; a class without images.
    """
    if not Path(file).is_file():
        raise UserError(f"--labelled {file!r} does not exist")
    index, labels = _read_npy(file) if file.endswith(".npy") else _read_lines(file)
    if not len(index):
        raise UserError(f"--labelled {file!r} names no image")
    outside = index[(index < 0) | (index >= len(data))]
    if len(outside):
        raise UserError(
            f"--labelled {file!r} names image {int(outside[0])}, {data.name} has 0 to {len(data) - 1}: it is of "
            "another data set"
        )
    invalid = labels[(labels != UNKNOWN) & ((labels < 0) | (labels >= data.num_classes))]
    if len(invalid):
        raise UserError(
            f"--labelled {file!r} has the label {int(invalid[0])}, the {data.num_classes} classes of {data.name} end "
            f"at {data.num_classes - 1}: it is of another data set"
        )
    different = ((labels != UNKNOWN) & (labels != data.labels[index])).nonzero().flatten()
    if len(different):
        image = int(index[different[0]])
        raise UserError(
            f"--labelled {file!r} has the label {int(labels[different[0]])} for image {image}, {data.name} has "
            f"{int(data.labels[image])}: it is of another data set"
        )
    if len(index.unique()) < len(index):
        repeated = torch.bincount(index).argmax()
        raise UserError(f"--labelled {file!r} names image {int(repeated)} more than once")
    missing = (torch.bincount(data.labels[index], minlength=data.num_classes) == 0).nonzero().flatten()
    if len(missing):
        raise UserError(
            f"--labelled {file!r} has no image of class {int(missing[0])} of {data.name}: every class needs one"
        )
    if file.endswith(".npy"):
        _require_balance(file, data, index)
    return index


def labelled_lines(index: Int[Tensor, " m"], labels: Int[Tensor, " N"]) -> str:
    """The file content that `read_labelled` reads: a line `NUMBER LABEL` for each image that keeps its label."""
    return "".join(f"{i} {labels[i]}\n" for i in index.tolist())


def _require_balance(file: str, data: LabelledSet, index: Int64[Tensor, " m"]) -> None:
    """Raises: UserError for unequal class counts, which indicate indices of another data set or order."""
    counts = torch.bincount(data.labels[index], minlength=data.num_classes)
    if counts.min() < counts.max():
        most, least = int(counts.argmax()), int(counts.argmin())
        raise UserError(
            f"--labelled {file!r} names {int(counts[most])} images of class {most} of {data.name} and "
            f"{int(counts[least])} of class {least}: it is of another data set or of another order (USB counts in "
            "torchvision's: name a folder with CIFAR's own files), or write it as lines NUMBER LABEL"
        )


def _read_npy(file: str) -> tuple[Int64[Tensor, " m"], Int64[Tensor, " m"]]:
    """Indices, and `UNKNOWN` for each."""
    try:
        numbers = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"--labelled {file!r} cannot be read as .npy ({first_line(error)})") from error
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise UserError(
            f"--labelled {file!r} holds {numbers.dtype} of shape {list(numbers.shape)}: expected 1-D integers"
        )
    index = torch.from_numpy(numbers.astype(np.int64))
    return index, torch.full_like(index, UNKNOWN)


def _read_lines(file: str) -> tuple[Int64[Tensor, " m"], Int64[Tensor, " m"]]:
    """Indices and labels; `UNKNOWN` on lines without label."""
    rows = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        words = line.split()
        if not 1 <= len(words) <= 2 or not all(word.isdecimal() for word in words):
            raise UserError(f"--labelled {file!r} line {number} is {line.strip()!r}: expected NUMBER or NUMBER LABEL")
        rows.append((int(words[0]), int(words[1]) if len(words) == 2 else UNKNOWN))
    index, labels = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).unbind(dim=1)
    return index, labels
