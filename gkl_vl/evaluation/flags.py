"""Flags shared by the evaluation scripts, and functions that load the sets and models that the flags name."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gkl_vl.disk_cache import cache_folder
from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import Subject, refuse_random_weights
from gkl_vl.evaluation.embed import Embedder
from gkl_vl.evaluation.sets import BenchmarkSet, load_benchmark_sets
from gkl_vl.models.clip import load_clip


@dataclass(frozen=True, kw_only=True)
class EvalFlags:
    """Options shared by the evaluation scripts."""

    dataset_root: str | None = None
    """Folder of the set, or its URL on the Hub; {dataset} and {dataset_cleaned} are replaced by its name."""
    split: str = "test"
    """Split of the sets."""
    custom_classname_file: str | None = None
    """JSON: {dataset: [class names]}, or {dataset: {class or folder: name}}."""
    custom_template_file: str | None = None
    """JSON: {dataset: [prompts with {c}]} or {dataset: {class: [prompts]}}."""
    batch_size: int = 64
    """Images, or texts, per forward pass and process."""
    num_workers: int = 2
    """Workers that decode images, per process; 0 = decode in the process itself."""
    amp: bool = False
    """Autocast (fp16 on a GPU, bf16 on a CPU), as CLIP_benchmark does without --no_amp."""
    max_broken: float = 0.001
    """Largest share of a set's images that may fail to decode; they are left out and counted. More are an error."""
    cache: bool = True
    """Cache embeddings on disk, under a hash of model, preprocessing and data."""
    seed: int = 0
    """Seed of the bootstrap for the intervals, of few-shot draws and of attacks."""
    allow_pickle: bool = False
    """Allow weights stored as a pickle, which can execute code when they are read."""


def load_sets(names: Sequence[str], flags: EvalFlags, *, split: str | None = None) -> list[BenchmarkSet]:
    """Loads evaluation sets with the root, split and files of `flags`; `split` overrides the split."""
    if not names:
        raise UserError("--dataset names no set: give one, or leave it out")
    return load_benchmark_sets(
        names,
        root=flags.dataset_root,
        split=flags.split if split is None else split,
        classname_file=flags.custom_classname_file,
        template_file=flags.custom_template_file,
    )


def load_subject(model: str, pretrained: str | None, flags: EvalFlags, device: torch.device) -> Subject:
    """Loads a model to `device`, with an embedder of its images and texts.

    Raises: UserError as `load_clip`, and for an architecture without weights.
    """
    refuse_random_weights(model, pretrained)
    clip = load_clip(model, pretrained, allow_pickle=flags.allow_pickle)
    clip.towers.to(device)
    embedder = Embedder(
        clip=clip,
        device=device,
        batch_size=flags.batch_size,
        num_workers=flags.num_workers,
        amp=flags.amp,
        max_broken=flags.max_broken,
        cache=cache_folder("embeddings") if flags.cache else None,
        progress=True,
    )
    return Subject(model=model, pretrained=pretrained or "", embedder=embedder)


def load_subjects(
    model: str, pretrained: str | None, teacher: str | None, flags: EvalFlags, device: torch.device
) -> tuple[Subject, Subject | None]:
    """Loads a model, and the teacher to compare it with; None without a teacher."""
    subject = load_subject(model, pretrained, flags, device)
    return subject, None if teacher is None else load_subject(teacher, None, flags, device)
