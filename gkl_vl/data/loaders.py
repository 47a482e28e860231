"""Loaders of labelled and of semi-supervised batches. A batch is a pure function of its number.

Axis letters: N = images of the set, n = of a batch, h w = pixels.
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
    """Endless batches of a rank for `engine.fit`: views, labels, and the numbers that they go by.

    A batch is {"image", "label", "index", "view", "epoch", "keys"}. All ranks draw from one order, each every
    world_size-th batch; what is left at the end of an epoch is dropped, another part each time.

    With synthesized images an epoch has as many batches as without, and a batch begins with its original images and
    ends with its synthesized ones. The originals come in passes of their own, which are longer than an epoch, each in a
    new order without repetition, its rest dropped; the synthesized ones are drawn uniformly, with replacement.

    Args:
        views: with synthesized images a `MixedViews`, or a `DiskViews` of images `WithSynthesized`.
        num_views: views that the passes take turns in; None = a new one each pass. Without synthesized images a pass is
            an epoch.
        position: of a checkpoint; None = the start.
        second_views: other views of the same images, which a batch then has as "second_image".
        synthesized: numbered on behind the labelled images.
        fraction: of a batch that is synthesized, see `synthesized_per_batch`.

    Raises: UserError when an epoch is smaller than a batch of all ranks, or a batch would be all of one kind.
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
        self.taken = 0 if position is None else position["batches"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        asked: list[tuple[int, int, Tensor]] = []  # a DataLoader asks ahead of what it gives

        def ids() -> Iterator[Ids]:
            for epoch, view, index in self._numbers(self.taken):
                asked.append((epoch, view, index))
                yield view, index

        # The second views are asked for by the same numbers anew: their workers may be further ahead, or less far.
        again = ((view, index) for _, view, index in self._numbers(self.taken))
        second = None if self.second_views is None else self.second_views.batches(again)
        for images in self.views.batches(ids()):
            epoch, view, index = asked.pop(0)
            others = {} if second is None else {"second_image": next(second)}
            self.taken += 1
            keys = [str(i) for i in index.tolist()]
            label = self._labels(index)
            batch = {"image": images, "label": label, "index": index, "view": view, "epoch": epoch, "keys": keys}
            yield batch | others

    def _labels(self, index: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        if self.synthesized is None:
            return self.labels[index]
        original, synthesized = index.split([self.num_original, self.num_synthesized])
        return torch.cat([self.labels[original], self.synthesized.labels_of(synthesized - len(self.labels))])

    def _numbers(self, first: int) -> Iterator[tuple[int, int, Int[Tensor, " n"]]]:
        """Epoch, view and images of this rank's batches, from the given one on."""
        drawn, order = -1, torch.empty(0, dtype=torch.long)
        for number in count(first):
            passed, batch = divmod(number, self.batches_per_pass)
            if passed != drawn:
                generator = torch.Generator().manual_seed(stable_hash(f"epoch {passed} of seed {self.seed}"))
                order, drawn = torch.randperm(len(self.labels), generator=generator), passed
            start = (batch * self.world_size + self.rank) * self.num_original
            index = torch.cat([order[start : start + self.num_original], self._drawn_synthesized(number)])
            view = passed if self.num_views is None else passed % self.num_views
            yield number // self.batches_per_epoch, view, index

    def _drawn_synthesized(self, number: int) -> Int[Tensor, " n"]:
        """This rank's part of those that are drawn for all ranks' batches of this number."""
        if self.synthesized is None:
            return torch.empty(0, dtype=torch.long)
        generator = torch.Generator().manual_seed(stable_hash(f"synthesized of batch {number}, seed {self.seed}"))
        shape = (self.world_size, self.num_synthesized)
        return len(self.labels) + torch.randint(len(self.synthesized), shape, generator=generator)[self.rank]

    def position(self) -> dict[str, Any]:
        return {"batches": self.taken}

    def num_skipped(self) -> int:
        return 0


def batches_per_epoch(num_images: int, batch_size: int, world_size: int) -> int:
    """Of each rank. Raises UserError when there is not one."""
    count = num_images // (batch_size * world_size)
    if count == 0:
        raise UserError(
            f"{num_images} images do not fill a batch of {batch_size} on {world_size} processes: lower --batch-size"
        )
    return count


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
                generator = torch.Generator().manual_seed(stable_hash(f"{self.name} {number} of seed {self.seed}"))
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
