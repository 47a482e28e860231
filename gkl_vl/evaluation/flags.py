"""Flags that the evaluation scripts share, and the sets and models that they name."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gkl_vl.disk_cache import cache_folder
from gkl_vl.evaluation.benchmark import Subject, refuse_random_weights
from gkl_vl.evaluation.embed import Embedder
from gkl_vl.evaluation.sets import BenchmarkSet, load_benchmark_sets
from gkl_vl.models.clip import load_clip


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What every evaluation of a CLIP asks."""

    dataset_root: str | None = None
    """Folder of the set, or its URL on the Hub; {dataset} and {dataset_cleaned} are filled in."""
    split: str = "test"
    """Of the sets."""
    custom_classname_file: str | None = None
    """JSON: {dataset: [class names]}."""
    custom_template_file: str | None = None
    """JSON: {dataset: [prompts with {c}]} or {dataset: {class: [prompts]}}."""
    batch_size: int = 64
    """Images, or texts, per forward pass and process."""
    num_workers: int = 2
    """Processes that decode images, per process; 0 = this one."""
    amp: bool = False
    """Autocast (fp16 on a GPU, bf16 on a CPU), as CLIP_benchmark does unless told --no_amp."""
    max_broken: float = 0.001
    """Share of a set's images that may fail to decode; they are left out and counted. More of them are an error."""
    cache: bool = True
    """Keep embeddings on disk, under a hash of model, preprocessing and data."""
    seed: int = 0
    """Of the bootstrap that the intervals come from."""
    allow_pickle: bool = False
    """Read weights stored as a pickle."""


def load_sets(names: Sequence[str], flags: Flags, *, split: str | None = None) -> list[BenchmarkSet]:
    """The sets that the flags name; another split than theirs where one is given."""
    return load_benchmark_sets(
        names,
        root=flags.dataset_root,
        split=split or flags.split,
        classname_file=flags.custom_classname_file,
        template_file=flags.custom_template_file,
    )


def load_subject(model: str, pretrained: str | None, flags: Flags, device: torch.device) -> Subject:
    """A model that is ready to embed.

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
    model: str, pretrained: str | None, teacher: str | None, flags: Flags, device: torch.device
) -> tuple[Subject, Subject | None]:
    """A model, and the teacher that it is compared with."""
    subject = load_subject(model, pretrained, flags, device)
    return subject, None if teacher is None else load_subject(teacher, None, flags, device)
