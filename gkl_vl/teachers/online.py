"""Teachers that are evaluated on every batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from gkl_vl.models.classifiers import Classifier
from gkl_vl.models.clip import Clip
from gkl_vl.protocols import Batch

Teacher = Callable[[Batch], dict[str, Tensor]]
"""batch -> {"teacher_image", "teacher_logit_scale"}, plus "teacher_logit_bias" of a SigLIP and "teacher_text" where the
batch has captions; without gradient."""


def online_teacher(clip: Clip) -> Teacher:
    """A teacher that embeds every batch, with its own image preparation and its own tokens."""

    @torch.no_grad()
    def teacher(batch: Batch) -> dict[str, Tensor]:
        outputs = {"teacher_image": clip.towers.encode_image(clip.prepare(batch["image"])).float()}
        if "teacher_text" in batch:
            outputs["teacher_text"] = clip.towers.encode_text_by_length(batch["teacher_text"]).float()
        return outputs | teacher_scales(clip)

    return teacher


@torch.no_grad()
def teacher_scales(clip: Clip) -> dict[str, Tensor]:
    """The teacher's logit scale, exponentiated, and its bias if it has one."""
    scales = {"teacher_logit_scale": clip.towers.log_scale().exp().detach()}
    bias = clip.towers.bias()
    return scales if bias is None else scales | {"teacher_logit_bias": bias.detach()}


LabelTeacher = Callable[[Batch], Tensor]
"""batch -> the teacher's logits [n, C], without gradient."""


def online_label_teacher(classifier: Classifier) -> LabelTeacher:
    """A classifier in evaluation mode as teacher, with its own normalisation."""

    @torch.no_grad()
    def teacher(batch: Batch) -> Tensor:
        return classifier.model(classifier.prepare(batch["image"])).float()

    return teacher
