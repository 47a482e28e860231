"""Optimizers and learning rates, for `engine.fit`: what is updated how, and by how much at which step."""

import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage] # it is documented
from torch import nn


def adamw(
    model: nn.Module, *, lr: float, wd: float, beta1: float = 0.9, beta2: float = 0.98, eps: float = 1e-6
) -> torch.optim.AdamW:
    """AdamW as open_clip has it: parameters with two or more axes decay, biases, norms and the scale do not."""
    return torch.optim.AdamW(parameter_groups(model, wd), lr=lr, betas=(beta1, beta2), eps=eps)


def layered_adamw(model: nn.Module, *, lr: float, wd: float, layer_decay: float) -> torch.optim.AdamW:
    """AdamW, torch's betas, to fine-tune: the rate falls by `layer_decay` from the head to each layer below it.

    Each group's `lr_scale` multiplies the rate that `engine.fit` sets. Layers are timm's; biases, norms and a ViT's
    class token and positions do not decay. Source: Bao et al., arXiv 2106.08254 (BEiT), as in USB.
    """
    apart = model.no_weight_decay() if isinstance(model, VisionTransformer) else ()
    groups = param_groups_layer_decay(model, wd, no_weight_decay_list=list(apart), layer_decay=layer_decay)
    return torch.optim.AdamW(groups, lr=lr)


def sgd(
    model: nn.Module,
    *,
    lr: float,
    wd: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    norms_decay: bool = True,
) -> torch.optim.SGD:
    """SGD. By default everything decays, as in the distillation literature; else as in `adamw`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = trained if norms_decay else parameter_groups(model, wd)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=wd, nesterov=nesterov)


def parameter_groups(model: nn.Module, wd: float) -> list[dict[str, Any]]:
    """Two groups: what decays, and what has fewer than two axes (biases, norms, the scale) and does not."""
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


def warmup_fixmatch(step: int, *, lr: float, steps: int, warmup_steps: int) -> float:
    """Linear warm-up from 0, then 7/16 of a cosine's half, which ends at a fifth of it: FixMatch's schedule."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    return lr * math.cos(7 / 16 * math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1))


def multi_step(step: int, *, lr: float, milestones: tuple[int, ...]) -> float:
    """A tenth of it from each milestone on, in updates."""
    return lr * 0.1 ** sum(step >= milestone for milestone in milestones)
