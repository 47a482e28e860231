"""Freezing, and temporary evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gkl_vl.models.clip import Clip


def freeze(clip: Clip) -> Clip:
    """Freezes the model in place: no gradients, evaluation mode. Returns it."""
    clip.towers.requires_grad_(False).eval()
    return clip


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: evaluation mode inside the block; restores the mode of every module afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
