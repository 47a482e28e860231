"""Data loader workers: under every start method, ended with their parent, and stopped by data that cannot be used."""

import os
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import set_start_method
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import processes, set_up
from small_models import tiny_clip
from small_sets import colour_set, picture, write_picture, write_shard
from torch.utils.data import DataLoader, Dataset

from gkl_vl.data.augment import imagenet_augmentation, imagenet_center, light_augmentation
from gkl_vl.data.labelled import open_labelled
from gkl_vl.data.pair_stream import PairLoader, PairStream, Position
from gkl_vl.data.pairs import bundled_pairs, open_images, open_source
from gkl_vl.data.sources import RawPair, Source, memory_source
from gkl_vl.data.synthesized import WithSynthesized, open_synthesized
from gkl_vl.data.views import DiskViews
from gkl_vl.data.workers import end_with_parent, worker_batches
from gkl_vl.errors import UserError
from gkl_vl.evaluation.embed import Embedder, embed_images
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.models.clip import load_clip
from gkl_vl.teachers.embed_pairs import build_blocks, describe_store, finish_store
from gkl_vl.teachers.embeddings import StoredEmbeddings

RED = picture("red")


def lengths(texts: list[str]) -> torch.Tensor:
    """A tokenizer."""
    return torch.tensor([[len(text)] for text in texts])


def loader(source: Source, *, num_workers: int = 0, start: Position | None = None, batch_size: int = 2) -> PairLoader:
    stream = PairStream(
        source,
        augment=light_augmentation(8),
        tokenizers={"text": lengths},
        batch_size=batch_size,
        seed=0,
        rank=0,
        world_size=1,
        num_workers=num_workers,
        start=start,
    )
    return PairLoader(stream)


# ---- start methods -----------------------------------------------------------------------------------------------


def batch_of_pairs(folder: Path) -> torch.Size:
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


def batch_of_views(folder: Path) -> torch.Size:
    for name in ("a", "b"):
        write_picture(folder / "images" / "train" / name / "0.png", "red")
    np.savez(folder / "more.npz", image=np.zeros((3, 8, 8, 3), np.uint8), label=np.zeros(3, int))
    data = WithSynthesized(
        open_labelled(str(folder / "images"), "train"), open_synthesized(f"{folder}/more.npz", num_classes=2)
    )
    both = DiskViews(data=data, augment=imagenet_augmentation(8), plain=imagenet_center(8), seed=0, num_workers=1)
    return next(both.batches(iter([(0, torch.tensor([1, 4]))]))).shape


def embedded_set(folder: Path) -> torch.Size:
    embedder = Embedder(clip=load_clip("emoji-student"), num_workers=1)
    return embed_images(embedder, load_benchmark_set(str(folder / "set")), "cls").rows.shape


def block_of_store(folder: Path) -> torch.Size:
    teacher, source = tiny_clip(folder), memory_source("emoji", bundled_pairs()[:2])
    manifest = describe_store([teacher], source, light_augmentation, views=2, dtype="float16", kept_size=8)
    build_blocks(folder / "store", manifest, [0], [teacher], source, light_augmentation, num_workers=1)
    finish_store(folder / "store", manifest)
    return StoredEmbeddings(folder / "store").block(0)["pixels"].shape


@pytest.fixture
def start_by():
    """start_by(method) sets the method by which loaders start workers, until the end of the test."""
    processes()  # a forkserver of workers is the one of the tests, which has imported the slow modules
    yield partial(set_start_method, force=True)
    set_start_method(None, force=True)


LOADERS = [batch_of_pairs, batch_of_views, embedded_set, block_of_store]


# spawn is the default of macOS, forkserver that of Linux from Python 3.14 on. Both send the same pickle of a loader, so
# one loader is enough for spawn, whose worker imports torch.
@pytest.mark.parametrize(
    "method, loaders", [("forkserver", LOADERS), ("spawn", LOADERS[:1])], ids=["forkserver", "spawn"]
)
def test_every_loader_runs_under_spawn_and_forkserver(tmp_path, start_by, method, loaders):
    colour_set(tmp_path / "set", ["red", "green", "blue", "red"])
    start_by(method)
    shapes = [tuple(load(tmp_path)) for load in loaders]
    assert shapes == [(2, 3, 8, 8), (2, 3, 8, 8), (4, 256), (2, 2, 3, 8, 8)][: len(loaders)]


@pytest.mark.parametrize(
    "kind", ["shards", "sized shards", "csv", "jsonl", "parquet", "hub", "folder", "memory", "images"]
)
def test_a_source_is_the_same_after_pickling(tmp_path, kind, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(RED)
        (tmp_path / f"{name}.txt").write_text(f"caption {name}")
    table = datasets.Dataset.from_dict({"image": [RED] * 3, "caption": ["x", "y", "z"]})
    if kind.endswith("shards"):
        write_shard(tmp_path / "s.tar", [(name, {"png": RED, "txt": name.encode()}) for name in "abc"])
        if kind.startswith("sized"):
            (tmp_path / "sizes.json").write_text('{"s.tar": 3}')
    (tmp_path / "t.csv").write_text("filepath,title\na.png,one\nb.png,two\n")
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "caption": "one"}\n')
    table.to_parquet(tmp_path / "t.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    (tmp_path / "pairs").mkdir()
    for name in ("a.png", "a.txt"):
        (tmp_path / name).rename(tmp_path / "pairs" / name)
    names = {"csv": "t.csv", "jsonl": "t.jsonl", "parquet": "t.parquet", "folder": "pairs", "images": "pairs"}
    if kind == "memory":
        source = memory_source("toy", [RawPair("a", RED, ("x",))])
    elif kind == "hub":
        source = open_source("org/name")
    else:
        open_it = open_images if kind == "images" else open_source
        source = open_it(str(tmp_path / names.get(kind, "s.tar")))
    again = pickle.loads(pickle.dumps(source))
    before, after = (list(each.epoch(3, 1, 0, 1)) for each in (source, again))
    assert before == after and before and again.num_pairs == source.num_pairs


# ---- the end of workers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Busy:
    """Pairs whose epoch writes the process id and never yields one."""

    file: Path
    blocks = ()

    def read(self, block: int) -> Iterator[RawPair]:
        raise NotImplementedError

    def epoch(self, seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        self.file.with_suffix(".new").write_text(str(os.getpid()))
        self.file.with_suffix(".new").rename(self.file)
        while True:
            sum(range(1000))
        yield


def run_busy_loader(file: Path) -> None:
    set_up()
    next(iter(loader(Source("busy", None, None, Busy(file)), num_workers=1)))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of processes from /proc")
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_a_busy_worker_ends_with_its_parent(tmp_path, signal_number):
    parent = processes().Process(target=run_busy_loader, args=(tmp_path / "pid",))
    parent.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").is_file():
        assert parent.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text())
    assert is_running(worker)
    os.kill(parent.pid, signal_number)
    parent.join()
    deadline = time.monotonic() + 5
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = is_running(worker)
    if alive:
        os.kill(worker, signal.SIGKILL)
    assert not alive


class Dying(Dataset):
    """A worker that is killed, as by the kernel when memory is short."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_worker_is_one_line():
    batches = worker_batches(DataLoader(Dying(), num_workers=1, worker_init_fn=end_with_parent))
    with pytest.raises(
        UserError, match="a data worker ended .DataLoader worker .* memory, so lower --workers"
    ) as caught:
        list(batches)
    assert "\n" not in str(caught.value)


# ---- data that cannot be used ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_an_epoch_without_a_usable_pair_is_an_error(num_workers, count):
    broken = [RawPair(f"p{index}", b"no image", ("x",)) for index in range(count)]
    with pytest.raises(
        UserError, match=rf"'toy' has no usable pairs for worker 0 of 1: {count} read, among them p\d+ .image"
    ):
        next(iter(loader(memory_source("toy", broken), num_workers=num_workers)))


def test_a_source_without_pairs_is_an_error(tmp_path):
    write_shard(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match="has no usable pairs for worker 0 of 1: 0 read: repair the data"):
        next(iter(loader(open_source(str(tmp_path / "a.tar")))))


def files(folder: Path, count: int) -> Source:
    for index in range(count):
        (folder / f"{index}.png").write_bytes(RED)
        (folder / f"{index}.txt").write_text("red")
    return open_source(str(folder))


@pytest.mark.parametrize("resumed", [False, True])
def test_files_that_vanish_in_mid_run_stop_it(tmp_path, resumed):
    """2,000 pairs are read before, so that a count of the first thousand would not notice."""
    source = files(tmp_path, 20)
    first = loader(source, batch_size=100)
    batches = iter(first)
    for _ in range(20):
        next(batches)
    if resumed:
        batches = iter(loader(source, batch_size=100, start=Position.of(first.position())))
    for file in tmp_path.glob("*.png"):
        file.unlink()
    with pytest.raises(UserError, match="has no usable pairs|of the last 1000 pairs") as caught:
        list(islice(batches, 3))
    assert "No such file" in str(caught.value)


def test_broken_pairs_count_in_a_window_that_moves(tmp_path):
    """4 % broken runs on; 6 % broken later stops, also when it was 0 % before, and across a resume."""

    def mixed(share: float) -> Source:
        pairs = [RawPair(f"p{i}", RED if i >= 100 * share else b"", ("x",)) for i in range(100)]
        return memory_source("toy", pairs)

    good = loader(mixed(0.04), batch_size=50)
    assert sum(1 for _ in islice(good, 60)) == 60 and good.num_skipped() > 100
    position = good.position()
    assert all(len(place[4]) <= 50 for place in position["places"])
    with pytest.raises(UserError, match="51 of the last 1000 pairs of 'toy' are broken"):
        list(islice(loader(mixed(0.06), batch_size=50, start=Position.of(position)), 60))


def test_both_kinds_of_tokenizers_are_picklable(tmp_path):
    tokenize = tiny_clip(tmp_path).tokenize
    assert torch.equal(pickle.loads(pickle.dumps(tokenize))(["a cat"]), tokenize(["a cat"]))
