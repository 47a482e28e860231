"""Few images with labels and many without: which ones keep their label, and the batches of both.

Axis letters: N = images of the training split, m = those that keep their label, M = images without label (the others',
all of the split's, or more), n = labelled images of a batch, u = its images without label, C = classes.
"""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from gkl_vl.data.labelled import LabelledSet
from gkl_vl.data.pairs import number_of
from gkl_vl.data.views import Ids, Views
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
    digests = torch.tensor([number_of(f"label of image {i}, seed {seed}") for i in range(len(data))])
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


# ---- batches -----------------------------------------------------------------------------------------------------


class Passes:
    """Images in passes without end: all of them in a new order, then all of them again.

    The order of a pass is drawn by (seed, name, pass) alone. A batch larger than the set takes from several passes.
    """

    def __init__(self, size: int, *, seed: int, name: str):
        self.size, self.seed, self.name = size, seed, name
        self._drawn, self._order = -1, torch.empty(0, dtype=torch.long)

    def cut(self, start: int, length: int) -> list[Ids]:
        """Places start to start + length of the whole row, cut where passes end: (number of the pass, images)."""
        found = []
        while length:
            number, offset = divmod(start, self.size)
            if number != self._drawn:
                generator = torch.Generator().manual_seed(number_of(f"{self.name} {number} of seed {self.seed}"))
                self._drawn, self._order = number, torch.randperm(self.size, generator=generator)
            part = self._order[offset : offset + length]
            found.append((number, part))
            start, length = start + len(part), length - len(part)
        return found


class SemiSupervisedLoader:
    """Endless batches of a rank for `engine.fit`, labelled and unlabelled images each in passes of their own.

    A batch is {"image", "label", "keys"} of n labelled images and "step", its own number, and with `mu` also {"weak",
    "strong", "unlabelled_index", "hidden_label"} of u = mu * n images without label and "epoch", the passes over them.
    Every image comes as often as any other, to within one, however long the two sets are; nothing is dropped.

    Args:
        labelled: views of the m images, and their labels.
        weak, strong: views of the M images.
        hidden_labels: of the M images, for statistics alone; `UNKNOWN` where there is none.
        mu: images without label for each labelled one; 0 = none, and no `weak` and `strong` are asked for.
        position: of a checkpoint; None = the start.
    """

    def __init__(
        self,
        *,
        labelled: Views,
        labels: Int[Tensor, " m"],
        weak: Views,
        strong: Views,
        hidden_labels: Int[Tensor, " M"],
        batch_size: int,
        mu: int,
        seed: int,
        rank: int,
        world_size: int,
        position: dict[str, Any] | None,
    ):
        self.labelled, self.labels, self.weak, self.strong = labelled, labels, weak, strong
        self.hidden_labels, self.batch_size, self.mu, self.seed = hidden_labels, batch_size, mu, seed
        self.rank, self.world_size = rank, world_size
        self.taken = 0 if position is None else position["batches"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        labelled = self._views(self.labelled, len(self.labels), self.batch_size, "labelled pass")
        unlabelled = (len(self.hidden_labels), self.batch_size * self.mu, "unlabelled pass")
        streams = [self._views(views, *unlabelled) for views in (self.weak, self.strong)] if self.mu else []
        while True:
            index, images = next(labelled)
            batch = {"image": images, "label": self.labels[index], "keys": [str(i) for i in index.tolist()]}
            if streams:
                (index, weak), (_, strong) = (next(stream) for stream in streams)
                start = self.taken * self.world_size * self.batch_size * self.mu  # rank 0's: all change passes together
                batch |= {"weak": weak, "strong": strong, "epoch": start // len(self.hidden_labels)}
                batch |= {"unlabelled_index": index, "hidden_label": self.hidden_labels[index]}
            batch["step"] = self.taken
            self.taken += 1
            yield batch

    def _views(self, views: Views, size: int, length: int, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers and views of this rank's batches, of `length` images each, from where the loader stands."""

        def parts() -> Iterator[list[Ids]]:
            passes = Passes(size, seed=self.seed, name=name)
            return (passes.cut((b * self.world_size + self.rank) * length, length) for b in count(self.taken))

        # Twice, since views are asked for ahead of what is given: worker processes.
        images = views.batches(part for batch in parts() for part in batch)
        for batch in parts():
            yield torch.cat([index for _, index in batch]), torch.cat(list(islice(images, len(batch))))

    def position(self) -> dict[str, Any]:
        return {"batches": self.taken}

    def num_skipped(self) -> int:
        return 0
