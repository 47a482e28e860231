"""Training and evaluation modes of modules."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gkl_vl.models.clip import Clip


def freeze(clip: Clip) -> Clip:
    """The teacher is furniture: no gradient, evaluation mode."""
    clip.towers.requires_grad_(False).eval()
    return clip


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
