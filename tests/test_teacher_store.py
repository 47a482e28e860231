"""A store of teacher embeddings: views drawn again, rows beside the right pairs, builds that go on, mismatches."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import test_recipes
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from small_models import tiny_clip
from small_sets import write_shard
from test_pairs import lengths, picture, write_shards
from test_recipes import CARD, HOUSE, python

from gkl_vl.data import augment, sources
from gkl_vl.data.augment import (
    Erasing,
    apply_seeded,
    drawing_augmentation,
    light_augmentation,
    mild_drawing_augmentation,
    view_seed,
)
from gkl_vl.data.images import decode
from gkl_vl.data.pair_stream import PairLoader, PairStream, Position
from gkl_vl.data.pairs import open_images, open_source
from gkl_vl.data.sources import RawPair, memory_source
from gkl_vl.errors import UserError
from gkl_vl.export.hub import export_clip
from gkl_vl.models.clip import load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.teachers import embeddings
from gkl_vl.teachers.embed_pairs import build_blocks, describe_store, finish_store, missing_blocks
from gkl_vl.teachers.embeddings import StoredEmbeddings, stored_embeddings_teacher
from gkl_vl.teachers.online import online_teacher

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine's cores
call = test_recipes.call
VIEWS = 3
AUGMENTATIONS = [light_augmentation, drawing_augmentation, mild_drawing_augmentation]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return freeze(tiny_clip(tmp_path_factory.mktemp("teacher")))


def photograph(side: int = 60) -> Image.Image:
    """Every pixel tells its place."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side + 20), indexing="ij")
    return Image.fromarray(torch.stack([3 * x, 4 * y, x + 2 * y], dim=2).to(torch.uint8).numpy())


def build(folder: Path, teacher, source, *, workers=0, augmentation=light_augmentation, dtype="float16", finish=True):
    manifest = describe_store([teacher], source, augmentation, views=VIEWS, dtype=dtype)
    blocks = missing_blocks(folder, manifest)
    build_blocks(folder, manifest, blocks, [teacher], source, augmentation, num_workers=workers)
    return finish_store(folder, manifest) if finish else manifest


def batches(source, store, teacher, count, *, size=16, workers=0, rank=0, world_size=1, captions=1):
    stream = PairStream(
        source,
        augment=light_augmentation(size),
        tokenizers={"text": lengths},
        batch_size=2,
        seed=5,
        rank=rank,
        world_size=world_size,
        num_workers=workers,
        captions_per_image=captions,
        stored=store,
    )
    return list(itertools.islice(iter(PairLoader(stream)), count))


# ---- views


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda one: one.__name__)
def test_a_view_is_drawn_again_bit_for_bit_and_at_another_size_with_the_same_box(augmentation):
    image = photograph()
    for view in range(12):
        seed = view_seed("a key", view)
        first = apply_seeded(augmentation(48), image, seed)
        torch.rand(7)  # the global generator has no part in it
        assert torch.equal(apply_seeded(augmentation(48), image, seed), first)
        large = apply_seeded(augmentation(96), image, seed).float()
        assert (F.avg_pool2d(large, 2) - first.float()).abs().mean() < 6
    assert not torch.equal(first, apply_seeded(augmentation(48), image, view_seed("another key", view)))


def test_a_rectangle_is_erased_at_the_same_place_in_every_size():
    erase, seen = Erasing(1.0, scale=(0.02, 0.2), ratio=(0.3, 3.3), value=255), []
    for seed in range(60):
        boxes = []
        for size in (64, 224):
            torch.manual_seed(seed)
            erased = (erase(torch.zeros(3, size, size, dtype=torch.uint8)) == 255).all(dim=0)
            rows, columns = (torch.nonzero(erased.any(dim=axis)).flatten() for axis in (1, 0))
            boxes.append([float(edge) / size for edge in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)])
        assert boxes[0] == pytest.approx(boxes[1], abs=1 / 64)
        seen.append((boxes[1][1] - boxes[1][0]) * (boxes[1][3] - boxes[1][2]))
    assert min(seen) > 0.015 and max(seen) < 0.21 and max(seen) - min(seen) > 0.12


# ---- what is stored


@pytest.mark.parametrize(("dtype", "cosine"), [("float16", 1 - 1e-6), ("int8", 0.9999)])
def test_what_is_read_back_is_the_teachers_embedding(teacher, tmp_path, dtype, cosine):
    source = open_source(write_shards(tmp_path, 2, 4))
    build(tmp_path / "store", teacher, source, dtype=dtype)
    store = StoredEmbeddings(tmp_path / "store")
    store.check(source, light_augmentation)
    for pair in (pair for block in range(2) for pair in source.pairs.read(block)):
        for view in range(VIEWS):
            pixels = apply_seeded(light_augmentation(16), decode(pair.image), view_seed(pair.key, view))
            batch = {"image": pixels[None], "teacher_text": teacher.tokenize([pair.captions[0]])}
            want, got = online_teacher(teacher)(batch), store.of_pair(pair, view, [0])
            for name in ("teacher_image", "teacher_text"):
                assert float(F.cosine_similarity(got[name].flatten(), want[name].flatten(), dim=0)) > cosine
    scales = stored_embeddings_teacher(store, torch.device("cpu"))({})
    assert scales == pytest.approx({"teacher_logit_scale": want["teacher_logit_scale"].item()})


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_pair_has_its_own_rows_beside_it(teacher, tmp_path, monkeypatch, workers, world_size):
    monkeypatch.setattr(sources, "BLOCK_ROWS", 5)
    pairs = [RawPair(f"p{i}", picture(i), tuple(f"{i} {c}" for c in range(1 + i % 3))) for i in range(13)]
    source = memory_source("toy", pairs)
    build(tmp_path, teacher, source, workers=2)
    store = StoredEmbeddings(tmp_path)
    keys = []
    for rank in range(world_size):
        for batch in batches(source, store, teacher, 12, workers=workers, rank=rank, world_size=world_size, captions=2):
            names = [["".join(map(chr, row)).strip() for row in rows] for rows in batch["text"].tolist()]
            texts = teacher.towers.encode_text(teacher.tokenize([name for row in names for name in row]))
            torch.testing.assert_close(batch["teacher_text"].flatten(0, 1), texts, atol=1e-3, rtol=0)
            online = online_teacher(teacher)({"image": batch["image"]})  # the views at the teacher's size
            torch.testing.assert_close(batch["teacher_image"], online["teacher_image"], atol=1e-3, rtol=0)
            keys += batch["keys"]
    assert set(keys) == {pair.key for pair in pairs}


def test_a_store_does_not_depend_on_workers_or_on_where_a_build_was_stopped(teacher, tmp_path):
    source = open_source(write_shards(tmp_path, 3, 5))
    for workers in (0, 2, 4):  # the last are more than the shards
        build(tmp_path / str(workers), teacher, source, workers=workers)
    manifest = describe_store([teacher], source, light_augmentation, views=VIEWS, dtype="float16")
    build_blocks(tmp_path / "parts", manifest, [1], [teacher], source, light_augmentation, num_workers=0)
    with pytest.raises(UserError, match="parts is not finished: it has no manifest.json"):
        StoredEmbeddings(tmp_path / "parts")
    assert missing_blocks(tmp_path / "parts", manifest) == [0, 2]
    build(tmp_path / "parts", teacher, source)
    files = [sorted((tmp_path / folder).iterdir()) for folder in ("0", "2", "4", "parts")]
    for same in zip(*files, strict=True):
        if same[0].suffix == ".json":
            assert len({path.read_text() for path in same}) == 1
            continue
        first, *others = map(load_file, same)
        for other in others:
            assert first.keys() == other.keys()
            for name, tensor in first.items():
                torch.testing.assert_close(tensor, other[name], atol=1e-3, rtol=0)


def test_broken_pairs_have_a_row_and_are_counted(teacher, tmp_path):
    samples = [(f"k{i}", {"png": picture(i), "txt": b"a caption"}) for i in range(6)]
    samples[1][1]["png"], samples[4][1]["txt"] = b"no image", b" "
    write_shard(tmp_path / "0.tar", samples)
    source = open_source(str(tmp_path / "0.tar"))
    manifest = build(tmp_path / "store", teacher, source)
    assert (manifest.pairs, manifest.broken) == (6, 2)
    taken = batches(source, StoredEmbeddings(tmp_path / "store"), teacher, 4)
    assert {key for batch in taken for key in batch["keys"]} == {"k0", "k2", "k3", "k5"}
    write_shard(tmp_path / "0.tar", [(key, {"png": b"no image", "txt": b"x"}) for key, _ in samples])
    with pytest.raises(UserError, match="all 6 pairs are broken"):
        build(tmp_path / "none", teacher, source)


def test_images_alone_are_stored_without_captions(teacher, tmp_path):
    source = open_images(write_shards(tmp_path, 1, 4))
    assert not build(tmp_path / "store", teacher, source).captioned
    assert not any(name.startswith("text") for name in load_file(tmp_path / "store" / "00000.safetensors"))
    (batch,) = batches(source, StoredEmbeddings(tmp_path / "store"), teacher, 1)
    assert batch["teacher_image"].shape == (2, 12) and "teacher_text" not in batch


# ---- what does not fit


@pytest.fixture(scope="module")
def built(teacher, tmp_path_factory):
    """(shards, store)"""
    place = tmp_path_factory.mktemp("built")
    shards = write_shards(place, 2, 4)
    build(place / "store", teacher, open_source(shards))
    return shards, place / "store"


def changed_manifest(store: Path, folder: Path, **changes) -> Path:
    folder.mkdir()
    for path in store.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | changes))
    return folder


def test_a_store_that_fits_is_accepted_where_the_shards_moved(built, tmp_path):
    shards, store = built
    write_shards(tmp_path, 2, 4)
    StoredEmbeddings(store).check(open_source(shards), light_augmentation)
    StoredEmbeddings(store).check(open_source(f"{tmp_path}/{{000..001}}.tar"), light_augmentation)


def test_each_kind_of_mismatch_is_refused_by_name(built, tmp_path):
    shards, folder = built
    source, store = open_source(shards), StoredEmbeddings(folder)
    with pytest.raises(UserError, match="was built on captions as well: build one for this recipe"):
        store.check(open_images(shards), light_augmentation)
    with pytest.raises(UserError, match="it has 2 blocks, the data have 1"):
        store.check(open_source(shards.replace("{000..001}", "000")), light_augmentation)
    with pytest.raises(UserError, match=r"its block 0 is '000.tar', that of the data '001.tar'"):
        store.check(open_source(shards.replace("{000..001}", "{001..000..-1}")), light_augmentation)
    with pytest.raises(UserError, match="with another augmentation, .*RandomResizedCrop.*training has .*RandomAffine"):
        store.check(source, mild_drawing_augmentation)
    for name, changes in (("rules", {"decode_rules": 1}), ("draws", {"draws": ["00" * 3 * 16 * 16] * 3})):
        other = StoredEmbeddings(changed_manifest(folder, tmp_path / name, **changes))
        with pytest.raises(UserError, match="draws other views from the same seeds"):
            other.check(source, light_augmentation)
    with pytest.raises(UserError, match="has format 9, this version reads 1: build the store again"):
        StoredEmbeddings(changed_manifest(folder, tmp_path / "format", format=9))
    with pytest.raises(UserError, match="is no store: it has no manifest.json"):
        StoredEmbeddings(tmp_path)
    missing = changed_manifest(folder, tmp_path / "missing")
    (missing / "00001.safetensors").unlink()
    with pytest.raises(UserError, match="lacks 1 of its 2 files, the first is 00001.safetensors"):
        StoredEmbeddings(missing).check(source, light_augmentation)


def test_small_differences_of_resampling_are_no_other_draw(built, tmp_path):
    shards, folder = built
    content = json.loads((folder / "manifest.json").read_text())
    for change, same in ((2, True), (9, False)):
        views = [bytes(min(value + change, 255) for value in bytes.fromhex(view)).hex() for view in content["draws"]]
        store = StoredEmbeddings(changed_manifest(folder, tmp_path / str(change), draws=views))
        assert embeddings._same_draws(store.manifest.draws, augment.draws(light_augmentation)) == same


def test_another_pair_other_captions_and_damage_are_refused_where_a_shard_is_opened(built, tmp_path):
    shards, folder = built
    source = open_source(shards)
    pair = next(source.pairs.read(1))
    for other in (
        dataclasses.replace(pair, key="k999"),
        dataclasses.replace(pair, captions=("another",)),
        dataclasses.replace(pair, row=3),
        dataclasses.replace(pair, row=4),
    ):
        with pytest.raises(UserError, match="another pair or other captions in the place of .*'001.tar'"):
            StoredEmbeddings(folder).of_pair(other, 0, [0])
    damaged = changed_manifest(folder, tmp_path / "damaged")
    content = bytearray((damaged / "00001.safetensors").read_bytes())
    content[-3] ^= 4
    (damaged / "00001.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="00001.safetensors is missing or damaged"):
        StoredEmbeddings(damaged).of_pair(pair, 0, [0])
    StoredEmbeddings(damaged).of_pair(next(source.pairs.read(0)), 0, [0])


def test_a_folder_with_another_store_is_refused(teacher, built):
    shards, folder = built
    for changes in ({"views": 2}, {"dtype": "int8"}):
        options = {"views": VIEWS, "dtype": "float16"} | changes
        with pytest.raises(UserError, match="00000.safetensors is of a store with other teachers, views, data"):
            missing_blocks(folder, describe_store([teacher], open_source(shards), light_augmentation, **options))


# ---- the recipes


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A student's config, shards, and a store built by two processes, whose teacher is gone."""
    folder = tmp_path_factory.mktemp("recipes")
    text = {"context_length": 24, "vocab_size": 4096, "hf_tokenizer_name": "gkl-vl/clip-bpe-4096"}
    for name, dim, size in (("student", 8, 16), ("teacher", 20, 48)):
        vision = {"image_size": size, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
        config = {"embed_dim": dim, "vision_cfg": vision, "text_cfg": text | {"width": 16, "heads": 2, "layers": 1}}
        (folder / f"{name}.json").write_text(json.dumps(config))
    export_clip(clip=load_clip(str(folder / "teacher.json")), folder=folder / "teacher", card=CARD)
    shards = write_shards(folder, 3, 4)
    script = HOUSE / "recipes" / "store_teacher.py"
    flags = ["--teacher", f"local-dir:{folder}/teacher", "--train-data", shards, "--views", "2", "--out", "store"]
    done = python("-m", "torch.distributed.run", "--nproc_per_node", "2", script, *flags, "--workers", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "on 12 pairs · 2 views · float16" in done.stdout and "--teacher-store store" in done.stdout
    shutil.rmtree(folder / "teacher")
    return folder


def flags_of(place: Path) -> list[str]:
    flags = ["--student", f"{place}/student.json", "--train-data", f"{place}/{{000..002}}.tar", "--batch-size", "4"]
    return [*flags, "--steps", "4", "--workers", "0", "--cross-wmse-weight", "6", "--captions-per-image", "2"]


def test_a_student_is_trained_on_a_store_alone(place, call):
    code, out, errors = call(*flags_of(place), "--teacher-store", place / "store", "--output-dir", "run")
    assert code == 0, errors
    assert f"distilled from local-dir:{place}/teacher" in out
    records = [json.loads(line) for line in Path("run/results.jsonl").read_text().splitlines()]
    assert {"train/mimicry", "train/soft_ce", "train/cross_wmse"} <= set(records[-1])
    assert load_clip("run").embed_dim == 8


@pytest.mark.parametrize("recipe", ["clip_kd", "clip_unlabelled"])
def test_flags_that_do_not_go_with_a_store_are_refused_before_there_is_a_folder(place, call, recipe):
    store = ["--teacher-store", place / "store", "--output-dir", "run"]
    cases = {
        "clip_kd": [
            (["--teacher", "none"], "--teacher none has no effect with --teacher-store"),
            (["--teacher-pretrained", "openai"], "--teacher-pretrained openai has no effect with --teacher-store"),
            (["--train-data", f"{place}/000.tar"], "it has 3 blocks, the data have 1"),
        ],
        "clip_unlabelled": [([], "--teacher-store has no embeddings of class prompts")],
    }
    given = flags_of(place) if recipe == "clip_kd" else []
    for flags, message in cases[recipe]:
        code, _, errors = call(*given, *store, *flags, recipe=recipe)
        assert code == 2 and message in errors and errors.count("\n") == 1
    assert not Path("run").exists()


def test_a_builder_leaves_other_folders_alone(place, call):
    flags = ["--teacher", f"{place}/teacher.json", "--train-data", f"{place}/000.tar", "--workers", "0"]
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("years of work")
    code, _, errors = call(*flags, "--out", "full", recipe="store_teacher")
    assert code == 2 and "--out full holds 'thesis.tex', which is not of a store" in errors
    assert [path.name for path in Path("full").iterdir()] == ["thesis.tex"]


def test_a_stream_with_a_store_resumes_exactly(place):
    source, store = open_source(f"{place}/{{000..002}}.tar"), StoredEmbeddings(place / "store")

    def loader(start=None):
        return PairLoader(
            PairStream(
                source,
                augment=light_augmentation(16),
                tokenizers={"text": lengths},
                batch_size=5,
                seed=1,
                rank=0,
                world_size=1,
                num_workers=0,
                stored=store,
                start=start,
            )
        )

    first = loader()
    whole = iter(first)
    for _ in range(2):
        next(whole)
    again = iter(loader(Position.of(first.position())))
    for _ in range(5):  # over two epochs, with two views
        want, got = next(whole), next(again)
        assert want["keys"] == got["keys"]
        for name in ("image", "text", "teacher_image", "teacher_text"):
            assert torch.equal(want[name], got[name])
