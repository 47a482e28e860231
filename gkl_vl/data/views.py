"""Augmented views of labelled images, and the batches that a training run makes of them.

View v of image i is drawn by (seed, v, i) alone, and the order of an epoch by (seed, epoch). So a batch is a pure
function of its number: a resume needs that number and nothing else, and a teacher can be asked about a view beforehand.

Synthesized images are numbered on behind the set's own: 0 to N - 1 are original, N to N + M - 1 synthesized.

Axis letters: N = images of the set, M = synthesized ones, n = of a batch, h w = pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_pil_image

from gkl_vl.data.augment import apply_seeded, cropped, describe
from gkl_vl.data.files import stable_hash
from gkl_vl.data.synthesized import Synthesized
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
        generator = torch.Generator().manual_seed(stable_hash(f"view {view} of seed {self.seed}"))
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
        digests = torch.tensor([stable_hash(text) for text in texts], dtype=torch.long)
        shifts = torch.stack([digests % corners, digests // corners % corners], dim=1)
        return cropped(images, shifts, digests // corners**2 % 2 == 1, self.original.padding)


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
        return apply_seeded(views.augment, image, stable_hash(f"view {view} of {index}, seed {views.seed}"))


def _stacked(images: list[Tensor | str]) -> Tensor | str:
    """A batch, or the first message of what went wrong."""
    faults = [image for image in images if isinstance(image, str)]
    return faults[0] if faults else torch.stack([image for image in images if isinstance(image, Tensor)])
