"""Augmented views of images, by number of the view and index of the image.

The random draws of view v of image i depend only on (seed, v, i). A resumed run therefore sees the same views, and a
teacher's outputs on a view can be computed beforehand.

Indices of synthesized images follow those of the set: 0 to N - 1 are original, N to N + M - 1 synthesized.

Axis letters: N = images of the set, M = synthesized images, n = images of a batch, h w = pixels.
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
from gkl_vl.data.workers import end_with_parent, worker_batches
from gkl_vl.errors import UserError

Ids = tuple[int, Int[Tensor, " n"]]
"""Number of a view, and indices of images."""
PLAIN = -1
"""Number of the view without augmentation."""


@runtime_checkable
class Views(Protocol):
    """A source of views."""

    def batches(self, ids: Iterator[Ids]) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        """Yields the requested views, one batch per element of `ids`. May consume `ids` ahead of what it yields."""
        ...

    def description(self) -> str:
        """Text of all settings that determine a view, except the images; part of cache keys."""
        ...


@runtime_checkable
class Images(Protocol):
    """A source of images by index: a `LabelledSet`, an `ImageSet`, `MemoryImages` or `WithSynthesized`."""

    def read(self, index: int, /) -> Image.Image:
        """Image by index, decoded to RGB; called in worker processes. Raises: UserError if it cannot be decoded."""
        ...


@dataclass(frozen=True, kw_only=True)
class MemoryViews:
    """Views of a set in memory, a batch at a time: random crops of the padded images, flipped; CIFAR's augmentation."""

    images: UInt8[Tensor, "N 3 h w"]
    seed: int
    padding: int = 4
    reflect: bool = False
    """Pads by reflection instead of with zeros."""
    upside_down: bool = False
    """Also flips vertically, for aerial images."""

    def batches(self, ids: Iterator[Ids]) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        drawn = PLAIN
        shifts, flips, vertical_flips = torch.empty(0), torch.empty(0), torch.empty(0)
        for view, index in ids:
            if view == PLAIN:
                yield self.images[index]
                continue
            if view != drawn:
                shifts, flips, vertical_flips = self._draw(view)
                drawn = view
            images = cropped(self.images[index], shifts[index], flips[index], self.padding, reflect=self.reflect)
            if self.upside_down:
                images = torch.where(vertical_flips[index][:, None, None, None], images.flip(2), images)
            yield images

    def description(self) -> str:
        more = (", reflected" if self.reflect else "") + (", upside down" if self.upside_down else "")
        return f"crop with padding {self.padding}, flip{more}, seed {self.seed}"

    def _draw(self, view: int) -> tuple[Int[Tensor, "N 2"], Bool[Tensor, " N"], Bool[Tensor, " N"]]:
        """For every image of a view: corner of the crop, flipped or not, flipped vertically or not."""
        generator = torch.Generator().manual_seed(stable_hash(f"view {view} of seed {self.seed}"))
        shifts = torch.randint(0, 2 * self.padding + 1, (len(self.images), 2), generator=generator)
        flips, vertical_flips = (torch.rand(len(self.images), generator=generator) < 0.5 for _ in range(2))
        return shifts, flips, vertical_flips


@dataclass(frozen=True, kw_only=True)
class MixedViews:
    """Views of images in memory and of synthesized images on disk, whose indices follow; all cropped and flipped.

    Crop and flip of a synthesized image are computed from a hash of (seed, view, image), so that a view needs no
    draws for all M images.

    Raises: UserError if the two differ in image size.
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
        num_original = len(self.original.images)
        pending: list[Ids] = []

        def originals() -> Iterator[Ids]:
            for view, index in ids:
                pending.append((view, index))
                yield view, index[index < num_original]

        for pixels in self.original.batches(originals()):
            view, index = pending.pop(0)
            images = pixels.new_empty(len(index), *pixels.shape[1:])
            images[index < num_original] = pixels
            images[index >= num_original] = self._synthesized(view, index[index >= num_original] - num_original)
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
    """Images in memory, read one by one as PIL images."""

    images: UInt8[Tensor, "N 3 h w"]

    def read(self, index: int, /) -> Image.Image:
        return to_pil_image(self.images[index])


@dataclass(frozen=True, kw_only=True)
class DiskViews:
    """Views of images augmented one by one in worker processes, which also read images that are on disk."""

    data: Images
    augment: Callable[[Image.Image], Tensor]
    """PIL image -> uint8 view; draws from torch's global generator."""
    plain: Callable[[Image.Image], Tensor]
    """PIL image -> the view `PLAIN`: the evaluation transform."""
    seed: int
    num_workers: int
    pin_memory: bool = False

    def batches(self, ids: Iterator[Ids]) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
        numbers = ([(view, int(i)) for i in index] for view, index in ids)
        loader = DataLoader(
            _ViewDataset(self),
            batch_sampler=_EndlessSampler(numbers),
            collate_fn=_stack,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=end_with_parent,
            generator=torch.Generator(),  # DataLoader draws a seed, which must not advance the global generator
        )
        for batch in worker_batches(loader):
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch

    def description(self) -> str:
        return f"{describe(self.augment)} {describe(self.plain)}, seed {self.seed}"


@dataclass(frozen=True)
class _EndlessSampler:
    """A batch sampler for DataLoader, without length."""

    numbers: Iterator[list[tuple[int, int]]]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.numbers


class _ViewDataset(Dataset):
    """(view, index) -> that view, or the message of the error that reading it raised."""

    def __init__(self, views: DiskViews):
        self.views = views

    def __getitem__(self, number: tuple[int, int]) -> UInt8[Tensor, "3 h w"] | str:
        (view, index), views = number, self.views
        try:
            image = views.data.read(index)
        except UserError as error:  # as data: raised in a worker, torch would add its traceback to the message
            return str(error)
        if view == PLAIN:
            return views.plain(image)
        return apply_seeded(views.augment, image, stable_hash(f"view {view} of {index}, seed {views.seed}"))


def _stack(images: list[Tensor | str]) -> Tensor | str:
    """The stacked batch, or the first error message in it."""
    errors = [image for image in images if isinstance(image, str)]
    return errors[0] if errors else torch.stack([image for image in images if isinstance(image, Tensor)])
