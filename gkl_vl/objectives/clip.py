"""Which loss sees which part of a batch: outputs of the model, targets, loss. One class per recipe family.

No maths of its own, no optimizer, no Accelerate. `engine.Objective` says what the three parts are.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gkl_vl.losses.gkl import GklSettings
from gkl_vl.losses.image_text import image_text_loss, mimicry_loss
from gkl_vl.models.clip import Clip, ImageTower
from gkl_vl.models.modes import evaluating
from gkl_vl.protocols import Batch, Objective
from gkl_vl.robustness.pgd import Norm, pgd
from gkl_vl.teachers.online import Teacher


@dataclass(frozen=True, kw_only=True)
class ImageAttack:
    """What is done to a CLIP student's images in training: `steps` steps of `step_size`, from TRADES's start.

    The attack raises GKL between the student's image-text logits of the attacked images and the teacher's of the clean
    ones, at the weights here, without a teacher the contrastive loss; text is left alone.
    """

    norm: Norm
    epsilon: float
    """In pixels of [0, 1], at the size that the student takes; for l2 the length of an image's difference."""
    steps: int = 3
    step_size: float
    soft_ce_weight: float = 1.0
    wmse_weight: float = 0.0
    """As in IKL's attack on CIFAR-10."""


def image_attack(norm: Norm, epsilon: float) -> ImageAttack:
    """Of this radius: 3 steps of 2/3 epsilon, as `strength`'s ladder has it in the second quarter of training."""
    return ImageAttack(norm=norm, epsilon=epsilon, step_size=2 * epsilon / 3)


@dataclass(frozen=True, kw_only=True)
class ClipKdWeights:
    """Weights and temperatures of `image_text_loss`, and of feature mimicry."""

    contrastive_weight: float
    mimicry_weight: float
    gkl: GklSettings


@dataclass(frozen=True, kw_only=True)
class ClipKd(Objective):
    """Distillation of a CLIP on image-text logits, and without a teacher the contrastive loss alone."""

    student: Clip
    """Whose preparation of images is used; its towers are inside the model."""
    teacher: Teacher | None
    weights: ClipKdWeights
    attack: ImageAttack | None = None
    """The student is trained on attacked images in place of the clean ones, which the teacher sees."""

    def prepare(self, batch: Batch) -> Batch:
        """With an attack adds `targets`, so that the teacher is asked once, and the `attacked` pixels. All ranks."""
        if self.attack is None:
            return batch
        targets = self.targets(batch)
        return batch | {"targets": targets, "attacked": self._attacked(self.attack, batch, targets)}

    def _attacked(self, attack: ImageAttack, batch: Batch, targets: dict[str, Tensor]) -> Tensor:
        towers = self.student.towers  # not the model, which DistributedDataParallel may have wrapped
        with evaluating(towers), torch.no_grad():
            outputs = {"text": towers.encode_text(batch["text"]), "logit_scale": towers.log_scale().exp()}
            bias = towers.bias()
            outputs |= {} if bias is None else {"logit_bias": bias.detach()}
        weights = replace(
            self.weights,
            contrastive_weight=1.0 if self.teacher is None else 0.0,
            gkl=replace(self.weights.gkl, soft_ce_weight=attack.soft_ce_weight, wmse_weight=attack.wmse_weight),
        )

        def raised(image: Tensor) -> Tensor:
            loss, _ = _logits_loss(outputs | {"image": image}, targets, weights)
            return len(image) * loss  # not the mean, whose gradients float16 would round to 0

        return pgd(
            ImageTower(self.student),
            self.student.scaled(batch["image"]),
            loss=raised,
            epsilon=attack.epsilon,
            step_size=attack.step_size,
            steps=attack.steps,
            norm=attack.norm,
        )

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`model` is a `towers.Student`, possibly wrapped; `batch` one of a `PairStream`."""
        scaled_images = batch["attacked"] if "attacked" in batch else self.student.scaled(batch["image"])
        return model(self.student.normalised(scaled_images), batch["text"])

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """The captions' ids, and what the teacher says of the clean images."""
        if "targets" in batch:
            return batch["targets"]
        return {"text_ids": batch["text_ids"]} | ({} if self.teacher is None else self.teacher(batch))

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`image_text_loss` and mimicry, weighted. A model with a bias is a SigLIP."""
        weights = self.weights
        mimicry = {name: outputs[f"mimicry_{name}"] for name in ("image", "text")}
        logits = {name: tensor for name, tensor in outputs.items() if not name.startswith("mimicry_")}
        loss, scalars = _logits_loss(logits, targets, weights)
        if self.teacher is not None and weights.mimicry_weight:
            term = mimicry_loss(**mimicry, **{name: targets[name] for name in ("teacher_image", "teacher_text")})
            loss, scalars = loss + weights.mimicry_weight * term, scalars | {"mimicry": term.detach()}
        return loss, scalars


def _logits_loss(
    outputs: dict[str, Tensor], targets: dict[str, Tensor], weights: ClipKdWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    sigmoid = "logit_bias" in outputs
    return image_text_loss(
        **outputs,
        **targets,
        **vars(weights.gkl),
        contrastive_weight=weights.contrastive_weight,
        sigmoid=sigmoid,
        teacher_sigmoid=sigmoid and "teacher_logit_bias" in targets,
    )
