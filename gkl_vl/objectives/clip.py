"""Distillation of a CLIP on image-text logits, with or without attacks on the student's images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gkl_vl.losses.cross_logits import cross_logits_loss
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.losses.image_text import image_text_loss, mimicry_loss
from gkl_vl.models.clip import Clip, ImageTower
from gkl_vl.models.modes import evaluating
from gkl_vl.protocols import Batch, Objective
from gkl_vl.robustness.pgd import Norm, pgd
from gkl_vl.teachers.bank import Bank
from gkl_vl.teachers.online import Teacher, by_teacher, numbered

AVERAGED = ("soft_ce", "mimicry", "cross_soft_ce", "cross_wmse")
"""Terms of the log that are the mean over several teachers."""


@dataclass(frozen=True, kw_only=True)
class ImageAttack:
    """PGD on a CLIP student's images in training: `steps` steps of `step_size`, from TRADES's Gaussian start.

    The attack maximises GKL, with the weights given here, between the student's image-text logits of the attacked
    images and the teacher's of the clean ones; without a teacher, the contrastive loss. Texts are not attacked.
    """

    norm: Norm
    epsilon: float
    """Radius in pixel values of [0, 1] at the student's image size; for l2 the norm of an image's difference."""
    steps: int = 3
    step_size: float
    soft_ce_weight: float = 1.0
    wmse_weight: float = 0.0
    """0 as in IKL's attack on CIFAR-10."""


def image_attack(norm: Norm, epsilon: float) -> ImageAttack:
    """An attack of 3 steps of 2/3 epsilon, as in the second quarter of `adversarial.strength`'s ladder."""
    return ImageAttack(norm=norm, epsilon=epsilon, step_size=2 * epsilon / 3)


@dataclass(frozen=True, kw_only=True)
class ClipKdWeights:
    """Weights of the contrastive loss, of feature mimicry, and of GKL in the batch and on cross logits."""

    contrastive_weight: float
    mimicry_weight: float
    gkl: GklSettings
    cross: GklSettings

    @property
    def mapped(self) -> tuple[str, ...]:
        """For `Student`: the sides whose embeddings are compared with the teacher's."""
        return ("image", "text") if self.mimicry_weight or self.cross.counts else ()


@dataclass(frozen=True, kw_only=True)
class ClipKd(Objective):
    """`image_text_loss`, `cross_logits_loss` and weighted feature mimicry; without a teacher, the contrastive loss."""

    student: Clip
    """Prepares the images; its towers are the ones inside the model."""
    teacher: Teacher | None
    weights: ClipKdWeights
    bank: Bank
    """Columns of the cross logits: the teachers' embeddings, one behind the other."""
    teacher_weights: Sequence[float] = (1.0,)
    """Share of each teacher in the targets, with sum 1."""
    attack: ImageAttack | None = None
    """The student sees attacked images, the teacher the clean ones."""

    @contextmanager
    def around_update(self, batches: list[Batch]) -> Iterator[None]:
        """The update's pairs enter the bank."""
        yield
        self.bank.advance()

    def prepare(self, batch: Batch) -> Batch:
        """With an attack: adds `targets`, which the attack needs as well, and `attacked` pixels. All ranks."""
        if self.attack is None:
            return batch
        targets = self.targets(batch)
        return batch | {"targets": targets, "attacked": self._attacked(self.attack, batch, targets)}

    def _attacked(self, attack: ImageAttack, batch: Batch, targets: dict[str, Tensor]) -> Tensor:
        towers = self.student.towers  # not the model, which DistributedDataParallel may have wrapped
        with evaluating(towers), torch.no_grad():
            outputs = {"text": towers.encode_text_by_length(batch["text"]), "logit_scale": towers.log_scale().exp()}
            bias = towers.bias()
            outputs |= {} if bias is None else {"logit_bias": bias.detach()}
        weights = replace(
            self.weights,
            contrastive_weight=1.0 if self.teacher is None else 0.0,
            gkl=replace(self.weights.gkl, soft_ce_weight=attack.soft_ce_weight, wmse_weight=attack.wmse_weight),
        )

        def attack_loss(image: Tensor) -> Tensor:
            loss, _ = _logits_loss(outputs | {"image": image}, targets, weights, self.teacher_weights)
            return len(image) * loss  # the sum: float16 would round the gradients of the mean to 0

        return pgd(
            ImageTower(self.student),
            self.student.scaled(batch["image"]),
            loss=attack_loss,
            epsilon=attack.epsilon,
            step_size=attack.step_size,
            steps=attack.steps,
            norm=attack.norm,
        )

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Embeddings and scale. `model` is a `Student`, possibly wrapped; `batch` comes from a `PairStream`."""
        scaled_images = batch["attacked"] if "attacked" in batch else self.student.scaled(batch["image"])
        return model(self.student.normalised(scaled_images), batch["text"])

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Caption ids, and the teacher's embeddings of the clean images and of the captions."""
        if "targets" in batch:
            return batch["targets"]
        return {"text_ids": batch["text_ids"]} | ({} if self.teacher is None else self.teacher(batch))

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms. A model with a bias is a SigLIP and gets the sigmoid forms. All ranks."""
        logits = {name: tensor for name, tensor in outputs.items() if not name.startswith("mapped_")}
        loss, scalars = _logits_loss(logits, targets, self.weights, self.teacher_weights)
        if self.teacher is None or not self.weights.mapped:
            return loss, scalars | self._means(scalars)
        spaces = _teacher_spaces(outputs, targets)
        banks = self._banks(targets) if self.weights.cross.counts else [{}] * len(spaces)  # all ranks
        for number, (weight, space, bank) in enumerate(zip(self.teacher_weights, spaces, banks, strict=True)):
            terms: dict[str, Tensor] = {}
            if self.weights.mimicry_weight:
                terms["mimicry"] = mimicry_loss(**space)
                loss = loss + weight * self.weights.mimicry_weight * terms["mimicry"]
            if self.weights.cross.counts:
                bias = targets.get(numbered("teacher_logit_bias", number))
                term, cross_scalars = cross_logits_loss(
                    **space,
                    **bank,
                    teacher_logit_scale=targets[numbered("teacher_logit_scale", number)],
                    teacher_logit_bias=bias,
                    sigmoid="logit_bias" in outputs and bias is not None,
                    **vars(self.weights.cross),
                )
                loss, terms = loss + weight * term, terms | cross_scalars
            suffix = f".{number}" if len(spaces) > 1 else ""
            scalars |= {f"{name}{suffix}": term.detach() for name, term in terms.items()}
        return loss, scalars | self._means(scalars)

    def _means(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of several teachers: the terms of all, weighed by their shares."""
        names = [name.removesuffix(".0") for name in scalars if name.endswith(".0") and name[:-2] in AVERAGED]
        by_teacher = {name: [scalars[f"{name}.{k}"] for k in range(len(self.teacher_weights))] for name in names}
        return {
            name: torch.stack([w * term for w, term in zip(self.teacher_weights, terms, strict=True)]).sum()
            for name, terms in by_teacher.items()
        }

    def _banks(self, targets: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """`text_bank` and `image_bank` of each teacher, with the first caption of each image. All ranks."""
        texts, images = by_teacher(targets, "teacher_text"), by_teacher(targets, "teacher_image")
        texts = [text if text.ndim == 2 else text[:, 0] for text in texts]
        columns = self.bank.columns(torch.cat(texts, dim=1), torch.cat(images, dim=1))  # all ranks
        by_kind = [bank.split([image.shape[1] for image in images], dim=1) for bank in columns]
        return [{"text_bank": text, "image_bank": image} for text, image in zip(*by_kind, strict=True)]

    def state(self) -> dict[str, Tensor]:
        """The bank's, where cross logits count."""
        return self.bank.state() if self.weights.cross.counts else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned. All ranks."""
        if self.weights.cross.counts:
            self.bank.load_state(state)


def _teacher_spaces(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """In the space of each teacher: the student's and the teacher's embeddings of the images and of all captions."""
    images, texts = by_teacher(targets, "teacher_image"), by_teacher(targets, "teacher_text")
    dims = [image.shape[-1] for image in images]
    ours = [outputs[f"mapped_{side}"].flatten(0, -2).split(dims, dim=1) for side in ("image", "text")]
    return [
        {"image": image, "text": text, "teacher_image": their_image, "teacher_text": their_text.flatten(0, -2)}
        for image, text, their_image, their_text in zip(*ours, images, texts, strict=True)
    ]


def _logits_loss(
    outputs: dict[str, Tensor], targets: dict[str, Tensor], weights: ClipKdWeights, shares: Sequence[float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """`image_text_loss` of outputs and targets."""
    sigmoid = "logit_bias" in outputs
    teachers: dict[str, Any] = {}
    if "teacher_image" in targets:
        names = ("teacher_image", "teacher_text", "teacher_logit_scale")
        teachers |= {name: by_teacher(targets, name) for name in names}
        biases = [targets.get(numbered("teacher_logit_bias", number)) for number in range(len(shares))]
        teachers |= {"teacher_logit_bias": biases, "teacher_weights": shares}
        teachers["teacher_sigmoid"] = [sigmoid and bias is not None for bias in biases]
    return image_text_loss(
        **outputs,
        **teachers,
        text_ids=targets["text_ids"],
        **vars(weights.gkl),
        contrastive_weight=weights.contrastive_weight,
        sigmoid=sigmoid,
    )
