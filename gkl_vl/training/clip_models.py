"""Flags that name the models of a CLIP run: teachers, the student, its initial weights, and what of it is trained."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class TeacherModels:
    """One teacher, or several whose soft targets are averaged."""

    teacher: tuple[str, ...] = ("bundled",)
    """Each an open_clip name, hf-hub:org/repo, local-dir:path, transformers:org/repo, `bundled`; in a run also none."""
    teacher_pretrained: tuple[str, ...] | None = None
    """Of each teacher that is an open_clip name: open_clip's tag, a file of weights, or TAG=FILE; `none` of another."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """The weights that the student starts from."""

    student_pretrained: str | None = None
    """Of a student that is an open_clip name or a config: open_clip's tag, a file of weights, or TAG=FILE."""
    student_init: Literal["random"] | None = None
    """random = random weights also for a student that comes with weights. None = its own."""
    init_from_teacher: bool = False
    """Take layers, heads and neurons of a larger ViT teacher for the student's weights (TinyCLIP's inheritance)."""
    inherit_layers: tuple[int, ...] | None = None
    """With --init-from-teacher: the teacher's image layers to take, from 0. None = evenly spaced."""
    inherit_text_layers: tuple[int, ...] | None = None
    """With --init-from-teacher: the teacher's text layers to take, from 0. None = evenly spaced."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """The part of the student that is trained."""

    lock_image: bool = False
    """Freeze the image tower."""
    lock_text: bool = False
    """Freeze the text tower."""
    unlocked_groups: int = 0
    """Of a locked tower the last groups that are trained: the projection, the last block, ... 0 = none."""
    freeze_norm_stats: bool = False
    """Keep the running statistics of batch norms in frozen layers."""
    lora_rank: int | None = None
    """Train low-rank adapters of this rank in place of the student, and merge them at the end. None = no adapters."""
    lora_alpha: float | None = None
    """The adapters' scale is alpha / rank. None = 2 * rank."""
    lora_targets: tuple[str, ...] | None = None
    """Names of modules that get adapters, or the ends of names. None = attention and MLPs of both towers."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory and speed of the student's passes."""

    grad_checkpointing: bool = False
    """Compute activations again in the backward pass in place of keeping them."""
    torchcompile: bool = False
    """Compile the model with torch.compile; the first step of each shape takes minutes."""
    patch_dropout: float = 0.0
    """Share of a ViT's patches that each training step leaves out."""


@dataclass(frozen=True, kw_only=True)
class StudentFlags:
    """The student's initial weights, the part of it that is trained, and the cost of its passes."""

    start: Annotated[InitialWeights, tyro.conf.arg(name="")] = InitialWeights()
    adaptation: Annotated[Adaptation, tyro.conf.arg(name="")] = Adaptation()
    memory: Annotated[Memory, tyro.conf.arg(name="")] = Memory()


@dataclass(frozen=True, kw_only=True)
class ClipModels:
    """Teachers and student."""

    teachers: Annotated[TeacherModels, tyro.conf.arg(name="")] = TeacherModels()
    teacher_store: tuple[str, ...] | None = None
    """Folders that recipes/store_teacher.py wrote from the same data, or the .json of a data set of MobileCLIP's."""
    teacher_scale: tuple[float, ...] | None = None
    """Logit scale of each teacher in the loss. None = the model's own."""
    teacher_shares: tuple[float, ...] | None = None
    """Relative share of each of several teachers in the targets. None = equal."""
    student: str = "emoji-student"
    """As --teacher, or a shipped config: ViT-T-16, FastViT-T8, emoji-student. A plain name has random weights."""

    @property
    def distils(self) -> bool:
        """Whether there is a teacher, loaded or stored; --teacher none = the student learns alone."""
        return self.teachers.teacher != ("none",) or self.teacher_store is not None
