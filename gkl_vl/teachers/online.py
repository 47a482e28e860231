"""Teachers that are evaluated on every batch."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gkl_vl.models.classifiers import Classifier
from gkl_vl.models.clip import Clip
from gkl_vl.protocols import Batch

Teacher = Callable[[Batch], dict[str, Tensor]]
"""batch -> {"teacher_image", "teacher_logit_scale"}, plus "teacher_logit_bias" of a SigLIP and "teacher_text" where the
batch has captions; without gradient. Those of further teachers are named by `numbered`."""


def numbered(name: str, number: int) -> str:
    """The name of a tensor of teacher `number`: "teacher_image", "teacher_image.1", "teacher_image.2", ..."""
    return name if number == 0 else f"{name}.{number}"


def by_teacher(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """The tensors of this name, of each teacher that has one."""
    return [tensors[key] for number in range(len(tensors)) if (key := numbered(name, number)) in tensors]


def online_teacher(*clips: Clip) -> Teacher:
    """Teachers that embed every batch, each with its own image preparation and its own tokens."""

    @torch.no_grad()
    def teacher(batch: Batch) -> dict[str, Tensor]:
        outputs = {}
        for number, clip in enumerate(clips):
            image, text = numbered("teacher_image", number), numbered("teacher_text", number)
            outputs[image] = clip.towers.encode_image(clip.prepare(batch["image"])).float()
            if text in batch:
                outputs[text] = clip.towers.encode_text_by_length(batch[text]).float()
            outputs |= {numbered(name, number): value for name, value in teacher_scales(clip).items()}
        return outputs

    return teacher


def with_scales(teacher: Teacher, scales: Sequence[float], device: torch.device) -> Teacher:
    """The teachers with these logit scales in place of their own."""
    fixed = {
        numbered("teacher_logit_scale", number): torch.tensor(scale, device=device)
        for number, scale in enumerate(scales)
    }
    return lambda batch: teacher(batch) | fixed


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
