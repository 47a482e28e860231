"""Runs one batch of each loader in a worker process: `python worker_processes.py FOLDER spawn|forkserver`.

Not a test file: `test_workers.py` runs it in a process of its own, whose start method it sets.
"""

import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from small_models import tiny_clip
from small_sets import colour_set, write_picture

from gkl_vl.data.augment import imagenet_augmentation, imagenet_center, light_augmentation
from gkl_vl.data.labelled import open_labelled
from gkl_vl.data.pair_stream import PairLoader, PairStream
from gkl_vl.data.pairs import bundled_pairs, open_source
from gkl_vl.data.sources import memory_source
from gkl_vl.data.synthesized import WithSynthesized, open_synthesized
from gkl_vl.data.views import DiskViews
from gkl_vl.evaluation.embed import Embedder, embed_images
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.models.clip import load_clip
from gkl_vl.teachers.embed_pairs import build_blocks, describe_store, finish_store
from gkl_vl.teachers.embeddings import StoredEmbeddings


def pairs(folder: Path) -> torch.Size:
    clip = load_clip("emoji-student")
    stream = PairStream(
        open_source(f"{folder}/set/test/*.tar"),
        augment=light_augmentation(8),
        tokenizers={"text": clip.tokenize, "teacher_text": tiny_clip(folder).tokenize},
        batch_size=2,
        seed=0,
        rank=0,
        world_size=1,
        num_workers=1,
    )
    return next(iter(PairLoader(stream)))["image"].shape


def views(folder: Path) -> torch.Size:
    for name in ("a", "b"):
        write_picture(folder / "images" / "train" / name / "0.png", "red")
    np.savez(folder / "more.npz", image=np.zeros((3, 8, 8, 3), np.uint8), label=np.zeros(3, int))
    data = WithSynthesized(
        open_labelled(str(folder / "images"), "train"), open_synthesized(f"{folder}/more.npz", num_classes=2)
    )
    both = DiskViews(data=data, augment=imagenet_augmentation(8), plain=imagenet_center(8), seed=0, num_workers=1)
    return next(both.batches(iter([(0, torch.tensor([1, 4]))]))).shape


def evaluation(folder: Path) -> torch.Size:
    embedder = Embedder(clip=load_clip("emoji-student"), num_workers=1)
    return embed_images(embedder, load_benchmark_set(str(folder / "set")), "cls").rows.shape


def store(folder: Path) -> torch.Size:
    teacher, source = tiny_clip(folder), memory_source("emoji", bundled_pairs()[:2])
    manifest = describe_store([teacher], source, light_augmentation, views=2, dtype="float16", kept_size=8)
    build_blocks(folder / "store", manifest, [0], [teacher], source, light_augmentation, num_workers=1)
    finish_store(folder / "store", manifest)
    return StoredEmbeddings(folder / "store").block(0)["pixels"].shape


def main(folder: Path, method: str) -> None:
    multiprocessing.set_start_method(method)
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(["gkl_vl.evaluation.embed"])
    colour_set(folder / "set", ["red", "green", "blue", "red"])
    torch.set_num_threads(1)
    with ThreadPoolExecutor() as pool:  # most of the time workers import torch
        for shape in pool.map(lambda loader: loader(folder), (pairs, views, evaluation, store)):
            print(tuple(shape))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
