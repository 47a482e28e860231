"""Distillation of one tower into a teacher's embedding space."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from gkl_vl.losses.cross_logits import cross_logits_loss
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.losses.image_text import feature_mse, scalars_of_all_ranks
from gkl_vl.models.clip import Clip
from gkl_vl.models.towers import Side
from gkl_vl.protocols import Batch, Objective
from gkl_vl.teachers.bank import Bank
from gkl_vl.teachers.online import Teacher


@dataclass(frozen=True, kw_only=True)
class OneTowerKd(Objective):
    """Feature mimicry of one side's embeddings, and GKL of their logits against the teacher's other side.

        loss = mimicry_weight * mean_ik (x_ik - z_ik)^2 + cross GKL of s x_i . c_j with s z_i . c_j

    x are the student's embeddings, z the teacher's of the same images or captions, s the teacher's scale, c the
    columns: the teacher's class prompts for images, its last images for captions. See `cross_logits_loss`.
    """

    student: Clip
    """Prepares the images."""
    teacher: Teacher
    side: Side
    """Of the tower that is trained."""
    mimicry_weight: float
    cross: GklSettings
    columns: Tensor | Bank | None
    """Embeddings [K, e], or a queue of the teacher's images; None where `cross` does not count."""

    @contextmanager
    def around_update(self, batches: list[Batch]) -> Iterator[None]:
        """The update's images enter the queue."""
        yield
        if isinstance(self.columns, Bank):
            self.columns.advance()

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Embeddings. `model` is a `OneTower`, possibly wrapped; `batch` comes from a `PairStream`."""
        return {"rows": model(self.student.prepare(batch["image"]) if self.side == "image" else batch["text"])}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """The teacher's embeddings and scale."""
        return self.teacher(batch)

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms. Equal on all ranks."""
        rows, goal = (x.flatten(0, -2) for x in (outputs["rows"], targets[f"teacher_{self.side}"]))
        mimicry = feature_mse(rows, goal)  # all ranks
        loss = self.mimicry_weight * mimicry
        scalars = scalars_of_all_ranks({"cosine": F.cosine_similarity(rows, goal, dim=1).mean()})  # all ranks
        scalars |= {"mimicry": mimicry.detach()}
        if not self.cross.counts:
            return loss, scalars
        bias = targets.get("teacher_logit_bias")
        term, terms = cross_logits_loss(
            image=rows,
            teacher_image=goal,
            text_bank=self._columns(targets),
            teacher_logit_scale=targets["teacher_logit_scale"],
            teacher_logit_bias=bias,
            sigmoid=bias is not None,
            **vars(self.cross),
        )
        return loss + term, scalars | terms

    def _columns(self, targets: dict[str, Tensor]) -> Tensor:
        """All ranks."""
        if not isinstance(self.columns, Bank):
            assert self.columns is not None  # the cross term counts
            return self.columns
        images = targets["teacher_image"]
        return self.columns.columns(images, images)[1]  # all ranks

    def state(self) -> dict[str, Tensor]:
        """The queue's."""
        return self.columns.state() if isinstance(self.columns, Bank) else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned. All ranks."""
        if isinstance(self.columns, Bank):
            self.columns.load_state(state)
