"""Distillation of a CLIP on zero-shot logits over class prompts."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from gkl_vl.data.prompts import Prompts
from gkl_vl.distributed import world_size
from gkl_vl.losses.gkl import GklSettings, gkl_halves
from gkl_vl.losses.image_text import class_logits, global_value, scalars_of_all_ranks
from gkl_vl.models.clip import Clip
from gkl_vl.objectives.common import EpochPrior, accuracy
from gkl_vl.protocols import Batch, Objective
from gkl_vl.teachers.online import LabelTeacher

PROMPTS_AT_ONCE = 512
"""Prompts go through the text tower in parts of so many, each as long as its longest: with the bundled 1,658 names 3.5
times as fast as at the tower's full length (two CPU cores, forward and backward)."""


@dataclass(kw_only=True)
class ZeroShotKd(Objective):
    """Distillation of a CLIP on zero-shot logits over a list of classes: images alone, no captions, no labels.

        student = s e(image) @ e(prompts).T,    teacher = t e(image) @ classes.T        [n, C] each

    The student's class embeddings come from its own text tower, which is trained, and one template an update; the
    teacher's stand still. The class prior is the teacher's: its mean softmax of the images that it takes for the same
    class, collected in a pass over the data and used in the next.

    Source of the setting: PromptKD, Li et al., CVPR 2024, arXiv 2403.02781, which keeps the teacher's class embeddings
    for the student and trains it with KL; GKL and the prior are this project's.
    """

    student: Clip
    """Whose preparation of images is used; its towers are inside the model."""
    teacher: LabelTeacher
    """See `zero_shot_teacher`."""
    tokens: list[list[Tensor]]
    """The student's, by template: `prompt_tokens`."""
    gkl: GklSettings
    prior: EpochPrior | None
    num_images: int | None
    """In a pass over the data; for the prior."""
    seed: int
    """Of the templates."""
    _updates: int = field(default=0, init=False)
    _images: int = field(default=0, init=False)
    """Behind us, of all processes."""

    @contextmanager
    def around_update(self, batches: list[Batch]) -> Iterator[None]:
        """One update, with one template and one prior, whatever the number of batches; counts it."""
        yield
        self._updates += 1
        self._images += world_size() * sum(len(batch["keys"]) for batch in batches)

    def template(self) -> int:
        """Number of the template that this update's prompts are made with, the same on all ranks."""
        return random.Random(f"{self.seed}/{self._updates}").randrange(len(self.tokens))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`model` is a `towers.Student`, possibly wrapped; `batch` one of a `PairStream`, with or without captions."""
        said = model(self.student.prepare(batch["image"]), *self.tokens[self.template()])
        return {
            "logits": class_logits(
                image=said["image"],
                classes=said["text"],
                logit_scale=said["logit_scale"],
                logit_bias=said.get("logit_bias"),
            )
        }

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """The teacher's logits, and the prior's rows of the classes that it takes the images for. All ranks."""
        teacher = self.teacher(batch)
        if self.prior is None:
            return {"teacher": teacher}
        assert self.num_images is not None  # or there is no pass to speak of
        best = teacher.argmax(dim=1)
        rows = self.prior.rows(best, epoch=self._images // self.num_images)  # all ranks
        self.prior.update(teacher, best)
        return {"teacher": teacher, "prior": rows}

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """GKL's halves, weighted. Equal on all ranks."""
        student, teacher = outputs["logits"], targets["teacher"]
        prior = targets.get("prior")
        wmse, soft_ce = gkl_halves(student=student, teacher=teacher, settings=self.gkl, class_prior=prior)
        scalars = {"soft_ce": soft_ce.detach(), "wmse": wmse.detach()}
        scalars["agreement@1"] = accuracy(student, teacher.argmax(dim=1))
        loss = self.gkl.soft_ce_weight * soft_ce + self.gkl.wmse_weight * wmse
        return global_value(loss), scalars_of_all_ranks(scalars)

    def state(self) -> dict[str, Tensor]:
        counts = {"updates": torch.tensor(self._updates), "images": torch.tensor(self._images)}
        return counts | ({} if self.prior is None else self.prior.state())

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._updates, self._images = int(state["updates"]), int(state["images"])
        if self.prior is not None:
            self.prior.load_state(state)


def by_length(prompts: Prompts, clip: Clip) -> Prompts:
    """The same prompts with the classes in order of their length in tokens, which the losses do not see."""
    ends = clip.tokenize(prompts.of_template(0)).argmax(dim=1)
    return replace(prompts, classnames=tuple(prompts.classnames[c] for c in ends.argsort(stable=True).tolist()))


def prompt_tokens(prompts: Prompts, clip: Clip, device: torch.device) -> list[list[Tensor]]:
    """By template the tokens of all classes, in parts for `towers.Student`."""
    of_templates = [clip.tokenize(prompts.of_template(number)) for number in range(len(prompts.templates))]
    return [[clip.towers.trimmed(part).to(device) for part in t.split(PROMPTS_AT_ONCE)] for t in of_templates]
