"""Distillation of classifiers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl_vl.losses.image_text import global_value, scalars_of_all_ranks
from gkl_vl.losses.labels import Distillation, distillation_loss
from gkl_vl.models.classifiers import Classifier
from gkl_vl.objectives.common import EpochPrior, accuracy
from gkl_vl.protocols import Batch, Objective
from gkl_vl.teachers.online import LabelTeacher


@dataclass(kw_only=True)
class LabelKd(Objective):
    """Cross entropy with the labels plus a distillation loss; without a teacher, the cross entropy alone."""

    student: Classifier
    """Prepares the images; its model is trained."""
    teacher: LabelTeacher | None
    settings: Distillation
    prior: EpochPrior | None
    """The teacher's mean softmax over the images of each class."""

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Logits. `batch` comes from a `LabelledLoader`."""
        return {"logits": model(self.student.prepare(batch["image"]))}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Labels; with a teacher its logits, the prior of each label, and the warm-up factor of the distillation."""
        labels = batch["label"]
        if self.teacher is None:
            return {"labels": labels}
        teacher = self.teacher(batch)
        share = labels.new_tensor(self._share(batch), dtype=torch.float)
        targets = {"labels": labels, "teacher": teacher, "share": share}
        if self.prior is None:
            return targets
        rows = self.prior.rows(labels, epoch=batch["epoch"])  # all ranks
        self.prior.update(teacher, labels)
        return targets | {"prior": rows}

    def _share(self, batch: Batch) -> float:
        """Factor of the distillation loss in the warm-up. As in the released code, epochs count from 1."""
        warmup = self.settings.warmup_epochs
        return min((batch["epoch"] + 1) / warmup, 1.0) if warmup else 1.0

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """ce_weight * CE + share * distillation. Equal on all ranks."""
        logits, labels = outputs["logits"].float(), targets["labels"]
        ce = F.cross_entropy(logits, labels)
        loss, scalars = self.settings.ce_weight * ce, {"ce": ce.detach()}
        scalars["batch_acc1"] = accuracy(logits, labels)
        if self.teacher is not None:
            teacher = targets["teacher"]
            distillation = distillation_loss(
                student=logits, teacher=teacher, labels=labels, prior=targets.get("prior"), settings=self.settings
            )
            loss = loss + targets["share"] * distillation
            scalars["distillation"] = distillation.detach()
            scalars["agreement@1"] = accuracy(logits, teacher.argmax(dim=1))
        return global_value(loss), scalars_of_all_ranks(scalars)

    def state(self) -> dict[str, Tensor]:
        return {} if self.prior is None else self.prior.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.prior is not None:
            self.prior.load_state(state)
