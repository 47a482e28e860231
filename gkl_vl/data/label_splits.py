"""Few images with labels and many without: which ones keep their label, and the batches of both.

Axis letters: N = images of the training split, m = those that keep their label, M = images without label (the others',
all of the split's, or more), n = labelled images of a batch, u = its images without label, C = classes.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from gkl_vl.data.files import stable_hash
from gkl_vl.data.labelled import LabelledSet
from gkl_vl.errors import UserError, first_line

UNKNOWN = -1
"""The hidden label of an image that has none."""


# ---- which images keep their label -------------------------------------------------------------------------------


def draw_labelled(data: LabelledSet, *, num_labels: int, seed: int) -> Int64[Tensor, " m"]:
    """The images that keep their label, as many of each class, in order.

    Of each class those whose digest of (seed, number) is smallest: the same on every platform and version of torch.

    Raises: UserError for fewer labels than classes, a number that the classes cannot share, or too small a class.
    """
    classes = data.num_classes
    if num_labels < classes:
        raise UserError(
            f"--num-labels {num_labels} is fewer than the {classes} classes of {data.name}: at least one of each"
        )
    if num_labels % classes:
        near = num_labels - num_labels % classes
        raise UserError(
            f"--num-labels {num_labels} cannot be shared by {classes} classes alike: take {near} or {near + classes}"
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
    """The images that a file lets keep their label.

    Args:
        file: `.npy` = numbers of images, as USB saves them (`lb_labels40_1.0_seed0_idx.npy`), as many of each class.
            They count in torchvision's order, which CIFAR's own files have and parquet on the Hub has not. Else lines
            `NUMBER LABEL`, see `labelled_lines`, or `NUMBER` alone.

    Raises:
        UserError: a file that is not there or says something else; numbers or labels that the data does not have,
            labels that are not the data's: it is of another set; an image twice; a class without any.
    """
    if not Path(file).is_file():
        raise UserError(f"--labelled {file!r} does not exist")
    index, labels = _numpy_file(file) if file.endswith(".npy") else _lines(file)
    if not len(index):
        raise UserError(f"--labelled {file!r} names no image")
    beyond = index[(index < 0) | (index >= len(data))]
    if len(beyond):
        raise UserError(
            f"--labelled {file!r} names image {int(beyond[0])}, {data.name} has 0 to {len(data) - 1}: it is of another "
            "data set"
        )
    strange = labels[(labels != UNKNOWN) & ((labels < 0) | (labels >= data.num_classes))]
    if len(strange):
        raise UserError(
            f"--labelled {file!r} has the label {int(strange[0])}, the {data.num_classes} classes of {data.name} end "
            f"at {data.num_classes - 1}: it is of another data set"
        )
    other = ((labels != UNKNOWN) & (labels != data.labels[index])).nonzero().flatten()
    if len(other):
        at = int(index[other[0]])
        raise UserError(
            f"--labelled {file!r} says {int(labels[other[0]])} for image {at}, {data.name} {int(data.labels[at])}: it "
            "is of another data set"
        )
    if len(index.unique()) < len(index):
        twice = torch.bincount(index).argmax()
        raise UserError(f"--labelled {file!r} names image {int(twice)} more than once")
    missing = (torch.bincount(data.labels[index], minlength=data.num_classes) == 0).nonzero().flatten()
    if len(missing):
        raise UserError(
            f"--labelled {file!r} has no image of class {int(missing[0])} of {data.name}: every class needs one"
        )
    if file.endswith(".npy"):
        _require_balance(file, data, index)
    return index


def _require_balance(file: str, data: LabelledSet, index: Int64[Tensor, " m"]) -> None:
    """Numbers alone do not say what they are of; of another set, or in another order, they would be out of balance."""
    counts = torch.bincount(data.labels[index], minlength=data.num_classes)
    if counts.min() < counts.max():
        most, least = int(counts.argmax()), int(counts.argmin())
        raise UserError(
            f"--labelled {file!r} names {int(counts[most])} images of class {most} of {data.name} and "
            f"{int(counts[least])} of class {least}: it is of another data set or of another order (USB counts in "
            "torchvision's: name a folder with CIFAR's own files), or write it as lines NUMBER LABEL"
        )


def _numpy_file(file: str) -> tuple[Int64[Tensor, " m"], Int64[Tensor, " m"]]:
    try:
        numbers = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"--labelled {file!r} cannot be read as .npy ({first_line(error)})") from error
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise UserError(
            f"--labelled {file!r} holds {numbers.dtype} of shape {list(numbers.shape)}: expected a row of whole numbers"
        )
    index = torch.from_numpy(numbers.astype(np.int64))
    return index, torch.full_like(index, UNKNOWN)


def _lines(file: str) -> tuple[Int64[Tensor, " m"], Int64[Tensor, " m"]]:
    rows = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = line.split()
        if not 1 <= len(words) <= 2 or not all(word.isdecimal() for word in words):
            raise UserError(f"--labelled {file!r} line {number} is {line.strip()!r}: expected NUMBER or NUMBER LABEL")
        rows.append((int(words[0]), int(words[1]) if len(words) == 2 else UNKNOWN))
    index, labels = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).unbind(dim=1)
    return index, labels


def labelled_lines(index: Int[Tensor, " m"], labels: Int[Tensor, " N"]) -> str:
    """What `read_labelled` reads: a line `NUMBER LABEL` of each image that keeps its label."""
    return "".join(f"{i} {labels[i]}\n" for i in index.tolist())
