"""Optimizers and learning rates, for `engine.fit`: what is updated how, and by how much at which step."""

import math
from typing import Any

import torch
from torch import nn


def adamw(
    model: nn.Module, *, lr: float, wd: float, beta1: float = 0.9, beta2: float = 0.98, eps: float = 1e-6
) -> torch.optim.AdamW:
    """AdamW as open_clip has it: parameters with two or more axes decay, biases, norms and the scale do not."""
    return torch.optim.AdamW(parameter_groups(model, wd), lr=lr, betas=(beta1, beta2), eps=eps)


def sgd(model: nn.Module, *, lr: float, wd: float, momentum: float = 0.9, nesterov: bool = False) -> torch.optim.SGD:
    """SGD as the distillation literature has it: everything decays."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=wd, nesterov=nesterov)


def parameter_groups(model: nn.Module, wd: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: what decays, and what has fewer than two axes (biases, norms, the scale) and does not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": wd},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


# Pure functions of the number of updates made, so there is nothing to save.


def warmup_cosine(step: int, *, lr: float, steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def multi_step(step: int, *, lr: float, milestones: tuple[int, ...]) -> float:
    """A tenth of it from each milestone on, in updates."""
    return lr * 0.1 ** sum(step >= milestone for milestone in milestones)
