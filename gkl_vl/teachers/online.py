"""Teachers that are evaluated on every batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from gkl_vl.losses.image_text import class_logits
from gkl_vl.models.classifiers import Classifier
from gkl_vl.models.clip import Clip
from gkl_vl.protocols import Batch

Teacher = Callable[[Batch], dict[str, Tensor]]
"""batch -> {"teacher_image", "teacher_logit_scale", maybe "teacher_logit_bias"} and, of captions, "teacher_text";
without gradient."""


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


LabelTeacher = Callable[[Batch], Tensor]
"""batch -> the teacher's logits [n, C], without gradient."""


def online_label_teacher(classifier: Classifier) -> LabelTeacher:
    """The teacher, in evaluation mode, sees every batch as its own normalisation has it."""

    @torch.no_grad()
    def teacher(batch: Batch) -> Tensor:
        return classifier.model(classifier.prepare(batch["image"])).float()

    return teacher


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
