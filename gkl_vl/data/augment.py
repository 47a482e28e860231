"""Augmentations: functions of a PIL image that return a uint8 tensor [3, h, w]; and crops of a batch of tensors.

Those of CLIP draw the same numbers at every size of the view, so that a view whose teacher embedding is stored can be
drawn again at the student's size (`view_seed`, `draws`).

Axis letters: n = images of a batch, h w = pixels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from gkl_vl.data.files import stable_hash

Augmentation = Callable[[int], Callable[[Image.Image], Tensor]]
"""Side of the view -> function of a PIL image, as `light_augmentation`."""
DESCRIBED_SIZE, DRAWN_SIZE, DRAWN_VIEWS = 64, 16, 24

_USB_GREY = (125, 123, 114)
"""Fill colour of USB's Cutout."""


def light_augmentation(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """open_clip's default: a random crop of 90 to 100 % of the area, resized. PIL -> uint8 [3, size, size]."""
    crop = v2.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.PILToTensor()])


def drawing_augmentation(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """For training from scratch on the bundled emoji, as for their teacher. PIL -> uint8 [3, size, size]."""
    return _drawing_views(
        size, turn=15.0, shift=0.08, zoom=(0.75, 1.15), shear=10.0, crop=(0.6, 1.0), ratio=(0.8, 1.25),
        colour=(0.5, 0.5, 0.6, 0.08), colour_p=0.8, grey_p=0.2, erase_p=0.3,
    )  # fmt: skip


def mild_drawing_augmentation(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """For distillation on the bundled emoji: a small student in a short run, with the teacher's output on each view.

    Variations of twice this strength cost 4 points of top-1 (recipes/README.md). PIL -> uint8 [3, size, size].
    """
    return _drawing_views(
        size, turn=4.0, shift=0.03, zoom=(0.92, 1.05), shear=2.5, crop=(0.9, 1.0), ratio=(0.95, 1.05),
        colour=(0.2, 0.2, 0.25, 0.03), colour_p=0.5, grey_p=0.0, erase_p=0.0,
    )  # fmt: skip


def _drawing_views(
    size: int,
    *,
    turn: float,
    shift: float,
    zoom: tuple[float, float],
    shear: float,
    crop: tuple[float, float],
    ratio: tuple[float, float],
    colour: tuple[float, float, float, float],
    colour_p: float,
    grey_p: float,
    erase_p: float,
) -> Callable[[Image.Image], torch.Tensor]:
    """Variations between two drawings of one thing. No horizontal flip, because it changes meanings."""
    bilinear = v2.InterpolationMode.BILINEAR
    return v2.Compose(
        [
            v2.RandomAffine(
                [-turn, turn], translate=(shift, shift), scale=zoom, shear=shear, fill=255, interpolation=bilinear
            ),
            v2.RandomResizedCrop(size, scale=crop, ratio=ratio, interpolation=bilinear),
            v2.RandomApply([v2.ColorJitter(*colour)], p=colour_p),
            v2.RandomGrayscale(grey_p),
            v2.PILToTensor(),
            Erasing(erase_p, scale=(0.02, 0.2), ratio=(0.3, 3.3), value=255),
        ]
    )


def imagenet_augmentation(size: int) -> Callable[[Image.Image], Tensor]:
    """The standard training augmentation: a random crop of 8 to 100 % of the area, flipped half the time."""
    return v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])


def imagenet_center(size: int) -> Callable[[Image.Image], Tensor]:
    """The evaluation transform: resizes the shorter side to size / 0.875, then crops the centre."""
    return v2.Compose([v2.PILToTensor(), v2.Resize(round(size / 0.875), antialias=True), v2.CenterCrop(size)])


def cifar_autoaugment(size: int, *, cutout: int) -> Callable[[Image.Image], Tensor]:
    """Crop with padding 4, flip, AutoAugment's CIFAR-10 policy on grey, then `Cutout` of `cutout` pixels, 0 = none.

    Source: Cubuk et al. 2019. This is torchvision's implementation; the port that DAJAT uses
    (DeepVoltaire/AutoAugment) shears bicubically and rotates in one direction only.
    """
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=128)
    steps = [v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip(), policy, v2.PILToTensor()]
    return v2.Compose([*steps, Cutout(cutout)] if cutout else steps)


def cifar_cutout(size: int) -> Callable[[Image.Image], Tensor]:
    """Crop with padding 4, flip, and `Cutout` of half the size."""
    return v2.Compose([v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip(), v2.PILToTensor(), Cutout(size // 2)])


def randaugment_cutout(size: int, *, upside_down: bool) -> Callable[[Image.Image], Tensor]:
    """FixMatch's strong augmentation as in USB: crop, flip, three operations of random strength, a grey square.

    Each operation is one of RandAugment's, at one of its 31 strengths, drawn uniformly; the square is 0 to half the
    image wide. The operations are torchvision's: they translate by up to 45 % (USB's by 30 %), and brighten and
    saturate as well (USB's only darken and desaturate).

    `upside_down` adds vertical flips.

    Source: Cubuk et al., arXiv 1909.13719; USB, `semilearn/datasets/augmentation/randaugment.py`.
    """
    operation = v2.RandomChoice([v2.RandAugment(num_ops=1, magnitude=strength) for strength in range(31)])
    square = v2.RandomChoice([Cutout(width, fill=_USB_GREY) for width in range(size // 2 + 1)])
    flips = [v2.RandomHorizontalFlip(), *([v2.RandomVerticalFlip()] if upside_down else [])]
    crop = v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")
    return v2.Compose([crop, *flips, operation, operation, operation, v2.PILToTensor(), square])


class Cutout(nn.Module):
    """Fills a square of `size` pixels with one colour; its centre is any pixel, so the border may clip it.

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


class Erasing(nn.Module):
    """Fills a rectangle with one value, with probability p: its share of the area and its aspect ratio are drawn.

    RandomErasing's distribution, with all draws relative to the side of the view: the same rectangle at every size.

    Args:
        scale, ratio: bounds of the share of the area and of height / width, the latter uniform in its logarithm.

    Source: Zhong et al., AAAI 2020, arXiv 1708.04896.
    """

    def __init__(self, p: float, *, scale: tuple[float, float], ratio: tuple[float, float], value: int):
        super().__init__()
        self.p, self.scale, self.ratio, self.value = p, scale, ratio, value

    def forward(self, image: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 h w"]:
        if torch.rand(()) >= self.p:
            return image
        for _ in range(10):
            area, log_ratio, top, left = torch.rand(4, dtype=torch.float64).tolist()
            area = self.scale[0] + area * (self.scale[1] - self.scale[0])
            ratio = self.ratio[0] * (self.ratio[1] / self.ratio[0]) ** log_ratio
            height, width = (area * ratio) ** 0.5, (area / ratio) ** 0.5
            if height < 1 and width < 1:
                return self._filled(image, top * (1 - height), left * (1 - width), height, width)
        return image

    def _filled(self, image: Tensor, top: float, left: float, height: float, width: float) -> Tensor:
        _, h, w = image.shape
        image = image.clone()
        image[:, round(top * h) : round((top + height) * h), round(left * w) : round((left + width) * w)] = self.value
        return image


# ---- seeded views ------------------------------------------------------------------------------------------------


def view_seed(key: str, view: int) -> int:
    """Seed of a numbered view of the image with this key, for `apply_seeded`; the same in every run."""
    return stable_hash(f"view {view} of {key}")


def settings_of(augmentation: Augmentation) -> str:
    """All settings of an augmentation, at one size."""
    return describe(augmentation(DESCRIBED_SIZE))


def draws(augmentation: Augmentation) -> list[str]:
    """Small views of a test picture, as hexadecimal bytes: they change where the same seeds give other views."""
    y, x = np.mgrid[:48, :60]
    picture = Image.fromarray(np.stack([4 * x, 5 * y, 255 * ((x // 6 + y // 6) % 2)], axis=2).astype(np.uint8))
    augment = augmentation(DRAWN_SIZE)
    views = [apply_seeded(augment, picture, view_seed("draws", view)) for view in range(DRAWN_VIEWS)]
    return [view.numpy().tobytes().hex() for view in views]


def apply_seeded(augment: Callable[[Image.Image], torch.Tensor], image: Image.Image, seed: int) -> torch.Tensor:
    """Applies the augmentation with random draws from `seed`. The state of the global generator is restored.

    Only the CPU's generator is seeded: torch.manual_seed and fork_rng handle every device, which takes 0.25 ms.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        return augment(image)
    finally:
        torch.default_generator.set_state(before)


def describe(transform: Any) -> str:
    """A text of all settings of a torchvision transform. Its repr is incomplete: RandomApply's lacks `p`."""
    if isinstance(transform, list | tuple):
        return f"[{', '.join(map(describe, transform))}]"
    if not isinstance(transform, nn.Module):
        return repr(transform)
    settings = {name: value for name, value in vars(transform).items() if not name.startswith("_")}
    arguments = ", ".join(f"{name}={describe(value)}" for name, value in sorted(settings.items()))
    return f"{type(transform).__qualname__}({arguments})"


def cropped(
    images: UInt8[Tensor, "n 3 h w"],
    shifts: Int[Tensor, "n 2"],
    flips: Bool[Tensor, " n"],
    padding: int,
    *,
    reflect: bool = False,
) -> UInt8[Tensor, "n 3 h w"]:
    """Crops the padded images to their original size at the given corners, and flips the chosen ones horizontally."""
    n, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4, mode="reflect" if reflect else "constant")
    rows = shifts[:, :1] + torch.arange(h)
    columns = torch.arange(w).expand(n, w)
    columns = shifts[:, 1:] + torch.where(flips[:, None], columns.flip(1), columns)
    pixels = padded.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)
