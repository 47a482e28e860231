"""Attacks for training and for quick looks: projected gradient ascent on images, and on weights.

Axis letters: n = images, C = classes, h w = pixels.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gkl_vl.distributed import sum_across_processes, world_size
from gkl_vl.errors import UserError
from gkl_vl.models.modes import evaluating

Norm = Literal["linf", "l2"]
Start = Literal["gaussian", "uniform", "none"]
Images = Float[Tensor, "n 3 h w"]


def pgd(
    model: nn.Module,
    images: Float[Tensor, "n 3 h w"],
    *,
    loss: Callable[[Tensor], Tensor],
    epsilon: float,
    step_size: float,
    steps: int,
    norm: Norm = "linf",
    start: Start = "gaussian",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n 3 h w"]:
    """Images within `epsilon` of these that make `loss(model(images))` large: projected gradient ascent.

        x <- clamp(project(x + step_size * direction(grad_x loss), ball(images, epsilon)), 0, 1)

    with direction = sign (linf) or g / ||g|| per image (l2). The model is in evaluation mode meanwhile; its mode, its
    gradients and its buffers are afterwards what they were.

    Args:
        model: takes images in [0, 1] and normalises them itself. Not DistributedDataParallel, which would wait for the
            parameters' gradients: pass what it wraps.
        images: in [0, 1]. What comes back is too, and differs by at most `epsilon` to the last bit.
        loss: of the model's output, a sum or mean over images.
        epsilon, step_size: in units of pixels of [0, 1] (8/255), for l2 the length of an image's difference.
        start: gaussian = 0.001 N(0, 1), as TRADES and its successors have it; uniform = anywhere in the ball (l2: at a
            random length in a random direction); none = at the images.
        generator: of the start.

    Raises: ValueError for images outside of [0, 1], steps < 0, epsilon or step_size < 0.

    Source: Madry et al., ICLR 2018, arXiv 1706.06083; the gaussian start is that of Zhang et al., ICML 2019.
    """
    if images.min() < 0 or images.max() > 1:
        raise ValueError(f"images must lie in [0, 1], got {images.min().item():g} to {images.max().item():g}")
    for name, value in (("epsilon", epsilon), ("step_size", step_size), ("steps", steps)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    images = images.detach()
    with evaluating(model):
        project = _projection(images, epsilon, norm)
        attacked = project(images + _noise(images, epsilon, norm, start, generator))
        for _ in range(steps):
            attacked.requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(model(attacked)), attacked)  # of nothing but the images
            step = gradient.sign_() if norm == "linf" else gradient / _length(gradient).clamp_min(_tiny(gradient))
            attacked = project(attacked.detach().add(step, alpha=step_size))
    return attacked.detach()


def radius(text: str, norm: Norm) -> float:
    """ "8/255" or "0.03" as a number.

    Raises: UserError for what is none, or no radius: not above 0, for linf above 1.
    """
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"an epsilon of {text!r} is no number: write 8/255 or 0.03") from None
    if not 0 < value < (math.inf if norm == "l2" else 1 + 1e-9):
        raise UserError(f"an epsilon of {text} is no radius in {norm} for pixels in [0, 1]: write 8/255 or 0.03")
    return value


def _projection(images: Images, epsilon: float, norm: Norm) -> Callable[[Images], Images]:
    """To the nearest point within `epsilon` of the images, then to the nearest in [0, 1], which is nearer still."""
    if norm == "linf":
        edges = (images - epsilon).clamp_min(0), (images + epsilon).clamp_max(1)
        # images + epsilon is rounded, by at most a unit in the last place
        low, high = (torch.where((e - images).abs() > epsilon, torch.nextafter(e, images), e) for e in edges)
        return partial(torch.clamp, min=low, max=high)

    def nearest(moved: Images) -> Images:
        difference = moved - images
        length = _length(difference)
        # a little shorter than epsilon: adding to the images rounds each pixel
        rounding = torch.finfo(images.dtype).eps * images[0].numel() ** 0.5
        longest = max((1 - 1e-6) * epsilon - rounding, 0.0)
        scale = torch.where(length > longest, longest / length.clamp_min(_tiny(length)), 1.0)
        return (images + scale * difference).clamp(0, 1)

    return nearest


def _noise(images: Images, epsilon: float, norm: Norm, start: Start, generator: torch.Generator | None) -> Tensor:
    if start == "none":
        return torch.zeros_like(images)
    options = {"generator": generator, "device": images.device, "dtype": images.dtype}
    if start == "gaussian":
        return 0.001 * torch.randn(images.shape, **options)
    if norm == "linf":
        return epsilon * (2 * torch.rand(images.shape, **options) - 1)
    direction = torch.randn(images.shape, **options)
    return epsilon * torch.rand(len(images), 1, 1, 1, **options) * direction / _length(direction)


def _length(x: Images) -> Float[Tensor, "n 1 1 1"]:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


@contextmanager
def weights_perturbed(model: nn.Module, *, loss: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """Adversarial weight perturbation: for a while, each weight tensor is moved to where the loss is larger.

        w <- w + gamma ||w|| g / ||g||,   g = the gradient of `loss()` to w

    for tensors with two or more axes, as released; g is averaged over processes, so that all move alike. Take the
    training step's backward pass within, the optimizer's step after: the weights are then what they were, to the bit.

    Args:
        loss: a forward pass of the model and the loss that is to be raised. Its mode is the caller's; what BatchNorm
            learns in it is forgotten.

    Source: Wu et al., NeurIPS 2020, arXiv 2004.05884, `utils_awp.py`: one ascent step of a copy, whose length is lost
    in the normalisation, so that a gradient is all that it needs.
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                mean = sum_across_processes(gradient) / world_size()  # all ranks
                weight.add_(mean, alpha=(gamma * weight.norm() / (mean.norm() + 1e-20)).item())
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


USUAL_CLIP_EPSILON: dict[Norm, str] = {"linf": "4/255", "l2": "0.5"}
"""As in the work on robust CLIPs (Schlarmann et al., ICML 2024), and RobustBench's for CIFAR-10."""
