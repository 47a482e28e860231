"""Which loss sees which part of a batch: outputs of the model, targets, loss. One class per recipe family.

No maths of its own, no optimizer, no Accelerate. `engine.Objective` says what the three parts are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl_vl.classifiers import Classifier
from gkl_vl.gkl import ClassPrior
from gkl_vl.image_text import global_value, image_text_loss, mimicry_loss, scalars_of_all_ranks
from gkl_vl.label_losses import Distillation, distillation_loss
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

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


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


# ---- labels ------------------------------------------------------------------------------------------------------

LabelTeacher = Callable[[Batch], Tensor]
"""batch -> the teacher's logits [n, C], without gradient."""


@dataclass(kw_only=True)
class LabelKd:
    """Distillation of a classifier; without a teacher the labels' cross entropy alone."""

    student: Classifier
    """Whose preparation of images is used; its model is what is trained."""
    teacher: LabelTeacher | None
    settings: Distillation
    prior: ClassPrior | None
    """What the teacher thinks of each class: collected during an epoch, used in the next."""
    epoch: int = 0

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`batch` is one of a `LabelledLoader`."""
        return {"logits": model(self.student.prepare(batch["image"]))}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Labels, and from a teacher its logits, the prior's rows, and how much of the distillation counts yet."""
        labels = batch["label"]
        if self.teacher is None:
            return {"labels": labels}
        teacher = self.teacher(batch)
        found = {
            "labels": labels,
            "teacher": teacher,
            "share": labels.new_tensor(self._share(batch), dtype=torch.float),
        }
        if self.prior is None:
            return found
        if batch["epoch"] != self.epoch:
            self.prior.end_epoch()  # all ranks: they change epochs together
            self.epoch = batch["epoch"]
        rows = self.prior.rows(labels)
        self.prior.update(teacher, labels)
        return found | {"prior": rows}

    def _share(self, batch: Batch) -> float:
        """As released: epochs count from 1."""
        warmup = self.settings.warmup_epochs
        return min((batch["epoch"] + 1) / warmup, 1.0) if warmup else 1.0

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """ce_weight * CE + share * distillation. Equal on all ranks."""
        logits, labels = outputs["logits"].float(), targets["labels"]
        ce = F.cross_entropy(logits, labels)
        loss, scalars = self.settings.ce_weight * ce, {"ce": ce.detach()}
        scalars["batch_acc1"] = (logits.detach().argmax(dim=1) == labels).float().mean()
        if self.teacher is not None:
            teacher = targets["teacher"]
            distillation = distillation_loss(
                student=logits, teacher=teacher, labels=labels, prior=targets.get("prior"), settings=self.settings
            )
            loss = loss + targets["share"] * distillation
            scalars["distillation"] = distillation.detach()
            scalars["agreement@1"] = (logits.detach().argmax(dim=1) == teacher.argmax(dim=1)).float().mean()
        return global_value(loss), scalars_of_all_ranks(scalars)

    def state(self) -> dict[str, Tensor]:
        return {} if self.prior is None else self.prior.state_dict() | {"epoch": torch.tensor(self.epoch)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.prior is not None:
            self.prior.load_state_dict(state)
            self.epoch = int(state["epoch"])


def online_label_teacher(classifier: Classifier) -> LabelTeacher:
    """The teacher, in evaluation mode, sees every batch as its own normalisation has it."""

    @torch.no_grad()
    def teacher(batch: Batch) -> Tensor:
        return classifier.model(classifier.prepare(batch["image"])).float()

    return teacher
