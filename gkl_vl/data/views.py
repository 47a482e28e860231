"""Augmented views of labelled images, and the batches that a training run makes of them.

View v of image i is drawn by (seed, v, i) alone, and the order of an epoch by (seed, epoch). So a batch is a pure
function of its number: a resume needs that number and nothing else, and a teacher can be asked about a view beforehand.

Synthesized images are numbered on behind the set's own: 0 to N - 1 are original, N to N + M - 1 synthesized.

Axis letters: N = images of the set, M = synthesized ones, n = of a batch, h w = pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from gkl_vl.data.pairs import apply_seeded, number_of
from gkl_vl.data.synthesized import Synthesized, synthesized_per_batch
from gkl_vl.errors import UserError
from gkl_vl.gkl import Number

Ids = tuple[int, Int[Tensor, " n"]]
"""A view's number, and the numbers of images."""
PLAIN = -1
"""The view without augmentation."""
_USB_GREY = (125, 123, 114)


@runtime_checkable
class Views(Protocol):
    """Where views come from."""

    def batches(self, ids: Iterator[Ids]) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        """The views that are asked for, batch by batch."""
        ...

    def description(self) -> str:
        """All that decides what a view shows, beside the images."""
        ...


@runtime_checkable
class Images(Protocol):
    """Where images come from, by number: a `LabelledSet`, or one `WithSynthesized`."""

    def read(self, index: int, /) -> Image.Image:
        """Decoded, RGB; it goes to worker processes. Raises: UserError for one that cannot be decoded."""
        ...


@dataclass(frozen=True, kw_only=True)
class MemoryViews:
    """The whole set in memory, cropped from padded images and flipped, a batch at a time: CIFAR's augmentation."""

    images: UInt8[Tensor, "N 3 h w"]
    seed: int
    padding: int = 4
    reflect: bool = False
    """Pad with what lies inside the border, mirrored, instead of zeros."""
    upside_down: bool = False
    """Flip vertically too: pictures from above."""

    def batches(self, ids: Iterator[Ids]) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        drawn = PLAIN
        shifts, flips, turned = torch.empty(0), torch.empty(0), torch.empty(0)
        for view, index in ids:
            if view == PLAIN:
                yield self.images[index]
                continue
            if view != drawn:
                shifts, flips, turned = self._draw(view)
                drawn = view
            images = cropped(self.images[index], shifts[index], flips[index], self.padding, reflect=self.reflect)
            if self.upside_down:
                images = torch.where(turned[index][:, None, None, None], images.flip(2), images)
            yield images

    def description(self) -> str:
        more = (", reflected" if self.reflect else "") + (", upside down" if self.upside_down else "")
        return f"crop with padding {self.padding}, flip{more}, seed {self.seed}"

    def _draw(self, view: int) -> tuple[Int[Tensor, "N 2"], Bool[Tensor, " N"], Bool[Tensor, " N"]]:
        """Of every image in a view: the crop's corner, whether it is flipped, and whether it is upside down."""
        generator = torch.Generator().manual_seed(number_of(f"view {view} of seed {self.seed}"))
        shifts = torch.randint(0, 2 * self.padding + 1, (len(self.images), 2), generator=generator)
        flips, turned = (torch.rand(len(self.images), generator=generator) < 0.5 for _ in range(2))
        return shifts, flips, turned


@dataclass(frozen=True, kw_only=True)
class MixedViews:
    """Images in memory and, numbered on behind them, synthesized ones on disk, all cropped and flipped.

    What is done to a synthesized image is read off a digest of (seed, view, image): no numbers are drawn for all M.

    Raises: UserError when the two differ in size.
    """

    original: MemoryViews
    synthesized: Synthesized

    def __post_init__(self) -> None:
        (h, w), (other_h, other_w) = self.original.images.shape[2:], self.synthesized.images.shape[1:3]
        if (h, w) != (other_h, other_w):
            raise UserError(
                f"{self.synthesized.name} has images of {other_w}x{other_h}, the data of {w}x{h}: name synthesized "
                "images of that size"
            )

    def batches(self, ids: Iterator[Ids]) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        own = len(self.original.images)
        asked: list[Ids] = []

        def originals() -> Iterator[Ids]:
            for view, index in ids:
                asked.append((view, index))
                yield view, index[index < own]

        for pixels in self.original.batches(originals()):
            view, index = asked.pop(0)
            images = pixels.new_empty(len(index), *pixels.shape[1:])
            images[index < own] = pixels
            images[index >= own] = self._synthesized(view, index[index >= own] - own)
            yield images

    def description(self) -> str:
        return f"{self.original.description()}, and of {self.synthesized.name}"

    def _synthesized(self, view: int, index: Int[Tensor, " n"]) -> UInt8[Tensor, "n 3 h w"]:
        images = self.synthesized.pixels(index)
        if view == PLAIN:
            return images
        corners, seed = 2 * self.original.padding + 1, self.original.seed
        texts = (f"view {view} of synthesized {i}, seed {seed}" for i in index.tolist())
        digests = torch.tensor([number_of(text) for text in texts], dtype=torch.long)
        shifts = torch.stack([digests % corners, digests // corners % corners], dim=1)
        return cropped(images, shifts, digests // corners**2 % 2 == 1, self.original.padding)


def cropped(
    images: UInt8[Tensor, "n 3 h w"],
    shifts: Int[Tensor, "n 2"],
    flips: Bool[Tensor, " n"],
    padding: int,
    *,
    reflect: bool = False,
) -> UInt8[Tensor, "n 3 h w"]:
    """Parts of the padded images, as large as these, from the given corners, and some of them flipped."""
    n, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4, mode="reflect" if reflect else "constant")
    rows = shifts[:, :1] + torch.arange(h)
    columns = torch.arange(w).expand(n, w)
    columns = shifts[:, 1:] + torch.where(flips[:, None], columns.flip(1), columns)
    pixels = padded.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class MemoryImages:
    """Images in memory, for transforms that want them one by one."""

    images: UInt8[Tensor, "N 3 h w"]

    def read(self, index: int, /) -> Image.Image:
        return to_pil_image(self.images[index])


@dataclass(frozen=True, kw_only=True)
class DiskViews:
    """Images augmented one by one, in worker processes, which read them from disk if they are there."""

    data: Images
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


def cifar_autoaugment(size: int, *, cutout: int) -> Callable[[Image.Image], Tensor]:
    """Crop with padding 4, flip, AutoAugment's CIFAR-10 policy on grey, then a square of `cutout` pixels off, 0 = none.

    Source: Cubuk et al. 2019. The port that DAJAT took (DeepVoltaire/AutoAugment) shears bicubically, and rotates one
    way only; this is torchvision's.
    """
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=128)
    drawn = [v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip(), policy, v2.PILToTensor()]
    return v2.Compose([*drawn, Cutout(cutout)] if cutout else drawn)


def cifar_cutout(size: int) -> Callable[[Image.Image], Tensor]:
    """Crop with padding 4, flip, and a square of half the size off."""
    return v2.Compose([v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip(), v2.PILToTensor(), Cutout(size // 2)])


def randaugment_cutout(size: int, *, upside_down: bool) -> Callable[[Image.Image], Tensor]:
    """The strong view of FixMatch as USB has it: crop, flip, three operations of random strength, a grey square.

    Each operation is one of RandAugment's, at one of its 31 strengths, drawn uniformly; the square is 0 to half the
    image wide. They are torchvision's operations, which shift by up to 45 % where USB's shift by 30 %, and brighten
    and saturate where USB's only darken and fade.

    Source: Cubuk et al., arXiv 1909.13719; USB, `semilearn/datasets/augmentation/randaugment.py`.
    """
    operation = v2.RandomChoice([v2.RandAugment(num_ops=1, magnitude=strength) for strength in range(31)])
    square = v2.RandomChoice([Cutout(width, fill=_USB_GREY) for width in range(size // 2 + 1)])
    flips = [v2.RandomHorizontalFlip(), *([v2.RandomVerticalFlip()] if upside_down else [])]
    crop = v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")
    return v2.Compose([crop, *flips, operation, operation, operation, v2.PILToTensor(), square])


class Cutout(nn.Module):
    """A square of one colour, `size` pixels wide; its centre is anywhere, and what lies beyond the border is cut off.

    Source: DeVries and Taylor 2017, `Cutout/util/cutout.py`. RandomErasing keeps its square within the image.
    """

    def __init__(self, size: int, *, fill: tuple[int, int, int] = (0, 0, 0)):
        super().__init__()
        self.size, self.fill = size, fill

    def forward(self, image: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 h w"]:
        _, h, w = image.shape
        top, left = (int(torch.randint(length, ())) - self.size // 2 for length in (h, w))
        image = image.clone()
        square = image[:, max(top, 0) : top + self.size, max(left, 0) : left + self.size]
        square[:] = torch.tensor(self.fill, dtype=torch.uint8)[:, None, None]
        return image


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
        fraction: Number = 0.7,
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
                generator = torch.Generator().manual_seed(number_of(f"epoch {passed} of seed {self.seed}"))
                order, drawn = torch.randperm(len(self.labels), generator=generator), passed
            start = (batch * self.world_size + self.rank) * self.num_original
            index = torch.cat([order[start : start + self.num_original], self._drawn_synthesized(number)])
            view = passed if self.num_views is None else passed % self.num_views
            yield number // self.batches_per_epoch, view, index

    def _drawn_synthesized(self, number: int) -> Int[Tensor, " n"]:
        """This rank's part of those that are drawn for all ranks' batches of this number."""
        if self.synthesized is None:
            return torch.empty(0, dtype=torch.long)
        generator = torch.Generator().manual_seed(number_of(f"synthesized of batch {number}, seed {self.seed}"))
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
