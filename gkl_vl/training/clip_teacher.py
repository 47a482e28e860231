"""What a CLIP run distils from: a teacher that embeds every batch, views of the bundled set with their embeddings in
memory, or a store (`recipes/store_teacher.py`), with which no teacher is loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gkl_vl import cli
from gkl_vl.data.augment import Augmentation, drawing_augmentation, light_augmentation, mild_drawing_augmentation
from gkl_vl.data.pairs import bundled_pairs
from gkl_vl.data.sources import Source
from gkl_vl.errors import UserError
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.teachers.embeddings import StoredEmbeddings, stored_embeddings_teacher
from gkl_vl.teachers.online import Teacher, online_teacher
from gkl_vl.teachers.store import StoredViews, store_views, stored_teacher
from gkl_vl.training.run import Run

# The bundled set is small: a fixed number of views lets the teacher embed each once (teachers/store.py).
BUNDLED_VIEWS = 6


@dataclass(frozen=True, kw_only=True)
class ClipModels:
    """Teacher and student."""

    teacher: str = "bundled"
    """An open_clip name, hf-hub:org/repo, local-dir:path, transformers:org/repo, `bundled`, or `none`."""
    teacher_pretrained: str | None = None
    """For a teacher given by an open_clip name: open_clip's tag, a file of weights, or TAG=FILE, a file of that tag."""
    teacher_store: Path | None = None
    """A folder that recipes/store_teacher.py wrote from the same data: its embeddings in place of --teacher's."""
    student: str = "emoji-student"
    """As --teacher, or a shipped config: ViT-T-16, FastViT-T8, emoji-student. A plain name has random weights."""

    @property
    def distils(self) -> bool:
        """Whether there is a teacher, loaded or stored."""
        return self.teacher != "none" or self.teacher_store is not None


@dataclass(frozen=True, kw_only=True)
class RunTeacher:
    """The teacher of a run."""

    name: str | None
    """As it was named to `load_clip`; None = the student learns alone."""
    clip: Clip | None = None
    """Frozen, on its device; None where it is stored or there is none."""
    store: StoredEmbeddings | None = None

    @property
    def embed_dim(self) -> int | None:
        """Length of its embeddings."""
        if self.store is not None:
            return self.store.manifest.teachers[0].embed_dim
        return None if self.clip is None else self.clip.embed_dim


def open_teacher(
    models: ClipModels, source: Source, *, bundled: bool, device: torch.device, allow_pickle: bool
) -> RunTeacher:
    """The teacher that the flags name.

    Raises: UserError for one that cannot be loaded, for a store of other data, and for flags that exclude each other.
    """
    if models.teacher_store is not None:
        if models.teacher != ClipModels().teacher:
            raise UserError(f"--teacher {models.teacher} has no effect with --teacher-store: leave one out")
        cli.refuse_unused(vars(models), ["teacher_pretrained"], "has no effect with --teacher-store")
        store = StoredEmbeddings(models.teacher_store)
        store.check(source, augmentation(bundled=bundled, distils=True))
        return RunTeacher(name=store.manifest.teachers[0].name, store=store)
    if models.teacher == "none":
        cli.refuse_unused(vars(models), ["teacher_pretrained"], "has no effect with --teacher none")
        return RunTeacher(name=None)
    clip = freeze(load_clip(models.teacher, models.teacher_pretrained, allow_pickle=allow_pickle))
    clip.towers.to(device).to(memory_format=torch.channels_last)
    return RunTeacher(name=models.teacher, clip=clip)


def augmentation(*, bundled: bool, distils: bool) -> Augmentation:
    """The augmentation of a data source, for both models."""
    if not bundled:
        return light_augmentation
    return mild_drawing_augmentation if distils else drawing_augmentation


def views_at(student: Clip, teacher: RunTeacher, *, bundled: bool) -> Callable[..., Tensor]:
    """Views at the size of the student, or of an online teacher where that is larger."""
    sizes = [student.image_size] + ([] if teacher.clip is None else [teacher.clip.image_size])
    return augmentation(bundled=bundled, distils=teacher.name is not None)(max(sizes))


def store_bundled_views(run: Run, teacher: Clip, student: Clip, augment: Callable) -> StoredViews:
    """Views of the bundled drawings with the teacher's embeddings, from disk after the first run."""
    with run.accelerator.main_process_first():  # the others find the file
        return bundled_views(teacher, student, augment, num_workers=run.flags.workers)


def bundled_views(teacher: Clip, student: Clip, augment: Callable, *, num_workers: int = 0) -> StoredViews:
    """`store_bundled_views` on one process."""
    return store_views(
        clip=teacher,
        pairs=bundled_pairs(),
        num_views=BUNDLED_VIEWS,
        augment=augment,
        size=student.image_size,
        num_workers=num_workers,
    )


def make_teacher(teacher: RunTeacher, views: StoredViews | None, device: torch.device) -> Teacher | None:
    """The teacher's embeddings of a batch: those that came with it, those in memory, or computed."""
    if teacher.store is not None:
        return stored_embeddings_teacher(teacher.store, device)
    if teacher.clip is None:
        return None
    return online_teacher(teacher.clip) if views is None else stored_teacher(teacher.clip, views, device)
