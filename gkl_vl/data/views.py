"""Augmented views of labelled images, and the batches that a training run makes of them.

View v of image i is drawn by (seed, v, i) alone, and the order of an epoch by (seed, epoch). So a batch is a pure
function of its number: a resume needs that number and nothing else, and a teacher can be asked about a view beforehand.

Axis letters: N = images of the set, n = of a batch, h w = pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from gkl_vl.data.labelled import LabelledSet
from gkl_vl.data.pairs import apply_seeded, number_of
from gkl_vl.errors import UserError

Ids = tuple[int, Int[Tensor, " n"]]
"""A view's number, and the numbers of images."""
PLAIN = -1
"""The view without augmentation."""


@runtime_checkable
class Views(Protocol):
    """Where views come from."""

    def batches(self, ids: Iterator[Ids]) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        """The views that are asked for, batch by batch."""
        ...

    def description(self) -> str:
        """All that decides what a view shows, beside the images."""
        ...


@dataclass(frozen=True, kw_only=True)
class MemoryViews:
    """The whole set in memory, cropped from zero-padded images and flipped, a batch at a time: CIFAR's augmentation."""

    images: UInt8[Tensor, "N 3 h w"]
    seed: int
    padding: int = 4

    def batches(self, ids: Iterator[Ids]) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        drawn = PLAIN
        shifts, flips = torch.empty(0), torch.empty(0)
        for view, index in ids:
            if view == PLAIN:
                yield self.images[index]
                continue
            if view != drawn:
                shifts, flips = self._draw(view)
                drawn = view
            yield self._crop(self.images[index], shifts[index], flips[index])

    def description(self) -> str:
        return f"crop with padding {self.padding}, flip, seed {self.seed}"

    def _draw(self, view: int) -> tuple[Int[Tensor, "N 2"], Tensor]:
        """Of every image in a view: the crop's corner, and whether it is flipped."""
        generator = torch.Generator().manual_seed(number_of(f"view {view} of seed {self.seed}"))
        shifts = torch.randint(0, 2 * self.padding + 1, (len(self.images), 2), generator=generator)
        return shifts, torch.rand(len(self.images), generator=generator) < 0.5

    def _crop(
        self, images: UInt8[Tensor, "n 3 h w"], shifts: Int[Tensor, "n 2"], flips: Tensor
    ) -> UInt8[Tensor, "n 3 h w"]:
        n, _, h, w = images.shape
        padded = F.pad(images, (self.padding,) * 4)
        rows = shifts[:, :1] + torch.arange(h)
        columns = torch.arange(w).expand(n, w)
        columns = shifts[:, 1:] + torch.where(flips[:, None], columns.flip(1), columns)
        pixels = padded.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return pixels.permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class DiskViews:
    """Images read and augmented one by one, in worker processes."""

    data: LabelledSet
    augment: Callable[[Image.Image], Tensor]
    """PIL image -> uint8 view, drawing from torch's generator."""
    plain: Callable[[Image.Image], Tensor]
    """For `PLAIN`: the evaluation transform."""
    seed: int
    num_workers: int
    pin_memory: bool = False

    def batches(self, ids: Iterator[Ids]) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        numbers = ([(view, int(i)) for i in index] for view, index in ids)
        loader = DataLoader(
            _Images(self),
            batch_sampler=_Endless(numbers),
            collate_fn=_stacked,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # a DataLoader draws a seed, which must not move training's
        )
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch

    def description(self) -> str:
        return f"{describe(self.augment)} {describe(self.plain)}, seed {self.seed}"


def describe(transform: Any) -> str:
    """All settings of a torchvision transform, which its repr does not show: RandomApply's leaves `p` out."""
    if isinstance(transform, list | tuple):
        return f"[{', '.join(map(describe, transform))}]"
    if not isinstance(transform, nn.Module):
        return repr(transform)
    settings = {name: value for name, value in vars(transform).items() if not name.startswith("_")}
    told = ", ".join(f"{name}={describe(value)}" for name, value in sorted(settings.items()))
    return f"{type(transform).__qualname__}({told})"


@dataclass(frozen=True)
class _Endless:
    """What a DataLoader takes for a batch sampler, of a stream without length."""

    numbers: Iterator[list[tuple[int, int]]]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.numbers


class _Images(Dataset):
    def __init__(self, views: DiskViews):
        self.views = views

    def __getitem__(self, number: tuple[int, int]) -> UInt8[Tensor, "3 h w"] | str:
        (view, index), views = number, self.views
        try:
            image = views.data.read(index)
        except UserError as error:  # as data: from a worker, torch would raise it with a traceback in its text
            return str(error)
        if view == PLAIN:
            return views.plain(image)
        return apply_seeded(views.augment, image, number_of(f"view {view} of {index}, seed {views.seed}"))


def _stacked(images: list[Tensor | str]) -> Tensor | str:
    """A batch, or the first message of what went wrong."""
    faults = [image for image in images if isinstance(image, str)]
    return faults[0] if faults else torch.stack([image for image in images if isinstance(image, Tensor)])


def imagenet_augmentation(size: int) -> Callable[[Image.Image], Tensor]:
    """A random part of 8 to 100 % of the area, flipped half the time: the classical training augmentation."""
    return v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])


def imagenet_center(size: int) -> Callable[[Image.Image], Tensor]:
    """The evaluation transform: the shorter side to size / 0.875, then the centre."""
    return v2.Compose([v2.PILToTensor(), v2.Resize(round(size / 0.875), antialias=True), v2.CenterCrop(size)])


class LabelledLoader:
    """Endless batches of a rank for `engine.fit`: views, labels, and the numbers that they go by.

    A batch is {"image", "label", "index", "view", "epoch", "keys"}. All ranks draw from one order, each every
    world_size-th batch; what is left at the end of an epoch is dropped, another part each time.

    Args:
        num_views: views that the epochs take turns in; None = a new one each epoch.
        position: of a checkpoint; None = the start.

    Raises: UserError when an epoch is smaller than a batch of all ranks.
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
    ):
        self.views, self.labels, self.batch_size, self.seed = views, labels, batch_size, seed
        self.rank, self.world_size, self.num_views = rank, world_size, num_views
        self.batches_per_epoch = batches_per_epoch(len(labels), batch_size, world_size)
        self.taken = 0 if position is None else position["batches"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        asked: list[tuple[int, int, Tensor]] = []  # a DataLoader asks ahead of what it gives

        def ids() -> Iterator[Ids]:
            for epoch, index in self._numbers(self.taken):
                view = epoch if self.num_views is None else epoch % self.num_views
                asked.append((epoch, view, index))
                yield view, index

        for images in self.views.batches(ids()):
            epoch, view, index = asked.pop(0)
            self.taken += 1
            keys = [str(i) for i in index.tolist()]
            label = self.labels[index]
            yield {"image": images, "label": label, "index": index, "view": view, "epoch": epoch, "keys": keys}

    def _numbers(self, first: int) -> Iterator[tuple[int, Int[Tensor, " n"]]]:
        number, drawn, order = first, -1, torch.empty(0, dtype=torch.long)
        while True:
            epoch, batch = divmod(number, self.batches_per_epoch)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(number_of(f"epoch {epoch} of seed {self.seed}"))
                order, drawn = torch.randperm(len(self.labels), generator=generator), epoch
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield epoch, order[start : start + self.batch_size]
            number += 1

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
