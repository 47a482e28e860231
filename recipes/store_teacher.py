"""Store the embeddings that CLIP teachers have of a training set once, for any number of students.

    accelerate launch recipes/store_teacher.py --kept-size 64 --out emoji-store
    accelerate launch recipes/clip_kd.py --teacher-store emoji-store

stores the bundled teacher's embeddings of six views of each bundled drawing; two minutes on two CPU cores. With your
own teacher and data, in every format that clip_kd.py reads, on any number of processes:

    accelerate launch recipes/store_teacher.py --teacher ViT-L-14 --teacher-pretrained laion400m_e32 \
        --train-data '/data/cc12m-{0000..2175}.tar' --views 5 --precision bf16 --out /data/cc12m-vit-l-14

A run with --teacher-store never loads the teacher. It draws the stored views again from the images, so it needs the
data too, in the same shards; pairs, captions and augmentation are compared with those of the store. A build that was
stopped goes on where it stopped. The format: gkl_vl/teachers/embeddings.py.

Source: Vasu et al., "MobileCLIP", CVPR 2024, arXiv 2311.17049 (dataset reinforcement), which stores the parameters of
each augmentation; here a view is a function of the pair's key and the view's number.
"""

import re
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from gkl_vl import cli
from gkl_vl.atomic import hold_folder, leftovers, release_folder
from gkl_vl.data.pairs import open_images
from gkl_vl.data.prompts import Prompts, bundled_prompts, read_prompts
from gkl_vl.data.sources import Source
from gkl_vl.errors import UserError
from gkl_vl.teachers.embed_pairs import build_blocks, describe_store, finish_store, missing_blocks
from gkl_vl.teachers.embeddings import MANIFEST, Manifest, StoreDtype, write_classes
from gkl_vl.training.clip import PairData, open_pairs
from gkl_vl.training.clip_models import TeacherModels
from gkl_vl.training.clip_teacher import (
    BUNDLED_VIEWS,
    augmentation,
    class_embeddings,
    load_teachers,
)
from gkl_vl.training.engine import check_all_processes_joined
from gkl_vl.training.run import ACCELERATE_PRECISION, on_main

OWN_FILES = re.compile(r"manifest\.json|\.lock|(\d{5,}|classes)\.safetensors")
TIMEOUT = timedelta(days=7)  # a process that has built its blocks may wait for the others for hours


@dataclass(frozen=True, kw_only=True)
class Store:
    """What is stored, and where."""

    out: Path = Path("teacher-store")
    """Folder of the store. One that holds part of the same store is completed."""
    views: int = BUNDLED_VIEWS
    """Augmented views of each image; a run takes them in turn, one an epoch."""
    kept_size: int | None = None
    """Store the views too, of this side in pixels: training then decodes and augments nothing. For small sets."""
    prompts: str | None = None
    """Images alone, and the embeddings of class prompts: clip_unlabelled.py's --prompts, or `bundled`."""
    image_column: str | None = None
    """With --prompts: image column of a table, ending of the images of shards, as in clip_unlabelled.py."""
    dtype: StoreDtype = "float16"
    """int8, with a scale for each embedding, takes half the space; docs/teachers.md has its error."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How it is computed."""

    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Of the teacher's forward pass. None = as set by `accelerate launch` or `accelerate config`."""
    workers: int = 2
    """Processes that read, decode and augment, for each embedding process."""
    allow_pickle: bool = False
    """Read weights stored as pickles (.pth, .pt, .bin), with weights_only=True."""
    debug: bool = False
    """Print the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Store a CLIP teacher's embeddings of a training set."""

    store: Store = Store()
    model: TeacherModels = TeacherModels()
    data: PairData = PairData()
    run: Processes = Processes()


def main(config: Config) -> None:
    accelerator = Accelerator(
        mixed_precision=ACCELERATE_PRECISION[config.run.precision],
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    check_all_processes_joined(accelerator)
    folder = config.store.out
    on_main(accelerator, lambda: take(folder))  # all ranks
    source, prompts = open_data(config)
    teachers = load_teachers(config.model, device=accelerator.device, allow_pickle=config.run.allow_pickle)
    augment = augmentation(bundled=config.data.train_data is None, distils=True)
    manifest = describe_store(
        teachers,
        source,
        augment,
        views=config.store.views,
        dtype=config.store.dtype,
        precision=accelerator.mixed_precision,
        kept_size=config.store.kept_size,
    )
    missing = on_main(accelerator, lambda: unfinished(folder, manifest))  # all ranks
    started = time.monotonic()
    build_blocks(
        folder,
        manifest,
        missing[accelerator.process_index :: accelerator.num_processes],
        teachers,
        source,
        augment,
        num_workers=config.run.workers,
        autocast=lambda: accelerator.autocast(),
        quiet=not accelerator.is_local_main_process,
    )
    classes = None if prompts is None else class_embeddings(teachers, prompts, accelerator.device)  # all ranks
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if prompts is not None and classes is not None:
            write_classes(folder, manifest, classes, prompts)
        print(summary(folder, finish_store(folder, manifest), source, time.monotonic() - started))
        release_folder(folder)
    accelerator.end_training()


def open_data(config: Config) -> tuple[Source, Prompts | None]:
    """Pairs, or with --prompts images and their class prompts."""
    data, prompts = config.data, config.store.prompts
    if prompts is None:
        cli.refuse_unused(vars(config.store), ["image_column"], "has no effect without --prompts, --columns names both")
        return open_pairs(data), None
    cli.refuse_unused(vars(data), ["columns"], "has no effect with --prompts, --image-column names the image")
    if data.caption_lines:
        raise UserError("--caption-lines has no effect with --prompts, captions are not read: leave it out")
    if prompts == "bundled" and data.train_data is not None:
        raise UserError("--prompts bundled are those of the bundled data: name a file for --train-data's")
    if data.train_data is None:
        cli.refuse_unused(vars(config.store), ["image_column"], "has no effect without --train-data")
    source = open_images(data.train_data, column=config.store.image_column, quoted=data.quoted)
    return source, bundled_prompts() if prompts == "bundled" else read_prompts(prompts, classnames=source.classnames)


def take(folder: Path) -> None:
    """Takes the folder for this process and removes what killed builders left there.

    Raises: UserError where another process builds there, and for a folder with other content.
    """
    if folder.is_file():
        raise UserError(f"--out {folder} is a file: name a folder")
    if folder.parts and folder.parts[0].endswith(":"):
        raise UserError(f"--out {folder} is an address, and a store is written on this machine alone: copy it there")
    content = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    written = {path.name for path in leftovers(folder)}
    if others := [name for name in content if not OWN_FILES.fullmatch(name) and name not in written]:
        raise UserError(f"--out {folder} holds {others[0]!r}, which is not of a store: name another folder")
    hold_folder(folder)
    for path in leftovers(folder):
        path.unlink()


def unfinished(folder: Path, manifest: Manifest) -> list[int]:
    """The blocks that are not built. While there are any the folder has no manifest: it cannot be trained on."""
    missing = missing_blocks(folder, manifest)
    if missing:
        (folder / MANIFEST).unlink(missing_ok=True)
    return missing


def summary(folder: Path, manifest: Manifest, source: Source, seconds: float) -> str:
    """What was stored, and how to use it."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    names = " + ".join(teacher.name for teacher in manifest.teachers)
    broken = f", {manifest.broken:,} of them broken" if manifest.broken else ""
    return (
        f"{folder}: {names} on {manifest.pairs:,} {source.things}{broken} · {manifest.views} views "
        f"· {manifest.dtype} · {size / 2**20:,.1f} MiB, {size / manifest.pairs:,.0f} bytes each · {seconds:,.0f} s\n"
        f"Train on it with --teacher-store {folder}"
    )


if __name__ == "__main__":
    cli.run(main, Config)
