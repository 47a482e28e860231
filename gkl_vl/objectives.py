"""Which loss sees which part of a batch: outputs of the model, targets, loss. One class per recipe family.

No maths of its own, no optimizer, no Accelerate. `engine.Objective` says what the three parts are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gkl_vl.image_text import image_text_loss, mimicry_loss
from gkl_vl.towers import Clip

Batch = dict[str, Any]
Teacher = Callable[[Batch], dict[str, Tensor]]
"""batch -> {"teacher_image", "teacher_text", "teacher_logit_scale", maybe "teacher_logit_bias"}, without gradient."""


@dataclass(frozen=True, kw_only=True)
class ClipKdWeights:
    """Weights and temperatures of `image_text_loss`, and of feature mimicry."""

    contrastive_weight: float
    soft_ce_weight: float
    wmse_weight: float
    mimicry_weight: float
    gamma: float
    temperature: float
    weight_temperature: float


@dataclass(frozen=True, kw_only=True)
class ClipKd:
    """Distillation of a CLIP on image-text logits, and without a teacher the contrastive loss alone."""

    student: Clip
    """Whose preparation of images is used; its towers are inside the model."""
    teacher: Teacher | None
    weights: ClipKdWeights

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`model` is a `towers.Student`, possibly wrapped; `batch` one of a `PairStream`."""
        return model(self.student.prepare(batch["image"]), batch["text"])

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """The captions' ids, and what the teacher says."""
        return {"text_ids": batch["text_ids"]} | ({} if self.teacher is None else self.teacher(batch))

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`image_text_loss` and mimicry, weighted. A model with a bias is a SigLIP."""
        weights, sigmoid = self.weights, "logit_bias" in outputs
        mimicry = {name: outputs[f"mimicry_{name}"] for name in ("image", "text")}
        loss, scalars = image_text_loss(
            **{name: tensor for name, tensor in outputs.items() if not name.startswith("mimicry_")},
            **targets,
            contrastive_weight=weights.contrastive_weight,
            soft_ce_weight=weights.soft_ce_weight,
            wmse_weight=weights.wmse_weight,
            gamma=weights.gamma,
            temperature=weights.temperature,
            weight_temperature=weights.weight_temperature,
            sigmoid=sigmoid,
            teacher_sigmoid=sigmoid and "teacher_logit_bias" in targets,
        )
        if self.teacher is not None and weights.mimicry_weight:
            term = mimicry_loss(**mimicry, **{name: targets[name] for name in ("teacher_image", "teacher_text")})
            loss, scalars = loss + weights.mimicry_weight * term, scalars | {"mimicry": term.detach()}
        return loss, scalars


def online_teacher(clip: Clip) -> Teacher:
    """The teacher embeds every batch, with its own preparation of images and its own tokens."""

    @torch.no_grad()
    def teacher(batch: Batch) -> dict[str, Tensor]:
        image = clip.towers.encode_image(clip.prepare(batch["image"]))
        text = clip.towers.encode_text(batch["teacher_text"])
        return {"teacher_image": image.float(), "teacher_text": text.float()} | teacher_scales(clip)

    return teacher


@torch.no_grad()
def teacher_scales(clip: Clip) -> dict[str, Tensor]:
    """The teacher's exponentiated scale and, where it has one, its bias."""
    scales = {"teacher_logit_scale": clip.towers.log_scale().exp().detach()}
    bias = clip.towers.bias()
    return scales if bias is None else scales | {"teacher_logit_bias": bias.detach()}
