"""A store of teacher embeddings: views drawn again, rows beside the right pairs, builds that go on, mismatches."""

import copy
import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import datasets
import pytest
import test_recipes
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from small_models import CONFIG, tiny_clip
from small_sets import write_shard
from test_pairs import lengths
from test_recipes import CARD, HOUSE, python

from gkl_vl import disk_cache
from gkl_vl.atomic import release_folder
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
from gkl_vl.data.pairs import bundled_pairs, open_source
from gkl_vl.data.sources import RawPair, memory_source
from gkl_vl.errors import UserError
from gkl_vl.export.hub import export_clip
from gkl_vl.models.clip import load_clip, resize
from gkl_vl.models.modes import freeze
from gkl_vl.teachers import embed_pairs, embeddings
from gkl_vl.teachers.embed_pairs import build_blocks, describe_store, finish_store, missing_blocks
from gkl_vl.teachers.embeddings import StoredEmbeddings, stored_teacher
from gkl_vl.teachers.online import online_teacher, teacher_scales
from gkl_vl.training import clip_teacher

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine's cores
call = test_recipes.call
VIEWS, DEVICE = 3, torch.device("cpu")
AUGMENTATIONS = [light_augmentation, drawing_augmentation, mild_drawing_augmentation]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return freeze(tiny_clip(tmp_path_factory.mktemp("teacher")))


def pattern(number: int) -> bytes:
    """A picture of its own for each number, and of another content in every crop."""
    colours = torch.randint(256, (3, 5, 5), generator=torch.Generator().manual_seed(number)).float()
    pixels = F.interpolate(colours[None], (40, 48), mode="nearest")[0].permute(1, 2, 0).to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png")
    return file.getvalue()


def pattern_shards(folder: Path, count: int, each: int) -> str:
    for shard in range(count):
        numbers = range(shard * each, (shard + 1) * each)
        samples = [(f"k{n:03d}", {"png": pattern(n), "txt": f"caption {n}".encode()}) for n in numbers]
        write_shard(folder / f"{shard:03d}.tar", samples)
    return f"{folder}/{{000..{count - 1:03d}}}.tar"


def photograph(side: int = 60) -> Image.Image:
    """Every pixel tells its place."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side + 20), indexing="ij")
    return Image.fromarray(torch.stack([3 * x, 4 * y, x + 2 * y], dim=2).to(torch.uint8).numpy())


def build(folder: Path, teacher, source, *, workers=0, augmentation=drawing_augmentation, dtype="float16"):
    manifest = describe_store([teacher], source, augmentation, views=VIEWS, dtype=dtype)
    blocks = missing_blocks(folder, manifest)
    build_blocks(folder, manifest, blocks, [teacher], source, augmentation, num_workers=workers)
    return finish_store(folder, manifest)


def distances(rows: torch.Tensor) -> torch.Tensor:
    """Largest differences of an entry, of all pairs of rows."""
    return (rows[:, None] - rows[None]).abs().amax(dim=2)[~torch.eye(len(rows), dtype=torch.bool)]


def loader(source, store, *, rank=0, world_size=1, workers=0, captions=1, batch_size=2, start=None) -> PairLoader:
    stream = PairStream(
        source,
        augment=drawing_augmentation(16),
        tokenizers={"text": lengths},
        batch_size=batch_size,
        seed=5,
        rank=rank,
        world_size=world_size,
        num_workers=workers,
        captions_per_image=captions,
        stored=store,
        start=start,
    )
    return PairLoader(stream)


def batches(source, store, count, **options):
    return list(itertools.islice(iter(loader(source, store, **options)), count))


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


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("shards", "float16"), ("shards", "int8"), ("parquet", "float16"), ("csv", "float16"), ("folder", "float16")],
)
def test_what_is_read_back_is_the_teachers_embedding(teacher, tmp_path, kind, dtype):
    error = 5e-4 if dtype == "float16" else 5e-3
    if kind == "shards":
        name = pattern_shards(tmp_path, 2, 4)
    elif kind == "parquet":
        table = {"image": [pattern(i) for i in range(8)], "caption": [f"caption {i}" for i in range(8)]}
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / "x.parquet", batch_size=4)
        name = str(tmp_path / "x.parquet")
    else:
        (tmp_path / "images").mkdir()
        for i in range(8):
            (tmp_path / "images" / f"{i}.png").write_bytes(pattern(i))
            (tmp_path / "images" / f"{i}.txt").write_text(f"caption {i}")
        (tmp_path / "x.csv").write_text("filepath,title\n" + "".join(f"images/{i}.png,caption {i}\n" for i in range(8)))
        name = str(tmp_path / "x.csv") if kind == "csv" else str(tmp_path / "images")
    source = open_source(name)
    build(tmp_path / "store", teacher, source, dtype=dtype)
    store = StoredEmbeddings(tmp_path / "store")
    store.check(source, drawing_augmentation)
    seen = []
    for pair in (pair for block in range(len(source.pairs.blocks)) for pair in source.pairs.read(block)):
        for view in range(VIEWS):
            pixels = apply_seeded(drawing_augmentation(16), decode(pair.image), view_seed(pair.key, view))
            batch = {"image": pixels[None], "teacher_text": teacher.tokenize([pair.captions[0]])}
            want, got = (
                online_teacher(teacher)(batch),
                stored_teacher(store.manifest.teachers, DEVICE)(store.of_pair(pair, view, [0])),
            )
            for name in ("teacher_image", "teacher_text"):
                assert float((got[name].flatten() - want[name].flatten()).abs().max()) < error
            seen.append(want["teacher_image"][0])
    assert len(seen) == 8 * VIEWS and distances(torch.stack(seen)).min() > 2 * 5e-4
    scales = stored_teacher(store.manifest.teachers, DEVICE)({})
    assert scales == pytest.approx({"teacher_logit_scale": want["teacher_logit_scale"].item()})


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (1, 2), (3, 1), (0, 4)])
def test_every_pair_has_its_own_rows_beside_it(teacher, tmp_path, monkeypatch, workers, world_size):
    monkeypatch.setattr(sources, "BLOCK_ROWS", 5)
    monkeypatch.setattr(embeddings, "OPEN_FILES", 1)
    pairs = [RawPair(f"p{i}", pattern(i), tuple(f"{i} {c}" for c in range(1 + i % 3))) for i in range(13)]
    source = memory_source("toy", pairs)
    build(tmp_path, teacher, source, workers=2)
    store = StoredEmbeddings(tmp_path)
    keys, images = [], []
    for rank in range(world_size):
        for batch in batches(source, store, 12, workers=workers, rank=rank, world_size=world_size, captions=2):
            batch |= stored_teacher(store.manifest.teachers, DEVICE)(batch)
            names = [["".join(map(chr, row)).strip() for row in rows] for rows in batch["text"].tolist()]
            texts = teacher.towers.encode_text(teacher.tokenize([name for row in names for name in row]))
            torch.testing.assert_close(batch["teacher_text"].flatten(0, 1), texts, atol=5e-4, rtol=0)
            online = online_teacher(teacher)({"image": batch["image"]})  # the views at the teacher's size
            torch.testing.assert_close(batch["teacher_image"], online["teacher_image"], atol=5e-4, rtol=0)
            keys += batch["keys"]
            images.append(batch["teacher_image"])
    assert set(keys) == {pair.key for pair in pairs}
    rows = torch.unique(torch.cat(images), dim=0)
    assert len(rows) > len(pairs) and distances(rows).min() > 5e-4  # several views of most


def test_a_store_does_not_depend_on_workers_or_on_where_a_build_was_stopped(teacher, tmp_path):
    source = open_source(pattern_shards(tmp_path, 3, 5))
    for workers in (0, 2, 4):  # the last are more than the shards
        build(tmp_path / str(workers), teacher, source, workers=workers)
    manifest = describe_store([teacher], source, drawing_augmentation, views=VIEWS, dtype="float16")
    build_blocks(tmp_path / "parts", manifest, [1], [teacher], source, drawing_augmentation, num_workers=0)
    with pytest.raises(UserError, match="parts is not finished, run .* again with the same flags"):
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


@pytest.mark.usefixtures("one_thread")  # the child is forked
def test_a_build_that_is_killed_at_any_moment_goes_on(teacher, tmp_path):
    """Before the first file, in the middle of one, before it has its name, between two, and before the manifest."""
    source = open_source(pattern_shards(tmp_path, 3, 3))
    build(tmp_path / "whole", teacher, source)
    save, write_json = disk_cache.save_file, embed_pairs.write_json

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def saver(moment: str, number: int):
        calls = itertools.count()

        def save_file(tensors, path, metadata):
            if next(calls) < number:
                save(tensors, path, metadata=metadata)
                return
            if moment != "before":
                save(tensors, path, metadata=metadata)
            if moment == "middle":
                os.truncate(path, path.stat().st_size // 2)
            die()

        return save_file

    moments = [("before", 0), ("middle", 0), ("after", 1), ("before", 2), ("manifest", 9)]
    for number, (moment, files) in enumerate(moments):
        folder = tmp_path / str(number)
        child = os.fork()
        if not child:
            disk_cache.save_file = saver(moment, files)
            embed_pairs.write_json = die if moment == "manifest" else write_json
            build(folder, teacher, source)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        finished = sorted(path.name for path in folder.glob("*.safetensors")) if folder.exists() else []
        assert len(finished) == min(files, 3) and not (folder / "manifest.json").exists()
        times = {name: (folder / name).stat().st_mtime_ns for name in finished}
        store_teacher = test_recipes.module(HOUSE / "recipes" / "store_teacher.py")
        store_teacher.take(folder)  # as the recipe does before it builds
        build(folder, teacher, source)
        release_folder(folder)
        assert {name: (folder / name).stat().st_mtime_ns for name in finished} == times  # not built again
        assert sorted(path.name for path in folder.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes()


@pytest.mark.parametrize("captions", [1, 2])
def test_kept_views_are_those_that_would_be_drawn(teacher, tmp_path, captions):
    source = open_source(pattern_shards(tmp_path, 1, 4))
    taken = []
    for kept_size in (None, 16):
        options = {"views": VIEWS, "dtype": "int8", "kept_size": kept_size}
        manifest = describe_store([teacher], source, drawing_augmentation, **options)
        build_blocks(tmp_path / str(kept_size), manifest, [0], [teacher], source, drawing_augmentation, num_workers=0)
        finish_store(tmp_path / str(kept_size), manifest)
        store = StoredEmbeddings(tmp_path / str(kept_size))
        taken.append(batches(source, store, 7, captions=captions))
    for drawn, kept in zip(*taken, strict=True):
        assert drawn.keys() == kept.keys() and drawn["keys"] == kept["keys"]
        for name in ("image", "teacher_image", "teacher_image_scale", "teacher_text", "teacher_text_scale", "text"):
            assert torch.equal(drawn[name], kept[name])
        assert kept["teacher_text"].shape == ((2, 12) if captions == 1 else (2, captions, 12))


def test_kept_views_are_of_the_size_that_was_given(teacher, tmp_path):
    source = open_source(pattern_shards(tmp_path, 1, 2))
    manifest = describe_store([teacher], source, light_augmentation, views=1, dtype="float16", kept_size=8)
    build_blocks(tmp_path / "store", manifest, [0], [teacher], source, light_augmentation, num_workers=0)
    finish_store(tmp_path / "store", manifest)
    store = StoredEmbeddings(tmp_path / "store")
    for pair in source.pairs.read(0):
        whole = apply_seeded(light_augmentation(16), decode(pair.image), view_seed(pair.key, 0))
        want = (resize(whole[None], 8)[0] * 255).round().byte()
        assert torch.equal(store.of_pair(pair, 0, [])["image"], want)


def test_building_does_not_advance_the_generator_and_a_full_disk_leaves_no_file(teacher, tmp_path, monkeypatch):
    source, before = open_source(pattern_shards(tmp_path, 1, 3)), torch.get_rng_state()
    build(tmp_path / "store", teacher, source)
    assert torch.equal(before, torch.get_rng_state())

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache, "save_file", broken)
    with pytest.raises(OSError):
        build(tmp_path / "full", teacher, source)
    assert not list((tmp_path / "full").iterdir())


def test_broken_pairs_have_a_row_and_are_counted(teacher, tmp_path):
    samples = [(f"k{i}", {"png": pattern(i), "txt": b"a caption"}) for i in range(6)]
    samples[1][1]["png"], samples[4][1]["txt"] = b"no image", b" "
    write_shard(tmp_path / "0.tar", samples)
    source = open_source(str(tmp_path / "0.tar"))
    manifest = build(tmp_path / "store", teacher, source)
    assert (manifest.pairs, manifest.broken) == (6, 2)
    taken = batches(source, StoredEmbeddings(tmp_path / "store"), 4)
    assert {key for batch in taken for key in batch["keys"]} == {"k0", "k2", "k3", "k5"}
    write_shard(tmp_path / "0.tar", [(key, {"png": b"no image", "txt": b"x"}) for key, _ in samples])
    with pytest.raises(UserError, match=r"6 of 6 pairs of '0.tar' are broken, among them k0 \(image: .*: repair"):
        build(tmp_path / "none", teacher, source)
    assert not (tmp_path / "none").exists()  # with other flags the folder can be used


def test_a_sigmoid_teachers_bias_is_stored(tmp_path):
    config = CONFIG | {"init_logit_bias": -7.5}
    (tmp_path / "siglip.json").write_text(json.dumps(config))
    teacher = freeze(load_clip(str(tmp_path / "siglip.json")))
    build(tmp_path / "store", teacher, open_source(pattern_shards(tmp_path, 1, 2)))
    outputs = stored_teacher(StoredEmbeddings(tmp_path / "store").manifest.teachers, DEVICE)({})
    assert outputs == pytest.approx({name: value.item() for name, value in teacher_scales(teacher).items()})
    assert outputs["teacher_logit_bias"] == -7.5


def test_embeddings_that_are_not_finite_are_refused(tmp_path):
    teacher = freeze(tiny_clip(tmp_path))
    teacher.towers.model.visual.proj.data[0, 0] = torch.inf
    with pytest.raises(UserError, match="embeddings of .* are not finite: give --precision fp32"):
        build(tmp_path / "store", teacher, open_source(pattern_shards(tmp_path, 1, 2)))


@pytest.mark.parametrize("augmentation", [drawing_augmentation, mild_drawing_augmentation])
def test_the_compared_draws_take_every_branch(augmentation):
    """Erased or not, grey or not, coloured or not: else a change of it would not be noticed."""
    for name, changed in (("Erasing", 0.0), ("RandomGrayscale", 0.0), ("RandomApply", 0.0), ("RandomApply", 1.0)):

        def other(size, name=name, changed=changed):
            augment = augmentation(size)
            part = next(each for each in augment.transforms if type(each).__name__ == name)
            part.p = 1.0 if part.p == changed else changed
            return augment

        assert not embeddings._same_draws(augment.draws(augmentation), augment.draws(other))


# ---- what does not fit


@pytest.fixture(scope="module")
def built(teacher, tmp_path_factory):
    """(shards, store)"""
    place = tmp_path_factory.mktemp("built")
    shards = pattern_shards(place, 2, 4)
    build(place / "store", teacher, open_source(shards), augmentation=light_augmentation)
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
    pattern_shards(tmp_path, 2, 4)
    StoredEmbeddings(store).check(open_source(shards), light_augmentation)
    StoredEmbeddings(store).check(open_source(f"{tmp_path}/{{000..001}}.tar"), light_augmentation)


def test_each_kind_of_mismatch_is_refused_by_name(built, tmp_path):
    shards, folder = built
    source, store = open_source(shards), StoredEmbeddings(folder)
    with pytest.raises(UserError, match="was built on captions as well: build another with --prompts, for images"):
        store.check(dataclasses.replace(source, captioned=False), light_augmentation)
    with pytest.raises(UserError, match="it has 2 blocks, the data have 1"):
        store.check(open_source(shards.replace("{000..001}", "000")), light_augmentation)
    with pytest.raises(UserError, match=r"its block 0 is '000.tar', that of the data '001.tar'"):
        store.check(open_source(shards.replace("{000..001}", "{001..000..-1}")), light_augmentation)
    with pytest.raises(UserError, match="with another augmentation, .*RandomResizedCrop.*training has .*RandomAffine"):
        store.check(source, mild_drawing_augmentation)
    for name, changes in (("rules", {"decode_rules": 1}), ("draws", {"draws": ["00" * 3 * 16 * 16] * 24})):
        other = StoredEmbeddings(changed_manifest(folder, tmp_path / name, **changes))
        with pytest.raises(UserError, match="draws other views from the same seeds"):
            other.check(source, light_augmentation)
    with pytest.raises(UserError, match="has format 9, this version reads 1: build it again"):
        StoredEmbeddings(changed_manifest(folder, tmp_path / "format", format=9))
    with pytest.raises(UserError, match="is no store: it has no manifest.json"):
        StoredEmbeddings(tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        StoredEmbeddings(tmp_path / "nowhere")
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
        dataclasses.replace(pair, image=pattern(77)),
        dataclasses.replace(pair, row=3),
        dataclasses.replace(pair, row=4),
    ):
        with pytest.raises(UserError, match="another pair, other captions or another image in .*'001.tar'"):
            StoredEmbeddings(folder).of_pair(other, 0, [0])
    damaged = changed_manifest(folder, tmp_path / "damaged")
    content = bytearray((damaged / "00001.safetensors").read_bytes())
    content[-3] ^= 4
    (damaged / "00001.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="00001.safetensors is damaged: copy it again"):
        StoredEmbeddings(damaged).of_pair(pair, 0, [0])
    StoredEmbeddings(damaged).of_pair(next(source.pairs.read(0)), 0, [0])


@pytest.mark.parametrize(
    "changes",
    [
        {"teachers": 5}, {"teachers": ["x"]}, {"teachers": []}, {"views": "2"}, {"views": 0}, {"blocks": None},
        {"draws": [1, 2]}, {"draws": ["zz"]}, {"dtype": "float32"}, {"extra": 1},
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_one_line(built, tmp_path, changes):
    with pytest.raises(UserError, match=r"manifest.json is damaged.*: copy it again, or build the store again"):
        StoredEmbeddings(changed_manifest(built[1], tmp_path / "store", **changes))


def test_a_teacher_without_a_scale_is_damage(built, tmp_path):
    (teacher,) = json.loads((built[1] / "manifest.json").read_text())["teachers"]
    for changes in ({"logit_scale": None}, {"logit_scale": math.nan}):
        with pytest.raises(UserError, match="manifest.json is damaged"):
            StoredEmbeddings(changed_manifest(built[1], tmp_path / str(changes), teachers=[teacher | changes]))


def test_files_of_another_store_are_refused_beside_a_manifest(built, tmp_path):
    shards, folder = built
    mixed = StoredEmbeddings(changed_manifest(folder, tmp_path / "mixed", precision="bf16"))
    with pytest.raises(UserError, match="00000.safetensors is of another store than its manifest.json"):
        mixed.check(open_source(shards), light_augmentation)


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
    shards = pattern_shards(folder, 3, 4)
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
            (["--teacher-scale", "60", "70"], "--teacher-scale has 2 values for 1 teachers: give one for each"),
            (["--teacher-pretrained", "openai"], "--teacher-pretrained openai has no effect with --teacher-store"),
            (["--train-data", f"{place}/000.tar"], "it has 3 blocks, the data have 1"),
        ],
        "clip_unlabelled": [([], "was built on captions as well: build another with --prompts, for images alone")],
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
    Path("full/.thesis.tex.0123abcd.writing").write_text("an editor's copy")
    code, _, errors = call(*flags, "--out", "full", recipe="store_teacher")
    assert code == 2 and "--out full holds 'thesis.tex', which is not of a store" in errors
    assert {path.name for path in Path("full").iterdir()} == {"thesis.tex", ".thesis.tex.0123abcd.writing"}
    code, _, errors = call(*flags, "--out", "full/thesis.tex", recipe="store_teacher")
    assert code == 2 and "--out full/thesis.tex is a file: name a folder" in errors


def test_a_run_does_not_go_on_with_another_store(place, call):
    shutil.copytree(place / "store", "store")
    flags = [*flags_of(place), "--teacher-store", "store", "--output-dir", "run", "--checkpoint-every-steps", "2"]
    assert call(*flags)[0] == 0
    manifest = json.loads(Path("store/manifest.json").read_text())
    Path("store/manifest.json").write_text(json.dumps(manifest | {"broken": 1}))
    code, _, errors = call(*flags, "--resume", "latest")
    assert code == 2 and "--teacher-store store has other contents than at its start" in errors


def test_a_stream_with_a_store_resumes_exactly(place):
    source, store = open_source(f"{place}/{{000..002}}.tar"), StoredEmbeddings(place / "store")

    first = loader(source, store, batch_size=5)
    whole = iter(first)
    for _ in range(2):
        next(whole)
    again = iter(loader(source, store, batch_size=5, start=Position.of(first.position())))
    for _ in range(5):  # over two epochs, with two views
        want, got = next(whole), next(again)
        assert want["keys"] == got["keys"]
        for name in ("image", "text", "teacher_image", "teacher_text"):
            assert torch.equal(want[name], got[name])


# ---- the bundled data


@pytest.fixture
def few(monkeypatch) -> list[RawPair]:
    """Four of the bundled pairs in place of all."""
    pairs = bundled_pairs()[:4]
    monkeypatch.setattr(clip_teacher, "bundled_pairs", lambda: pairs)
    return pairs


def test_the_bundled_store_is_built_once_and_again_where_it_is_damaged(teacher, few, tmp_path, monkeypatch):
    first = clip_teacher.bundled_store([teacher], 8, folder=tmp_path)
    assert first.block(0)["pixels"].shape == (4, clip_teacher.BUNDLED_VIEWS, 3, 8, 8)
    with monkeypatch.context() as patch:
        patch.setattr(clip_teacher, "build_blocks", None)
        clip_teacher.bundled_store([teacher], 8, folder=tmp_path)
    (folder,) = tmp_path.iterdir()
    content = bytearray((folder / "00000.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "00000.safetensors").write_bytes(content)
    again = clip_teacher.bundled_store([teacher], 8, folder=tmp_path)
    assert torch.equal(again.block(0)["image.0"], first.block(0)["image.0"])
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_every_input_gives_the_bundled_store_another_folder(teacher, few, tmp_path, monkeypatch):
    def build_once(clip=teacher, pairs=few, size=8):
        monkeypatch.setattr(clip_teacher, "bundled_pairs", lambda: pairs)
        clip_teacher.bundled_store([clip], size, folder=tmp_path)

    changed = copy.deepcopy(teacher)
    changed.towers.model.visual.proj.data[0, 0] += 1
    with_mean = dataclasses.replace(teacher.preprocess, mean=(0.1, 0.2, 0.3))
    cases = [
        {},
        {"size": 9},
        {"clip": changed},
        {"clip": dataclasses.replace(teacher, preprocess=with_mean)},
        {"clip": dataclasses.replace(teacher, tokenize=lambda texts: teacher.tokenize(texts).flip(1))},
        {"pairs": few[::-1]},
        {"pairs": [dataclasses.replace(few[0], captions=("another",)), *few[1:]]},
        {"pairs": [dataclasses.replace(few[0], image=few[1].image), *few[1:]]},
    ]
    for number, case in enumerate(cases, 1):
        build_once(**case)
        build_once(**case)
        assert len(list(tmp_path.iterdir())) == number
