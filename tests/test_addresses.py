"""Training data and stores at addresses: memory:// in this process, and a web server on this machine."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import pytest
import test_recipes
import torch
from small_models import CONFIG, tiny_clip
from test_teacher_store import build, loader, pattern, pattern_shards

from gkl_vl.data.augment import drawing_augmentation, light_augmentation
from gkl_vl.data.pairs import open_images, open_source
from gkl_vl.errors import UserError
from gkl_vl.models.modes import freeze
from gkl_vl.teachers.embeddings import StoredEmbeddings

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine's cores
call = test_recipes.call


class Quiet(SimpleHTTPRequestHandler):
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


def test_no_more_than_a_few_files_of_a_store_are_in_memory(place, memory):
    store, source = StoredEmbeddings(f"{memory}/store"), open_source(f"{place}/{{000..005}}.tar")
    for block in range(6):
        store.of_pair(next(source.pairs.read(block)), 0, [0])
        assert len(store._files) <= 4
    assert not list(Path("/tmp").glob("gkl_vl-*/0000*.safetensors"))


def test_a_student_is_trained_from_a_web_server_alone(web, call, place):
    flags = ["--train-data", f"{web}/{{000..005}}.tar", "--teacher-store", f"{web}/light", "--epochs", "1"]
    flags += ["--student", place / "student.json", "--batch-size", "4", "--workers", "1", "--output-dir", "run"]
    code, out, errors = call(*flags)
    assert code == 0 and "6 steps of 4" in out, errors


def test_what_cannot_be_read_is_one_line(place, memory, web, call, tmp_path):
    with pytest.raises(UserError, match=r"'http.*nosuch.tar' cannot be read \(FileNotFoundError"):
        contents(open_source(f"{web}/nosuch.tar"))
    with pytest.raises(UserError, match="cannot be read .*: check the address"):
        contents(open_source("nosuch://x/000.tar"))
    with pytest.raises(UserError, match="is a table of image paths, and these are read on this machine alone"):
        open_source(f"{web}/t.csv")
    with pytest.raises(UserError, match="nosuch/manifest.json' cannot be read"):
        StoredEmbeddings(f"{memory}/nosuch")
    fsspec.filesystem("memory").rm("/served/light/00003.safetensors")
    with pytest.raises(UserError, match="lacks 1 of its 6 files, the first is 00003.safetensors"):
        StoredEmbeddings(f"{memory}/light").check(open_source(f"{place}/{{000..005}}.tar"), light_augmentation)
    with fsspec.open(f"{memory}/store/00001.safetensors", "r+b") as file:
        content = file.read()
    with fsspec.open(f"{memory}/store/00001.safetensors", "wb") as file:
        file.write(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="memory://served/store/00001.safetensors is damaged: copy it again"):
        StoredEmbeddings(f"{memory}/store").block(1)
    code, _, errors = call("--out", "s3://bucket/store", recipe="store_teacher")
    assert code == 2 and "is an address, and a store is written on this machine alone" in errors
    assert not Path("s3:").exists()
