"""Projected gradient ascent (PGD) on images, adversarial perturbation of weights, and the radius of an attack.

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

USUAL_CLIP_EPSILON: dict[Norm, str] = {"linf": "4/255", "l2": "0.5"}
"""Usual radii for CLIPs: linf as in Schlarmann et al., ICML 2024; l2 as in RobustBench for CIFAR-10."""


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
    """Computes adversarial images by projected gradient ascent on `loss(model(images))`.

        x <- clamp(project(x + step_size * direction(grad_x loss), ball(images, epsilon)), 0, 1)

    with direction = sign (linf) or g / ||g|| per image (l2). The model runs in evaluation mode; its mode is restored,
    and its gradients and buffers do not change.

    Args:
        model: takes images in [0, 1] and normalises them itself. Not DistributedDataParallel, which would wait for the
            parameters' gradients: pass the wrapped module.
        images: in [0, 1]. The result is in [0, 1] as well and differs by at most `epsilon`, to the last bit.
        loss: function of the model's output, a sum or mean over images.
        epsilon, step_size: in pixel values of [0, 1] (8/255); for l2 the norm of the perturbation of an image.
        start: gaussian = images + 0.001 N(0, 1), as in TRADES and its successors; uniform = random in the ball (l2:
            uniform length, random direction); none = the images.
        generator: generator of the start.

    Raises: ValueError for images outside of [0, 1], steps < 0, epsilon or step_size < 0.

    Source: Madry et al., ICLR 2018, arXiv 1706.06083; gaussian start: Zhang et al., ICML 2019.
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
                (gradient,) = torch.autograd.grad(loss(model(attacked)), attacked)  # for the images only
            step = gradient.sign_() if norm == "linf" else gradient / _length(gradient).clamp_min(_tiny(gradient))
            attacked = project(attacked.detach().add(step, alpha=step_size))
    return attacked.detach()


def _projection(images: Images, epsilon: float, norm: Norm) -> Callable[[Images], Images]:
    """Returns the projection onto the ball around the images and then onto [0, 1], which keeps points in the ball."""
    if norm == "linf":
        edges = (images - epsilon).clamp_min(0), (images + epsilon).clamp_max(1)
        # images +- epsilon is rounded, by at most one unit in the last place
        low, high = (torch.where((e - images).abs() > epsilon, torch.nextafter(e, images), e) for e in edges)
        return partial(torch.clamp, min=low, max=high)

    def nearest(moved: Images) -> Images:
        difference = moved - images
        length = _length(difference)
        # slightly below epsilon, because the addition to the images rounds each pixel
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
    """Adversarial weight perturbation: within the context each weight tensor is moved one step up the loss.

        w <- w + gamma ||w|| g / ||g||,   g = the gradient of `loss()` to w

    for tensors with two or more axes, as in the released code; g is averaged over processes, so that all apply the
    same perturbation. The backward pass of the training step belongs inside the context, the optimizer step after it:
    on exit the weights are restored bit for bit.

    Args:
        loss: runs the model and returns the loss to maximise. The caller sets the model's mode; buffers, such as
            BatchNorm statistics, are restored after it.

    Source: Wu et al., NeurIPS 2020, arXiv 2004.05884, `utils_awp.py`: one ascent step of a copy. The normalisation
    removes the length of that step, so the gradient suffices.
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


def radius(text: str, norm: Norm) -> float:
    """Parses a radius, as "8/255" or "0.03".

    Raises: UserError for text that is not a number, and for values not above 0, or above 1 for linf.
    """
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / (float(denominator) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"an epsilon of {text!r} is no number: write 8/255 or 0.03") from None
    if not 0 < value < (math.inf if norm == "l2" else 1 + 1e-9):
        raise UserError(f"an epsilon of {text} is no radius in {norm} for pixels in [0, 1]: write 8/255 or 0.03")
    return value
