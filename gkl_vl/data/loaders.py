"""Loaders of labelled and of semi-supervised batches. A batch is a pure function of its number.

Axis letters: N = images of the set; semi-supervised: m = labelled and M = unlabelled images; n = images of a batch.
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from gkl_vl.data.files import stable_hash
from gkl_vl.data.synthesized import Synthesized, synthesized_per_batch
from gkl_vl.data.views import Ids, Views
from gkl_vl.errors import UserError


class LabelledLoader:
    """Endless batches of one rank for `engine.fit`: views, labels, image indices, view and epoch numbers.

    A batch is {"image", "label", "index", "view", "epoch", "keys"}. All ranks share one permutation per epoch, of which
    each takes every world_size-th batch; the incomplete batch at its end is dropped, other images each epoch.

    With synthesized images, an epoch has the same number of batches, and a batch has its original images first, then
    its synthesized ones. The original images come in passes, which are longer than an epoch: each pass is a new
    permutation, whose incomplete batch is dropped. The synthesized images are drawn uniformly, with replacement.

    Args:
        views: with synthesized images a `MixedViews`, or a `DiskViews` of images `WithSynthesized`.
        num_views: views that the passes cycle through; None = a new view each pass. Without synthesized images, a pass
            is an epoch.
        position: from a checkpoint; None = the start.
        second_views: other views of the same images, added to a batch as "second_image".
        synthesized: their indices follow those of the labelled images.
        fraction: share of a batch that is synthesized, see `synthesized_per_batch`.

    Raises: UserError if an epoch is smaller than a batch of all ranks, or a batch would have images of one kind only.
    """

    def __init__(
        self,
        *,
        views: Views,
        labels: Int[Tensor, " N"],
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        num_views: int | None,
        position: dict[str, Any] | None,
        second_views: Views | None = None,
        synthesized: Synthesized | None = None,
        fraction: float = 0.7,
    ):
        self.views, self.second_views, self.num_views = views, second_views, num_views
        self.labels, self.synthesized, self.seed = labels, synthesized, seed
        self.rank, self.world_size = rank, world_size
        self.num_synthesized = 0 if synthesized is None else synthesized_per_batch(batch_size, fraction)
        self.num_original = batch_size - self.num_synthesized
        self.batches_per_epoch = batches_per_epoch(len(labels), batch_size, world_size)
        self.batches_per_pass = batches_per_epoch(len(labels), self.num_original, world_size)
        self.taken = 0 if position is None else batches_taken(position)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        pending: list[tuple[int, int, Tensor]] = []  # requested: a DataLoader is ahead of the batches it yields

        def ids() -> Iterator[Ids]:
            for epoch, view, index in self._numbers(self.taken):
                pending.append((epoch, view, index))
                yield view, index

        # A separate iterator for the second views: their workers may be ahead by another number of batches.
        second_ids = ((view, index) for _, view, index in self._numbers(self.taken))
        second = None if self.second_views is None else self.second_views.batches(second_ids)
        for images in self.views.batches(ids()):
            epoch, view, index = pending.pop(0)
            others = {} if second is None else {"second_image": next(second)}
            self.taken += 1
            keys = [str(i) for i in index.tolist()]
            label = self._labels(index)
            batch = {"image": images, "label": label, "index": index, "view": view, "epoch": epoch, "keys": keys}
            yield batch | others

    def position(self) -> dict[str, Any]:
        return {"batches": self.taken}

    def num_skipped(self) -> int:
        return 0

    def _labels(self, index: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        if self.synthesized is None:
            return self.labels[index]
        original, synthesized = index.split([self.num_original, self.num_synthesized])
        return torch.cat([self.labels[original], self.synthesized.labels_of(synthesized - len(self.labels))])

    def _numbers(self, first: int) -> Iterator[tuple[int, int, Int[Tensor, " n"]]]:
        """Yields epoch, view and image indices of this rank's batches, from batch `first` on."""
        drawn, order = -1, torch.empty(0, dtype=torch.long)
        for number in count(first):
            pass_number, batch = divmod(number, self.batches_per_pass)
            if pass_number != drawn:
                generator = torch.Generator().manual_seed(stable_hash(f"epoch {pass_number} of seed {self.seed}"))
                order, drawn = torch.randperm(len(self.labels), generator=generator), pass_number
            start = (batch * self.world_size + self.rank) * self.num_original
            index = torch.cat([order[start : start + self.num_original], self._drawn_synthesized(number)])
            view = pass_number if self.num_views is None else pass_number % self.num_views
            yield number // self.batches_per_epoch, view, index

    def _drawn_synthesized(self, number: int) -> Int[Tensor, " n"]:
        """Indices of this rank's synthesized images in batch `number`; they are drawn for all ranks together."""
        if self.synthesized is None:
            return torch.empty(0, dtype=torch.long)
        generator = torch.Generator().manual_seed(stable_hash(f"synthesized of batch {number}, seed {self.seed}"))
        shape = (self.world_size, self.num_synthesized)
        return len(self.labels) + torch.randint(len(self.synthesized), shape, generator=generator)[self.rank]


def batches_per_epoch(num_images: int, batch_size: int, world_size: int) -> int:
    """Batches of each rank in an epoch. Raises: UserError if there is none."""
    count = num_images // (batch_size * world_size)
    if count == 0:
        raise UserError(
            f"{num_images} images do not fill a batch of {batch_size} on {world_size} processes: lower --batch-size"
        )
    return count


def batches_taken(position: dict[str, Any]) -> int:
    """The number of batches in the position of a loader. Raises: UserError for another content."""
    taken = position.get("batches")
    if not isinstance(taken, int):
        raise UserError(f"the checkpoint's position {position!r} is damaged: resume from another one")
    return taken


class Passes:
    """Endless passes over a set of images, each a new permutation.

    The permutation depends only on (seed, name, pass). A batch larger than the set spans several passes.
    """

    def __init__(self, size: int, *, seed: int, name: str):
        self.size, self.seed, self.name = size, seed, name
        self._drawn, self._order = -1, torch.empty(0, dtype=torch.long)

    def cut(self, start: int, length: int) -> list[Ids]:
        """Positions start to start + length of the endless sequence, split by pass: (number of the pass, images)."""
        pieces = []
        while length:
            number, offset = divmod(start, self.size)
            if number != self._drawn:
                generator = torch.Generator().manual_seed(stable_hash(f"{self.name} {number} of seed {self.seed}"))
                self._drawn, self._order = number, torch.randperm(self.size, generator=generator)
            part = self._order[offset : offset + length]
            pieces.append((number, part))
            start, length = start + len(part), length - len(part)
        return pieces


class SemiSupervisedLoader:
    """Endless batches of one rank for `engine.fit`, with separate passes over labelled and unlabelled images.

    A batch is {"image", "label", "keys"} of n labelled images and "step", the number of the batch, and with `mu` also
    {"weak", "strong", "unlabelled_index", "hidden_label"} of mu * n unlabelled images and "epoch", the number of
    completed passes over them. Counts of images within a set differ by at most one; nothing is dropped.

    Args:
        labelled: views of the m labelled images.
        labels: their labels.
        weak, strong: views of the M unlabelled images.
        hidden_labels: labels of the M images, for statistics only; `UNKNOWN` if there is none.
        mu: unlabelled images per labelled image; 0 = none, and `weak` and `strong` are not used.
        position: from a checkpoint; None = the start.
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
        self.taken = 0 if position is None else batches_taken(position)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        labelled = self._views(self.labelled, len(self.labels), self.batch_size, "labelled pass")
        unlabelled = (len(self.hidden_labels), self.batch_size * self.mu, "unlabelled pass")
        streams = [self._views(views, *unlabelled) for views in (self.weak, self.strong)] if self.mu else []
        while True:
            index, images = next(labelled)
            batch = {"image": images, "label": self.labels[index], "keys": [str(i) for i in index.tolist()]}
            if streams:
                (index, weak), (_, strong) = (next(stream) for stream in streams)
                # rank 0's start, so that all ranks change epoch together
                start = self.taken * self.world_size * self.batch_size * self.mu
                batch |= {"weak": weak, "strong": strong, "epoch": start // len(self.hidden_labels)}
                batch |= {"unlabelled_index": index, "hidden_label": self.hidden_labels[index]}
            batch["step"] = self.taken
            self.taken += 1
            yield batch

    def position(self) -> dict[str, Any]:
        return {"batches": self.taken}

    def num_skipped(self) -> int:
        return 0

    def _views(self, views: Views, size: int, length: int, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields image indices and views of this rank's batches of `length` images, from the current position on."""

        def parts() -> Iterator[list[Ids]]:
            passes = Passes(size, seed=self.seed, name=name)
            return (passes.cut((b * self.world_size + self.rank) * length, length) for b in count(self.taken))

        # parts() is iterated twice, because worker processes request views ahead of the batches that are yielded.
        images = views.batches(part for batch in parts() for part in batch)
        for batch in parts():
            yield torch.cat([index for _, index in batch]), torch.cat(list(islice(images, len(batch))))
