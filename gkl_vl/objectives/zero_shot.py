"""Distillation of a CLIP on zero-shot logits over class prompts."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gkl_vl.data.prompts import Prompts
from gkl_vl.distributed import world_size
from gkl_vl.losses.cross_logits import cross_logits_loss
from gkl_vl.losses.gkl import GklSettings, gkl_halves, mean_logits, soft_cross_entropy_rows
from gkl_vl.losses.image_text import class_logits, global_value, scalars_of_all_ranks
from gkl_vl.models.clip import Clip
from gkl_vl.objectives.common import EpochPrior, accuracy
from gkl_vl.protocols import Batch, Objective
from gkl_vl.teachers.online import Teacher, by_teacher, numbered


@dataclass(kw_only=True)
class ZeroShotKd(Objective):
    """GKL between zero-shot logits of student and teacher over a list of classes, from images only.

        student = s e(image) @ e(prompts).T,    teacher = t e(image) @ classes.T        [n, C] each
        cross   = t map(e(image)) @ classes.T

    Of several teachers the soft targets are averaged, and wMSE and the class prior are those of their mean logits.
    The student's class embeddings come from its own text tower, which is trained, with one template per update; the
    teacher's are fixed. In the cross logits the student's images are compared with the teacher's classes; its own text
    tower has no part in them. The class prior is the teacher's mean softmax over images with the same likeliest class,
    collected in a pass over the data and used in the next.

    Source of the setting: PromptKD, Li et al., CVPR 2024, arXiv 2403.02781, which keeps the teacher's class embeddings
    for the student and trains it with KL; GKL and the prior are this project's.
    """

    student: Clip
    """Prepares the images; its towers are the ones inside the model."""
    teacher: Teacher
    classes: Sequence[Tensor]
    """Each teacher's normalised class embeddings [C, e], see `evaluation.embed.zero_shot_classifier`."""
    tokens: list[Tensor]
    """The student's tokens of the prompts, by template, see `prompt_tokens`."""
    gkl: GklSettings
    """Of the student's own logits."""
    cross: GklSettings
    """Of the cross logits."""
    prior: EpochPrior | None
    num_images: int | None
    """Images in a pass over the data; needed with a prior."""
    seed: int
    """Seed of the templates."""
    teacher_weights: list[float] | tuple[float, ...] = (1.0,)
    """Share of each teacher in the targets, with sum 1."""
    _updates: int = field(default=0, init=False)
    _images: int = field(default=0, init=False)
    """Images seen so far by all processes."""

    @contextmanager
    def around_update(self, batches: list[Batch]) -> Iterator[None]:
        """Counts the update: all its batches use the same template and the same prior."""
        yield
        self._updates += 1
        self._images += world_size() * sum(len(batch["keys"]) for batch in batches)

    def template(self) -> int:
        """Index of this update's template, the same on all ranks."""
        return random.Random(f"{self.seed}/{self._updates}").randrange(len(self.tokens))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Logits. `model` is a `Student`, possibly wrapped; `batch` comes from a `PairStream`."""
        outputs = model(self.student.prepare(batch["image"]), self.tokens[self.template()])
        logits = class_logits(
            image=outputs["image"],
            classes=outputs["text"],
            logit_scale=outputs["logit_scale"],
            logit_bias=outputs.get("logit_bias"),
        )
        return {"logits": logits} | {name: outputs[name] for name in ("mapped_image",) if name in outputs}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """The teachers' embeddings and logits, and the prior of each image's likeliest class. All ranks."""
        targets = self.teacher(batch)
        for number, classes in enumerate(self.classes):
            targets[numbered("teacher_logits", number)] = class_logits(
                image=targets[numbered("teacher_image", number)],
                classes=classes,
                logit_scale=targets[numbered("teacher_logit_scale", number)],
                logit_bias=targets.get(numbered("teacher_logit_bias", number)),
            )
        if self.prior is None:
            return targets
        logits = mean_logits(teachers=by_teacher(targets, "teacher_logits"), weights=self.teacher_weights)
        assert self.num_images is not None  # checked by the recipe
        best = logits.argmax(dim=1)
        rows = self.prior.rows(best, epoch=self._images // self.num_images)  # all ranks
        self.prior.update(logits, best)
        return targets | {"prior": rows}

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of GKL's halves, on both kinds of logits. Equal on all ranks."""
        student, teachers = outputs["logits"], by_teacher(targets, "teacher_logits")
        prior, several = targets.get("prior"), len(teachers) > 1
        mean = mean_logits(teachers=teachers, weights=self.teacher_weights)
        wmse, soft_ce = gkl_halves(student=student, teacher=mean, settings=self.gkl, class_prior=prior)
        scalars = {"soft_ce": soft_ce, "wmse": wmse, "agreement@1": accuracy(student, mean.argmax(dim=1))}
        if several:
            temperature, by_name = self.gkl.temperature, {}
            for number, teacher in enumerate(teachers):
                rows = soft_cross_entropy_rows(student=student, teacher=teacher, temperature=temperature)
                by_name[f"soft_ce.{number}"] = rows.mean()
                scalars[f"agreement@1.{number}"] = accuracy(student, teacher.argmax(dim=1))
            soft_ce = torch.stack(
                [w * term for w, term in zip(self.teacher_weights, by_name.values(), strict=True)]
            ).sum()
            scalars |= by_name | {"soft_ce": soft_ce}
        loss = global_value(self.gkl.soft_ce_weight * soft_ce + self.gkl.wmse_weight * wmse)
        scalars = scalars_of_all_ranks(scalars)
        if not self.cross.counts:
            return loss, scalars
        images = by_teacher(targets, "teacher_image")
        mapped = outputs["mapped_image"].split([image.shape[1] for image in images], dim=1)
        for number, weight in enumerate(self.teacher_weights):
            cross, terms = cross_logits_loss(
                image=mapped[number],
                teacher_image=images[number],
                text_bank=self.classes[number],
                teacher_logit_scale=targets[numbered("teacher_logit_scale", number)],
                class_prior=prior,
                **vars(self.cross),
            )
            loss = loss + weight * cross
            scalars |= {f"{name}.{number}" if several else name: term for name, term in terms.items()}
        return loss, scalars

    def state(self) -> dict[str, Tensor]:
        counts = {"updates": torch.tensor(self._updates), "images": torch.tensor(self._images)}
        return counts | ({} if self.prior is None else self.prior.state())

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._updates, self._images = int(state["updates"]), int(state["images"])
        if self.prior is not None:
            self.prior.load_state(state)


def prompt_tokens(prompts: Prompts, clip: Clip, device: torch.device) -> list[Tensor]:
    """Tokens of all classes by template."""
    return [clip.tokenize(prompts.of_template(number)).to(device) for number in range(len(prompts.templates))]
