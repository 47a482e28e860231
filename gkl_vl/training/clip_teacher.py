"""What a CLIP run distils from: teachers that embed every batch, or stores of their embeddings.

A store is one that `recipes/store_teacher.py` wrote, with which no teacher is loaded, or that of the bundled data.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from gkl_vl import cli
from gkl_vl.atomic import replacing_folder
from gkl_vl.data.augment import (
    Augmentation,
    apply_seeded,
    drawing_augmentation,
    light_augmentation,
    mild_drawing_augmentation,
    view_seed,
)
from gkl_vl.data.images import BrokenSample, decode
from gkl_vl.data.pairs import bundled_pairs
from gkl_vl.data.prompts import Prompts
from gkl_vl.data.sources import Source, memory_source
from gkl_vl.disk_cache import cache_folder
from gkl_vl.errors import UserError
from gkl_vl.evaluation.embed import Embedder, zero_shot_classifier
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.teachers.dataset_dr import DatasetDr, read_dataset_dr
from gkl_vl.teachers.embed_pairs import build_blocks, describe_store, finish_store
from gkl_vl.teachers.embeddings import (
    JoinedStores,
    StoredEmbeddings,
    identity_of,
    open_stores,
    pair_digest,
    stored_teacher,
    unpacked,
)
from gkl_vl.teachers.online import Teacher, online_teacher, with_scales
from gkl_vl.training.clip_models import ClipModels, TeacherModels
from gkl_vl.training.run import Run

BUNDLED_VIEWS = 6
"""The bundled set is small: with a fixed number of views the teacher embeds each once, and the views are kept."""
SAME_TEACHER = 0.98
"""Smallest cosine between a teacher's embedding and its stored one; int8 and half precision have at least 0.999."""


@dataclass(frozen=True, kw_only=True)
class RunTeachers:
    """The teachers of a run; without any the student learns alone."""

    names: Sequence[str] = ()
    """As they were named to `load_clip`."""
    clips: Sequence[Clip] = ()
    """Frozen, on their device; none where they are stored."""
    store: JoinedStores | DatasetDr | None = None
    """Their embeddings; beside loaded teachers those of the bundled data."""
    scales: Sequence[float] | None = None
    """Logit scales in place of their own."""
    shares: tuple[float, ...] = (1.0,)
    """Of each in the targets, with sum 1."""

    @property
    def title(self) -> str | None:
        """Their names in one; None without a teacher."""
        return " + ".join(self.names) or None

    @property
    def embed_dims(self) -> list[int]:
        """Length of the embeddings of each."""
        return [teacher.embed_dim for teacher in (self.clips if self.store is None else self.store.teachers)]

    def classes(self, prompts: Prompts, device: torch.device) -> list[Float[Tensor, "C _e"]]:
        """Class embeddings of each, computed or stored, on the device. All ranks.

        Raises: UserError for a store of other prompts.
        """
        if self.clips:
            return class_embeddings(self.clips, prompts, device)  # all ranks
        assert self.store is not None  # there is a teacher
        return [rows.to(device) for rows in self.store.classes(prompts)]


def open_teachers(
    models: ClipModels,
    source: Source,
    *,
    bundled: bool,
    device: torch.device,
    allow_pickle: bool,
    loaded_too: bool = False,
) -> RunTeachers:
    """The teachers that the flags name.

    With `loaded_too` --teacher may name a stored teacher as well, which is not loaded here.

    Raises: UserError for one that cannot be loaded, for a store of other data, and for flags that exclude each other.
    """
    if not models.distils:
        for flags, names in ((models.teachers, ["teacher_pretrained"]), (models, ["teacher_scale", "teacher_shares"])):
            cli.refuse_unused(vars(flags), names, "has no effect with --teacher none")
        return RunTeachers()
    if models.teacher_store is None:
        clips = load_teachers(models.teachers, device=device, allow_pickle=allow_pickle)
        teachers = RunTeachers(names=models.teachers.teacher, clips=clips)
    else:
        if not loaded_too:
            _refuse_beside_store(models.teachers)
        store = _checked_store(models.teacher_store, source, bundled=bundled)
        teachers = RunTeachers(names=[teacher.name for teacher in store.teachers], store=store)
    count = len(teachers.names)
    for flag, values in (("--teacher-scale", models.teacher_scale), ("--teacher-shares", models.teacher_shares)):
        if values is not None and len(values) != count:
            raise UserError(f"{flag} has {len(values)} values for {count} teachers: give one for each")
    shares = (1.0,) * count if models.teacher_shares is None else models.teacher_shares
    total = math.fsum(shares)
    return replace(teachers, scales=models.teacher_scale, shares=tuple(share / total for share in shares))


def _refuse_beside_store(models: TeacherModels) -> None:
    if models.teacher != TeacherModels().teacher:
        raise UserError(f"--teacher {' '.join(models.teacher)} has no effect with --teacher-store: leave one out")
    cli.refuse_unused(vars(models), ["teacher_pretrained"], "has no effect with --teacher-store")


def _checked_store(names: Sequence[str], source: Source, *, bundled: bool) -> JoinedStores | DatasetDr:
    """The stores of these names. Raises: UserError for one of other data."""
    reinforced = [name for name in names if name.lower().endswith(".json")]
    if not reinforced:
        store = open_stores(names)
        store.check(source, augmentation(bundled=bundled, distils=True))
        return store
    if len(names) > 1:
        raise UserError(f"--teacher-store {' '.join(names)}: {reinforced[0]} has views of its own: name it alone")
    reinforced_data = read_dataset_dr(reinforced[0])
    reinforced_data.check(source)
    return reinforced_data


def load_teachers(models: TeacherModels, *, device: torch.device, allow_pickle: bool) -> list[Clip]:
    """Frozen teachers on their device, not wrapped by Accelerate. Raises: UserError as `load_clip`."""
    names = models.teacher
    if "none" in names:
        raise UserError(f"--teacher {' '.join(names)}: `none` has no place among teachers: leave it out")
    if len(set(names)) < len(names):
        raise UserError(f"--teacher {' '.join(names)} names one twice: leave one out")
    tags = ("none",) * len(names) if models.teacher_pretrained is None else models.teacher_pretrained
    if len(tags) != len(names):
        raise UserError(
            f"--teacher-pretrained has {len(tags)} values for {len(names)} teachers: give one for each, `none` for one "
            "that comes with weights"
        )
    loaded = []
    for name, tag in zip(names, tags, strict=True):
        clip = freeze(load_clip(name, None if tag == "none" else tag, allow_pickle=allow_pickle))
        clip.towers.to(device).to(memory_format=torch.channels_last)
        loaded.append(clip)
    return loaded


def teacher_of(
    teachers: RunTeachers, models: TeacherModels, source: Source, *, bundled: bool, allow_pickle: bool
) -> Clip:
    """The only teacher of a run, loaded where it is stored: by --teacher, or by the name in the store.

    Raises: UserError for several teachers, and for another one than the stored.
    """
    if len(teachers.names) != 1:
        raise UserError(f"{len(teachers.names)} teachers, and the student can take weights of one alone: name one")
    if teachers.clips:
        return teachers.clips[0]
    if not isinstance(teachers.store, JoinedStores):
        raise UserError(
            "--teacher-store names a data set of MobileCLIP's, which has no weights that a student can take: give "
            "--teacher in its place"
        )
    (stored,) = teachers.store.teachers
    named = models if models.teacher != TeacherModels().teacher else replace(models, teacher=(stored.name,))
    if len(named.teacher) != 1:
        raise UserError(f"--teacher {' '.join(named.teacher)}: the store has one teacher, so name that one")
    (clip,) = load_teachers(named, device=torch.device("cpu"), allow_pickle=allow_pickle)
    cosine = _cosine_with_store(clip, teachers.store, source, augmentation(bundled=bundled, distils=True))
    if cosine < SAME_TEACHER:
        raise UserError(
            f"--teacher {clip.name} embeds the first image of {source.name!r} with a cosine of {cosine:.3f} to its "
            f"stored embedding: it is not the {stored.name} of the store, name that with --teacher and "
            "--teacher-pretrained"
        )
    return clip


@torch.inference_mode()
def _cosine_with_store(clip: Clip, store: JoinedStores, source: Source, augment: Augmentation) -> float:
    """Between a teacher's embedding of the first whole pair's first view and the stored one; 0 for other lengths."""
    for pair in source.pairs.read(0):
        try:
            outputs = store.of_pair(pair, 0, [])
            image = decode(pair.image)
        except BrokenSample:
            continue
        stored = unpacked(outputs["teacher_image"], outputs.get("teacher_image_scale"))
        view = apply_seeded(augment(clip.image_size), image, view_seed(pair.key, 0))
        own = clip.towers.encode_image(clip.prepare(view[None]))[0].float()
        return float(own @ stored) if own.shape == stored.shape else 0.0
    return 1.0  # no pair is whole: training refuses the data


def class_embeddings(clips: Sequence[Clip], prompts: Prompts, device: torch.device) -> list[Float[Tensor, "C _e"]]:
    """Each teacher's zero-shot classifier, from the user's cache after the first time. All ranks."""
    embedders = [Embedder(clip=clip, device=device, batch_size=256, cache=cache_folder("embeddings")) for clip in clips]
    return [
        zero_shot_classifier(embedder, classnames=prompts.classnames, templates=prompts.templates)  # all ranks
        for embedder in embedders
    ]


def augmentation(*, bundled: bool, distils: bool) -> Augmentation:
    """The augmentation of a data source, for both models."""
    if not bundled:
        return light_augmentation
    return mild_drawing_augmentation if distils else drawing_augmentation


def views_at(student: Clip, teachers: RunTeachers, *, bundled: bool) -> Callable[..., Tensor]:
    """Views at the size of the student, or of an online teacher where that is larger."""
    size = max(clip.image_size for clip in (student, *teachers.clips))
    return augmentation(bundled=bundled, distils=bool(teachers.names))(size)


def with_bundled_store(run: Run, teachers: RunTeachers, student: Clip) -> RunTeachers:
    """For the bundled data: the teachers' embeddings of a fixed number of views, from disk after the first run."""
    if not teachers.clips or teachers.store is not None:
        return teachers
    with run.accelerator.main_process_first():  # the others find the files
        store = bundled_store(teachers.clips, student.image_size, num_workers=run.flags.workers)
    return replace(teachers, store=JoinedStores([store]))


def bundled_store(
    teachers: Sequence[Clip], size: int, *, num_workers: int = 0, folder: Path | None = None
) -> StoredEmbeddings:
    """A store of the bundled pairs with their views, in the user's cache; a damaged one is built again.

    Args:
        teachers: frozen, on their device.
        size: side of the kept views, that of the student's images.
        folder: where stores are kept; None = the user's cache.
    """
    pairs, augment = bundled_pairs(), augmentation(bundled=True, distils=True)
    source = memory_source("emoji", pairs)
    manifest = describe_store(teachers, source, augment, views=BUNDLED_VIEWS, dtype="float16", kept_size=size)
    digest = hashlib.sha256(bytes(identity_of(manifest).tolist()))
    for teacher in teachers:
        digest.update(teacher.towers.log_scale().device.type.encode())
        digest.update(teacher.tokenize([caption for pair in pairs for caption in pair.captions]).numpy().tobytes())
    digest.update(str([pair_digest(pair, pair.captions) for pair in pairs]).encode())
    path = (folder or cache_folder("teacher")) / f"emoji-{digest.hexdigest()[:32]}"
    try:
        store = StoredEmbeddings(path)
        store.block(0)
        return store
    except UserError:  # there is none, or it is damaged
        with replacing_folder(path) as scratch:
            build_blocks(scratch, manifest, [0], teachers, source, augment, num_workers=num_workers)
            finish_store(scratch, manifest)
    return StoredEmbeddings(path)


def make_teacher(teachers: RunTeachers, device: torch.device) -> Teacher | None:
    """The teachers' embeddings of a batch: those that came with it, or computed."""
    if not teachers.names:
        return None
    if teachers.store is None:
        teacher = online_teacher(*teachers.clips)
    else:
        teacher = stored_teacher(teachers.store.teachers, device)
    return teacher if teachers.scales is None else with_scales(teacher, teachers.scales, device)
