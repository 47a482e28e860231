"""Optimizers and learning-rate schedules for `engine.fit`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage] # it is documented
from torch import nn


def adamw(model: nn.Module, *, lr: float, wd: float) -> torch.optim.AdamW:
    """AdamW as in open_clip: parameters with two or more axes decay; biases, norms and the logit scale do not."""
    return _open_clip_adamw(parameter_groups(model.parameters(), wd), lr)


def clip_adamw(
    model: nn.Module,
    *,
    of_text: Sequence[nn.Parameter],
    lr: float,
    text_lr: float,
    wd: float,
    scales: Mapping[nn.Parameter, float] | None = None,
) -> torch.optim.AdamW:
    """`adamw` with a rate for the text tower; the image tower and the logit scale have `lr`.

    `lr_scale` of each group is relative to the larger rate, which `engine.fit` needs as its learning rate. Frozen
    parameters are in no group.

    Args:
        of_text: the text tower's part of the model, see `Student.text_parameters`.
        scales: factors of the rates of parameters, see `rate_scales`; 1 for all others.
    """
    peak = max(lr, text_lr)
    members, scales = set(of_text), {} if scales is None else scales
    others = [p for p in model.parameters() if p not in members]
    groups = []
    for parameters, rate in ((others, lr), (of_text, text_lr)):
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_scale.setdefault((rate / peak if peak else 1.0) * scales.get(parameter, 1.0), []).append(parameter)
        groups += [
            group | {"lr_scale": scale}
            for scale, of_scale in by_scale.items()
            for group in parameter_groups(of_scale, wd)
            if group["params"]  # torch restores no sharded optimizer that has empty groups, as of a frozen tower
        ]
    return _open_clip_adamw(groups, peak)


def _open_clip_adamw(groups: list[dict[str, Any]], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)


def layered_adamw(model: nn.Module, *, lr: float, wd: float, layer_decay: float) -> torch.optim.AdamW:
    """AdamW with torch's betas for fine-tuning: the rate falls by `layer_decay` from the head to each layer below it.

    `lr_scale` of each group multiplies the rate that `engine.fit` sets. Layers are timm's; biases, norms and a ViT's
    class token and positions have no weight decay. Source: Bao et al., arXiv 2106.08254 (BEiT), as in USB.
    """
    no_decay = model.no_weight_decay() if isinstance(model, VisionTransformer) else ()
    groups = param_groups_layer_decay(model, wd, no_weight_decay_list=list(no_decay), layer_decay=layer_decay)
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
    """SGD. With `norms_decay` all parameters decay, as in the distillation literature; else as in `adamw`."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = trainable if norms_decay else parameter_groups(trainable, wd)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=wd, nesterov=nesterov)


def parameter_groups(parameters: Iterable[nn.Parameter], wd: float) -> list[dict[str, Any]]:
    """Two groups: parameters with two or more axes, and the others (biases, norms, the scale), which do not decay."""
    trainable = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": wd},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


# Schedules are pure functions of the number of updates made, so there is no state to save.


def warmup_cosine(step: int, *, lr: float, steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_fixmatch(step: int, *, lr: float, steps: int, warmup_steps: int) -> float:
    """FixMatch's schedule: linear warm-up from 0, then cos(7/16 pi progress), which ends at 0.2."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    return lr * math.cos(7 / 16 * math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1))


def multi_step(step: int, *, lr: float, milestones: tuple[int, ...]) -> float:
    """The rate falls to a tenth at each milestone, in updates."""
    return lr * 0.1 ** sum(step >= milestone for milestone in milestones)
