"""Training data and stores at addresses: memory:// in this process, and a web server on this machine."""

import json
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import ClassVar

import datasets
import fsspec
import pytest
import test_recipes
import torch
from small_models import CONFIG, tiny_clip
from small_sets import write_shard
from test_teacher_store import build, loader, pattern, pattern_shards

from gkl_vl import addresses
from gkl_vl.data import sources
from gkl_vl.data.augment import drawing_augmentation, light_augmentation
from gkl_vl.data.pairs import open_images, open_source
from gkl_vl.errors import UserError
from gkl_vl.models.modes import freeze
from gkl_vl.teachers import embeddings
from gkl_vl.teachers.embeddings import StoredEmbeddings

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine's cores
call = test_recipes.call


class Quiet(SimpleHTTPRequestHandler):
    faults: ClassVar[dict[str, int]] = {}
    """Status of the next answer, by path."""

    def do_GET(self):
        if self.path in self.faults:
            self.send_error(self.faults.pop(self.path))
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Shards with sizes.json, a parquet file, and a store of the shards."""
    folder = tmp_path_factory.mktemp("served")
    pattern_shards(folder, 6, 4)
    (folder / "sizes.json").write_text(json.dumps({f"{number:03d}.tar": 4 for number in range(6)}))
    table = {"image": [pattern(n) for n in range(5)], "caption": [f"caption {n}" for n in range(5)]}
    datasets.Dataset.from_dict(table).to_parquet(folder / "t.parquet", batch_size=2)
    (folder / "t.csv").write_text("filepath,title\nx.png,text\n")
    source = open_source(f"{folder}/{{000..005}}.tar")
    for name, augmentation in (("store", drawing_augmentation), ("light", light_augmentation)):
        build(folder / name, freeze(tiny_clip(folder)), source, augmentation=augmentation)
    (folder / "student.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def web(place) -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(place)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def memory(place) -> str:
    system = fsspec.filesystem("memory")
    system.put(str(place), "/served", recursive=True)
    return "memory://served"


@pytest.fixture(params=["memory", "web"])
def address(request) -> str:
    return request.getfixturevalue(request.param)


def contents(source) -> list[tuple]:
    pairs = [pair for block in range(len(source.pairs.blocks)) for pair in source.pairs.read(block)]
    return [(pair.key, pair.image, pair.captions, pair.problem) for pair in pairs]


def test_shards_and_parquet_are_read_as_from_the_disk(place, address):
    for name in ("{000..005}.tar", "t.parquet"):
        here, there = open_source(f"{place}/{name}"), open_source(f"{address}/{name}")
        assert contents(here) == contents(there) and there.num_pairs == here.num_pairs
    assert len(contents(open_images(f"{address}/000.tar"))) == 4


@pytest.mark.parametrize(("kind", "workers"), [("memory", 0), ("web", 3)])
def test_a_store_is_read_as_from_the_disk(place, request, kind, workers):
    """Also in forked workers, after this process has used the address."""
    address = request.getfixturevalue(kind)
    batches = []
    for root in (str(place), address):
        source, store = open_source(f"{root}/{{000..005}}.tar"), StoredEmbeddings(f"{root}/store")
        store.check(source, drawing_augmentation)
        batches.append(list(islice(iter(loader(source, store, workers=workers)), 14)))
    for here, there in zip(*batches, strict=True):
        assert here["keys"] == there["keys"]
        assert all(torch.equal(here[name], there[name]) for name in ("image", "teacher_image", "teacher_text"))


def test_files_of_a_store_are_fetched_once_and_few_are_kept(place, memory, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source, fetched = open_source(f"{place}/{{000..005}}.tar"), []
    whole = embeddings.fetched
    monkeypatch.setattr(embeddings, "fetched", lambda address: fetched.append(address) or whole(address))
    for pairs, most in ((20_000, 6), (4, 4)):  # of 4 pairs a file
        monkeypatch.setattr(embeddings, "FETCHED_PAIRS", pairs)
        store = StoredEmbeddings(f"{memory}/store")
        fetched.clear()
        for _ in range(2 if pairs > 4 else 1):  # two passes
            for block in range(6):
                store.of_pair(next(source.pairs.read(block)), 0, [0])
                assert len(store._files) <= most
        assert len(fetched) == 6
    assert not list(tmp_path.iterdir())


def test_other_sources_than_shards_need_the_store_here(place, memory, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_ROWS", 1)
    source = open_source(f"{place}/t.parquet")
    build(place / "rows", freeze(tiny_clip(place)), source)
    fsspec.filesystem("memory").put(str(place / "rows"), "/rows", recursive=True)
    with pytest.raises(UserError, match="is not on this machine, and an epoch of .*t.parquet', which are no shards"):
        StoredEmbeddings("memory://rows").check(source, drawing_augmentation)
    StoredEmbeddings(place / "rows").check(source, drawing_augmentation)


def test_a_server_without_ranges_and_with_faults_is_read(place, web, tmp_path):
    """A file larger than fsspec's 5 MiB blocks, and one fault of each file that is fetched."""
    samples = [(f"k{n}", {"png": pattern(n), "txt": b"x", "bin": bytes(2**20)}) for n in range(7)]
    write_shard(place / "large.tar", samples)
    assert len(contents(open_source(f"{web}/large.tar"))) == 7
    (place / "large.bin").write_bytes(bytes(6 * 2**20))
    Quiet.faults = {"/large.bin": 503}
    with addresses.fetched(f"{web}/large.bin") as copy:
        assert copy.stat().st_size == 6 * 2**20
    assert not Quiet.faults


def test_a_student_is_trained_from_a_web_server_alone(web, call, place):
    flags = ["--train-data", f"{web}/{{000..005}}.tar", "--teacher-store", f"{web}/light", "--epochs", "1"]
    flags += ["--student", place / "student.json", "--batch-size", "4", "--workers", "1", "--output-dir", "run"]
    code, out, errors = call(*flags)
    assert code == 0 and "6 steps of 4" in out, errors


def test_what_cannot_be_read_is_one_line(place, memory, web, call, monkeypatch):
    monkeypatch.setattr(addresses, "ATTEMPTS", 1)
    with pytest.raises(UserError, match="'http.*nosuch.tar' ends early or is damaged|cannot be read"):
        contents(open_source(f"{web}/nosuch.tar"))
    with pytest.raises(UserError, match="cannot be read .*: check the address"):
        contents(open_source("nosuch://x/000.tar"))
    with pytest.raises(UserError, match="s3fs.*: install it"):
        contents(open_source("s3://bucket/000.tar"))
    with pytest.raises(UserError, match="names no shard .* and folders at an address are not listed"):
        open_source(f"{web}/folder")
    with pytest.raises(UserError, match="is a table of image paths, and these are read on this machine alone"):
        open_source(f"{web}/t.csv")
    for root in (memory, web):
        with pytest.raises(UserError, match="nosuch is no store: it has no manifest.json"):
            StoredEmbeddings(f"{root}/nosuch")
    Quiet.faults = {"/sizes.json": 500}
    with pytest.raises(UserError, match="sizes.json' cannot be read"):
        open_source(f"{web}/000.tar")
    code, _, errors = call("--out", "s3://bucket/store", recipe="store_teacher")
    assert code == 2 and "is an address, and a store is written on this machine alone" in errors
    assert not Path("s3:").exists()


def test_a_damaged_store_at_an_address_is_refused(place):
    system = fsspec.filesystem("memory")
    system.put(str(place / "light"), "/damaged", recursive=True)
    content = system.cat_file("/damaged/00001.safetensors")
    store = StoredEmbeddings("memory://damaged/")
    store.block(1)
    system.pipe_file("/damaged/00001.safetensors", content[:-1] + bytes([content[-1] ^ 1]))
    store._files.clear()
    with pytest.raises(UserError, match="memory://damaged/00001.safetensors is damaged: copy it again"):
        store.block(1)  # also when it was sound the first time
    system.rm("/damaged/00003.safetensors")
    with pytest.raises(UserError, match="lacks 1 of its 6 files, the first is 00003.safetensors"):
        StoredEmbeddings("memory://damaged").check(open_source(f"{place}/{{000..005}}.tar"), light_augmentation)
    system.rm("/damaged/manifest.json")
    with pytest.raises(UserError, match="memory://damaged is no store"):
        StoredEmbeddings("memory://damaged")
