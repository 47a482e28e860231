"""Which loss sees which part of a batch: outputs of the model, targets, loss. One class per recipe family.

No maths of its own, no optimizer, no Accelerate. `engine.Objective` says what the three parts are.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gkl_vl.adversarial import AdversarialTraining, ImageAttack, raised_loss, robust_loss, strength
from gkl_vl.attacks import evaluating, pgd, weights_perturbed
from gkl_vl.classifiers import Classifier, scaled
from gkl_vl.data.prompts import Prompts
from gkl_vl.gather import world_size
from gkl_vl.gkl import ClassPrior, Number, gkl_halves, lift
from gkl_vl.image_text import class_logits, global_value, image_text_loss, mimicry_loss, scalars_of_all_ranks
from gkl_vl.label_losses import Distillation, distillation_loss
from gkl_vl.semi_supervised import (
    ClassThresholds,
    SemiSupervised,
    consistency_loss,
    pseudo_label_scalars,
    rampup,
)
from gkl_vl.towers import Clip, ImageTower

Batch = dict[str, Any]
Teacher = Callable[[Batch], dict[str, Tensor]]
"""batch -> {"teacher_image", "teacher_logit_scale", maybe "teacher_logit_bias"} and, of captions, "teacher_text";
without gradient."""


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
    attack: ImageAttack | None = None
    """The student is trained on attacked images in place of the clean ones, which the teacher sees."""

    def prepared(self, batch: Batch) -> Batch:
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
            soft_ce_weight=float(attack.soft_ce_weight),
            wmse_weight=float(attack.wmse_weight),
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

    def perturbed(self, batches: list[Batch]) -> AbstractContextManager[None]:
        return nullcontext()

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

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


def _logits_loss(
    outputs: dict[str, Tensor], targets: dict[str, Tensor], weights: ClipKdWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    sigmoid = "logit_bias" in outputs
    return image_text_loss(
        **outputs,
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


def online_teacher(clip: Clip) -> Teacher:
    """The teacher embeds every batch, with its own preparation of images and its own tokens; captions if there are."""

    @torch.no_grad()
    def teacher(batch: Batch) -> dict[str, Tensor]:
        said = {"teacher_image": clip.towers.encode_image(clip.prepare(batch["image"])).float()}
        if "teacher_text" in batch:
            said["teacher_text"] = clip.towers.encode_text(batch["teacher_text"]).float()
        return said | teacher_scales(clip)

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


class EpochPrior:
    """A `ClassPrior` that is collected during an epoch and used in the next; epochs are told by the batches."""

    def __init__(self, num_classes: int, temperature: Number):
        self._prior, self._epoch = ClassPrior(num_classes, temperature), 0

    def rows(self, labels: Tensor, *, epoch: int) -> Tensor:
        """The prior of each sample's label. All ranks: they change epochs together."""
        if epoch != self._epoch:
            self._prior.end_epoch()
            self._epoch = epoch
        return self._prior.rows(labels)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds what was said of these samples."""
        self._prior.update(logits, labels)

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint of this rank."""
        return self._prior.state_dict() | {"epoch": torch.tensor(self._epoch)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from where `state` was taken."""
        self._prior.load_state_dict(state)
        self._epoch = int(state["epoch"])


@dataclass(kw_only=True)
class LabelKd:
    """Distillation of a classifier; without a teacher the labels' cross entropy alone."""

    student: Classifier
    """Whose preparation of images is used; its model is what is trained."""
    teacher: LabelTeacher | None
    settings: Distillation
    prior: EpochPrior | None
    """What the teacher thinks of each class."""

    def prepared(self, batch: Batch) -> Batch:
        return batch

    def perturbed(self, batches: list[Batch]) -> AbstractContextManager[None]:
        return nullcontext()

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
        rows = self.prior.rows(labels, epoch=batch["epoch"])  # all ranks
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
        scalars["batch_acc1"] = _accuracy(logits, labels)
        if self.teacher is not None:
            teacher = targets["teacher"]
            distillation = distillation_loss(
                student=logits, teacher=teacher, labels=labels, prior=targets.get("prior"), settings=self.settings
            )
            loss = loss + targets["share"] * distillation
            scalars["distillation"] = distillation.detach()
            scalars["agreement@1"] = _accuracy(logits, teacher.argmax(dim=1))
        return global_value(loss), scalars_of_all_ranks(scalars)

    def state(self) -> dict[str, Tensor]:
        return {} if self.prior is None else self.prior.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.prior is not None:
            self.prior.load_state(state)


def online_label_teacher(classifier: Classifier) -> LabelTeacher:
    """The teacher, in evaluation mode, sees every batch as its own normalisation has it."""

    @torch.no_grad()
    def teacher(batch: Batch) -> Tensor:
        return classifier.model(classifier.prepare(batch["image"])).float()

    return teacher


# ---- adversarial training ----------------------------------------------------------------------------------------


class Together(nn.Module):
    """A model on several batches in one call: DistributedDataParallel allows one, and BatchNorm counts each apart."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batches: list[Tensor]) -> list[Tensor]:
        return [self.model(batch) for batch in batches]


@dataclass(kw_only=True)
class Adversarial:
    """The labels' cross entropy of natural images, and the distance of attacked images' logits from theirs.

    Where batches have a second view, both views are attacked and go through the model as one batch, as released.
    """

    model: Together
    """What is trained, without what Accelerate wraps around it; it takes pixels in [0, 1]."""
    settings: AdversarialTraining
    prior: EpochPrior | None
    """What the model thinks of each class's natural images."""

    def prepared(self, batch: Batch) -> Batch:
        """Adds `views`, what the model is to see: attacked and natural images, or natural ones alone. All ranks."""
        images = [batch[name] for name in ("image", "second_image") if name in batch]
        natural = torch.cat([scaled(view) for view in images])
        labels = batch["label"].repeat(len(images))
        if self.settings.method == "natural":
            return batch | {"labels": labels, "views": [natural]}
        prior = None if self.prior is None else self.prior.rows(labels, epoch=batch["epoch"])
        attacked = self._attacked(natural, prior, batch["epoch"])
        return batch | {"labels": labels, "views": [attacked, natural]} | ({} if prior is None else {"prior": prior})

    def _attacked(self, images: Tensor, prior: Tensor | None, epoch: int) -> Tensor:
        settings, model = self.settings, self.model.model
        with evaluating(model), torch.no_grad():
            natural = lift(model(images))

        def raised(logits: Tensor) -> Tensor:
            loss = raised_loss(attacked=lift(logits), natural=natural, prior=prior, settings=settings)
            return len(images) * loss  # not the mean, whose gradients float16 would round to 0

        epsilon, step_size, steps = strength(settings, epoch=epoch)
        return pgd(model, images, loss=raised, epsilon=epsilon, step_size=step_size, steps=steps, norm=settings.norm)

    def perturbed(self, batches: list[Batch]) -> AbstractContextManager[None]:
        """The weights moved to where the loss, with both views weighed alike, is larger: from `awp_epoch` on."""
        settings, (batch,) = self.settings, batches
        if settings.method == "natural" or not settings.awp_gamma or batch["epoch"] + 1 < settings.awp_epoch:
            return nullcontext()

        def loss() -> Tensor:
            attacked, natural = (lift(logits) for logits in self.model(batch["views"]))
            ce = F.cross_entropy(natural, batch["labels"], label_smoothing=settings.label_smoothing)
            prior = batch.get("prior")
            return ce + robust_loss(attacked=attacked, natural=natural, prior=prior, settings=settings)

        return weights_perturbed(self.model, loss=loss, gamma=settings.awp_gamma)

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`attacked`, where there are such, and `natural` logits of each view: a row per sample."""
        n = len(batch["label"])
        logits = [lift(both).split(n) for both in model(batch["views"])]
        names = ("attacked", "natural")[-len(logits) :]
        return {f"{name}_{view}": rows for name, of in zip(names, logits, strict=True) for view, rows in enumerate(of)}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Labels, and the prior's rows, the same for both views."""
        labels = batch["label"]
        return {"labels": labels} | ({"prior": batch["prior"][: len(labels)]} if "prior" in batch else {})

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """CE(natural) + distance, that of a second view times its weight. Equal on all ranks. Once for each update."""
        settings, labels = self.settings, targets["labels"]
        natural = [outputs[name] for name in ("natural_0", "natural_1") if name in outputs]
        smoothing = settings.label_smoothing
        ce = torch.stack([F.cross_entropy(view, labels, label_smoothing=smoothing) for view in natural]).mean()
        scalars = {"ce": ce.detach(), "batch_acc1": _accuracy(natural[0], labels)}
        if settings.method == "natural":
            return global_value(ce), scalars_of_all_ranks(scalars)
        if self.prior is not None:
            self.prior.update(natural[0].detach(), labels)
        robust = torch.zeros_like(ce)
        for view, weight in zip(range(len(natural)), (1.0, settings.second_view_weight), strict=False):
            attacked = outputs[f"attacked_{view}"]
            prior = targets.get("prior")
            term = robust_loss(attacked=attacked, natural=natural[view], prior=prior, settings=settings)
            robust = robust + weight * term
        scalars |= {"robust": robust.detach(), "batch_robust_acc1": _accuracy(outputs["attacked_0"], labels)}
        return global_value(ce + robust), scalars_of_all_ranks(scalars)

    def state(self) -> dict[str, Tensor]:
        return {} if self.prior is None else self.prior.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.prior is not None:
            self.prior.load_state(state)


# ---- semi-supervised learning ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class SemiSupervisedTraining:
    """The labels' cross entropy, and the distance of strong views' logits from what weak views' said."""

    student: Classifier
    """Whose preparation of images is used; its model is what is trained."""
    average: AveragedModel | None
    """Mean Teacher: what sees the weak views, with statistics of BatchNorm that are averaged too. None = the model."""
    settings: SemiSupervised
    thresholds: ClassThresholds | None
    """FlexMatch's; None = one for all classes."""
    prior: EpochPrior | None
    """What was thought of each class's images, where it was sure."""

    def prepared(self, batch: Batch) -> Batch:
        """Adds what the weak views say: `weak` logits and `mask`, the images that count. All ranks."""
        if "weak" not in batch:
            return batch
        weak = self._weak(batch["weak"])
        confidence, labels = weak.softmax(dim=1).max(dim=1)
        found = {"weak": weak, "mask": self._mask(batch, confidence, labels)}
        if self.prior is None:
            return batch | found
        found["prior"] = self.prior.rows(labels, epoch=batch["epoch"])  # all ranks
        self.prior.update(weak[found["mask"]], labels[found["mask"]])
        return batch | found

    @torch.no_grad()
    def _weak(self, images: Tensor) -> Tensor:
        """In a pass of their own: no graph is kept of images that get no gradient."""
        pixels = self.student.prepare(images)
        if self.average is not None:
            return lift(self.average.module.eval()(pixels))  # EMAN: Cai et al., CVPR 2021
        return lift(self.student.model.train()(pixels))  # as the strong views are seen: with their own statistics

    def _mask(self, batch: Batch, confidence: Tensor, labels: Tensor) -> Tensor:
        if self.thresholds is None:
            return confidence >= self.settings.threshold
        mask = confidence >= self.thresholds.of(labels)
        index = batch["unlabelled_index"]
        self.thresholds.update(index=index, labels=labels, confidence=confidence)  # all ranks
        return mask

    def perturbed(self, batches: list[Batch]) -> AbstractContextManager[None]:
        return nullcontext()

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`labelled` logits [n, C], and `strong` ones [n, mu, C]: the engine wants a row per labelled image."""
        if "strong" not in batch:
            return {"labelled": lift(model(self.student.prepare(batch["image"])))}
        n = len(batch["label"])
        both = lift(model(self.student.prepare(torch.cat([batch["image"], batch["strong"]]))))
        return {"labelled": both[:n], "strong": both[n:].unflatten(0, (n, -1))}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Labels, and what the weak views say; of hidden labels what the log is to know."""
        labels = batch["label"]
        if "strong" not in batch:
            return {"labels": labels}
        rows = {name: batch[name] for name in ("weak", "mask", "prior", "hidden_label") if name in batch}
        share = labels.new_tensor(rampup(self.settings, step=batch["step"]), dtype=torch.float)
        return {name: x.unflatten(0, (len(labels), -1)) for name, x in rows.items()} | {
            "labels": labels,
            "share": share,
        }

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """CE(labelled) + unlabelled_weight * consistency. Equal on all ranks."""
        logits, labels = outputs["labelled"], targets["labels"]
        ce = F.cross_entropy(logits, labels)
        scalars = {"ce": ce.detach(), "batch_acc1": _accuracy(logits, labels)}
        if "strong" not in outputs:
            return global_value(ce), scalars_of_all_ranks(scalars)
        strong, weak, mask, hidden = (
            of[name].flatten(0, 1)
            for of, name in ((outputs, "strong"), (targets, "weak"), (targets, "mask"), (targets, "hidden_label"))
        )
        prior = targets["prior"].flatten(0, 1) if "prior" in targets else None
        term = consistency_loss(strong=strong, weak=weak, mask=mask, prior=prior, settings=self.settings)
        loss = ce + targets["share"] * self.settings.unlabelled_weight * term
        scalars |= {"consistency": term.detach()} | pseudo_label_scalars(weak=weak, mask=mask, hidden=hidden)
        return global_value(loss), scalars_of_all_ranks(scalars)

    def state(self) -> dict[str, Tensor]:
        found = {} if self.prior is None else self.prior.state()
        return found if self.thresholds is None else found | {"last_pseudo_label": self.thresholds.last}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.prior is not None:
            self.prior.load_state(state)
        if self.thresholds is not None:
            self.thresholds.last = state["last_pseudo_label"]


# ---- zero-shot logits --------------------------------------------------------------------------------------------

PROMPTS_AT_ONCE = 512
"""Prompts go through the text tower in parts of so many, each as long as its longest: with the bundled 1,658 names 3.5
times as fast as at the tower's full length (two CPU cores, forward and backward)."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotWeights:
    """Weights and temperatures of `gkl_loss`."""

    soft_ce_weight: float
    wmse_weight: float
    gamma: float
    temperature: float
    weight_temperature: float


@dataclass(kw_only=True)
class ZeroShotKd:
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
    weights: ZeroShotWeights
    prior: EpochPrior | None
    num_images: int | None
    """In a pass over the data; for the prior."""
    seed: int
    """Of the templates."""
    _updates: int = field(default=0, init=False)
    _images: int = field(default=0, init=False)
    """Behind us, of all processes."""

    def prepared(self, batch: Batch) -> Batch:
        return batch

    @contextmanager
    def perturbed(self, batches: list[Batch]) -> Iterator[None]:
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
        student, teacher, weights = outputs["logits"], targets["teacher"], self.weights
        wmse, soft_ce = gkl_halves(
            student=student,
            teacher=teacher,
            gamma=weights.gamma,
            temperature=weights.temperature,
            weight_temperature=weights.weight_temperature,
            class_prior=targets.get("prior"),
        )
        scalars = {"soft_ce": soft_ce.detach(), "wmse": wmse.detach()}
        scalars["agreement@1"] = _accuracy(student, teacher.argmax(dim=1))
        loss = weights.soft_ce_weight * soft_ce + weights.wmse_weight * wmse
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


def zero_shot_teacher(teacher: Teacher, classes: Tensor) -> LabelTeacher:
    """A teacher's logits over classes, of what it says of images.

    Args:
        classes: its class embeddings [C, e], normalised: `embed.zero_shot_classifier`.
    """

    def logits(batch: Batch) -> Tensor:
        said = teacher(batch)
        return class_logits(
            image=said["teacher_image"],
            classes=classes,
            logit_scale=said["teacher_logit_scale"],
            logit_bias=said.get("teacher_logit_bias"),
        )

    return logits


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(dim=1) == labels).float().mean()
