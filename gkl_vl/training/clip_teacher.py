"""What a CLIP run distils from: a teacher that embeds every batch, or a store of its embeddings.

A store is one that `recipes/store_teacher.py` wrote, with which no teacher is loaded, or that of the bundled data.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gkl_vl import cli
from gkl_vl.atomic import replacing_folder
from gkl_vl.data.augment import Augmentation, drawing_augmentation, light_augmentation, mild_drawing_augmentation
from gkl_vl.data.pairs import bundled_pairs
from gkl_vl.data.sources import Source, memory_source
from gkl_vl.disk_cache import cache_folder
from gkl_vl.errors import UserError
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.teachers.embed_pairs import build_blocks, describe_store, finish_store
from gkl_vl.teachers.embeddings import StoredEmbeddings, identity_of, pair_digest, stored_teacher
from gkl_vl.teachers.online import Teacher, online_teacher
from gkl_vl.training.run import Run

BUNDLED_VIEWS = 6
"""The bundled set is small: with a fixed number of views the teacher embeds each once, and the views are kept."""


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
    """Its embeddings; beside a loaded teacher those of the bundled data."""

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
    clip = load_teacher(models.teacher, models.teacher_pretrained, device=device, allow_pickle=allow_pickle)
    return RunTeacher(name=models.teacher, clip=clip)


def load_teacher(name: str, pretrained: str | None, *, device: torch.device, allow_pickle: bool) -> Clip:
    """A frozen teacher on its device, not wrapped by Accelerate. Raises: UserError as `load_clip`."""
    teacher = freeze(load_clip(name, pretrained, allow_pickle=allow_pickle))
    teacher.towers.to(device).to(memory_format=torch.channels_last)
    return teacher


def augmentation(*, bundled: bool, distils: bool) -> Augmentation:
    """The augmentation of a data source, for both models."""
    if not bundled:
        return light_augmentation
    return mild_drawing_augmentation if distils else drawing_augmentation


def views_at(student: Clip, teacher: RunTeacher, *, bundled: bool) -> Callable[..., Tensor]:
    """Views at the size of the student, or of an online teacher where that is larger."""
    sizes = [student.image_size] + ([] if teacher.clip is None else [teacher.clip.image_size])
    return augmentation(bundled=bundled, distils=teacher.name is not None)(max(sizes))


def with_bundled_store(run: Run, teacher: RunTeacher, student: Clip) -> RunTeacher:
    """For the bundled data: the teacher's embeddings of a fixed number of views, from disk after the first run."""
    if teacher.clip is None or teacher.store is not None:
        return teacher
    with run.accelerator.main_process_first():  # the others find the files
        return replace(teacher, store=bundled_store(teacher.clip, student.image_size, num_workers=run.flags.workers))


def bundled_store(teacher: Clip, size: int, *, num_workers: int = 0, folder: Path | None = None) -> StoredEmbeddings:
    """A store of the bundled pairs with their views, in the user's cache; a damaged one is built again.

    Args:
        teacher: frozen, on its device.
        size: side of the kept views, that of the student's images.
        folder: where stores are kept; None = the user's cache.
    """
    pairs, augment = bundled_pairs(), augmentation(bundled=True, distils=True)
    source = memory_source("emoji", pairs)
    manifest = describe_store([teacher], source, augment, views=BUNDLED_VIEWS, dtype="float16", kept_size=size)
    digest = hashlib.sha256(bytes(identity_of(manifest).tolist()) + teacher.towers.log_scale().device.type.encode())
    tokens = teacher.tokenize([caption for pair in pairs for caption in pair.captions])
    digest.update(tokens.numpy().tobytes() + str([pair_digest(pair, pair.captions) for pair in pairs]).encode())
    path = (folder or cache_folder("teacher")) / f"emoji-{digest.hexdigest()[:32]}"
    try:
        store = StoredEmbeddings(path)
        store.block(0)
        return store
    except UserError:  # there is none, or it is damaged
        with replacing_folder(path) as scratch:
            build_blocks(scratch, manifest, [0], [teacher], source, augment, num_workers=num_workers)
            finish_store(scratch, manifest)
    return StoredEmbeddings(path)


def make_teacher(teacher: RunTeacher, device: torch.device) -> Teacher | None:
    """The teacher's embeddings of a batch: those that came with it, or computed."""
    if teacher.store is not None:
        return stored_teacher(teacher.store, device)
    return None if teacher.clip is None else online_teacher(teacher.clip)
