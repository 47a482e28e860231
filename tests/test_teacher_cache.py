"""Stored views and embeddings equal the online teacher's, and are read from disk only for the same arguments."""

import copy
import dataclasses

import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file
from torchvision.transforms import v2

from gkl_vl import disk_cache
from gkl_vl.data.augment import drawing_augmentation
from gkl_vl.data.pair_stream import PairLoader, PairStream
from gkl_vl.data.pairs import bundled_pairs
from gkl_vl.data.sources import RawPair, memory_source
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.teachers import store as teacher_store
from gkl_vl.teachers.online import online_teacher
from gkl_vl.teachers.store import store_views, stored_teacher

SIZE, VIEWS = 64, 3


@pytest.fixture(scope="module")
def teacher() -> Clip:
    torch.manual_seed(0)
    return freeze(load_clip("emoji-student"))


@pytest.fixture(scope="module")
def some_pairs() -> list[RawPair]:
    return [dataclasses.replace(pair, row=row) for row, pair in enumerate(bundled_pairs()[:10])]


def store(teacher, pairs, folder, **changes):
    options = {"num_views": VIEWS, "augment": drawing_augmentation(SIZE), "size": SIZE, "num_workers": 0}
    return store_views(clip=teacher, pairs=pairs, folder=folder, **(options | changes))


def test_a_stored_teacher_equals_an_online_one(teacher, some_pairs, tmp_path):
    stored = store(teacher, some_pairs, tmp_path)
    assert stored.pixels.shape == (10, VIEWS, 3, SIZE, SIZE) and stored.pixels.dtype == torch.uint8
    stream = PairStream(
        memory_source("emoji", some_pairs),
        augment=drawing_augmentation(SIZE),
        tokenizers={"teacher_text": teacher.tokenize},
        batch_size=5,
        seed=0,
        rank=0,
        world_size=1,
        num_workers=0,
        stored_views=stored.pixels,
    )
    batches = iter(PairLoader(stream))
    lookup, online = stored_teacher(teacher, stored, torch.device("cpu")), online_teacher(teacher)
    for _ in range(2 * VIEWS):  # every view of every pair
        batch = next(batches)
        stored_outputs, outputs = lookup(batch), online(batch)
        assert set(stored_outputs) == set(outputs)
        for name in outputs:
            torch.testing.assert_close(stored_outputs[name], outputs[name], rtol=1e-5, atol=1e-5)
    views = stored.pixels.flatten(2).float()
    assert (views[:, 0] != views[:, 1]).any(dim=1).all()


def test_the_student_gets_the_same_view_at_its_size(teacher, some_pairs, tmp_path):
    large, small = store(teacher, some_pairs, tmp_path), store(teacher, some_pairs, tmp_path, size=32)
    assert small.pixels.shape[-1] == 32
    assert torch.equal(large.image, small.image)  # the teacher's views are the same
    shrunk = torch.nn.functional.avg_pool2d(large.pixels.flatten(0, 1).float(), 2)
    assert (shrunk - small.pixels.flatten(0, 1).float()).abs().mean() < 4


def test_the_number_of_workers_has_no_effect(teacher, some_pairs, tmp_path):
    without = store(teacher, some_pairs, tmp_path / "a")
    with_worker = store(teacher, some_pairs, tmp_path / "b", num_workers=1)
    assert torch.equal(without.pixels, with_worker.pixels) and torch.equal(without.image, with_worker.image)


def test_the_same_arguments_are_read_from_disk(teacher, some_pairs, tmp_path, monkeypatch):
    first = store(teacher, some_pairs, tmp_path)
    monkeypatch.setattr(teacher_store, "_embed_images", None)  # embedding again would fail
    second = store(teacher, some_pairs, tmp_path)
    assert torch.equal(first.image, second.image) and len(list(tmp_path.iterdir())) == 1


def test_other_arguments_have_another_key(teacher, some_pairs):
    def key(clip=teacher, pairs=some_pairs, views=VIEWS, augment=None, size=SIZE):
        return teacher_store._key(clip, pairs, views, augment or drawing_augmentation(SIZE), size)

    def with_cfg(**changes):
        return dataclasses.replace(teacher, model_cfg=teacher.model_cfg | changes)

    def applied(p):
        return v2.Compose([v2.RandomApply([v2.ColorJitter(0.5)], p=p), v2.PILToTensor()])

    quick_gelu = copy.deepcopy(teacher)
    for block in quick_gelu.towers.model.transformer.resblocks:
        block.mlp.gelu = QuickGELU()
    torch.manual_seed(1)
    changed = dataclasses.replace(some_pairs[3], captions=("another caption",))
    keys = [
        key(),
        key(clip=load_clip("emoji-student")),
        key(
            clip=dataclasses.replace(teacher, preprocess=dataclasses.replace(teacher.preprocess, mean=(0.1, 0.2, 0.3)))
        ),
        key(pairs=[*some_pairs[:3], changed, *some_pairs[4:]]),
        key(pairs=some_pairs[::-1]),
        key(views=VIEWS + 1),
        key(augment=drawing_augmentation(SIZE + 1)),
        key(size=SIZE + 1),
        key(augment=applied(0.8)),
        key(augment=applied(0.2)),
        key(clip=with_cfg(text_cfg=teacher.model_cfg["text_cfg"] | {"heads": 6})),
        key(clip=dataclasses.replace(teacher, tokenize=lambda texts: teacher.tokenize(texts).flip(1))),
        key(clip=quick_gelu),
    ]
    assert len(set(keys)) == len(keys) and key() == keys[0]


def test_a_failed_write_leaves_no_file(teacher, some_pairs, tmp_path, monkeypatch):
    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache, "save_file", broken)
    with pytest.raises(OSError):
        store(teacher, some_pairs, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    store(teacher, some_pairs, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    assert set(load_file(path)) == {"pixels", "image", "text"}


def test_storing_does_not_advance_the_generator(teacher, some_pairs, tmp_path):
    before = torch.get_rng_state()
    store(teacher, some_pairs, tmp_path, num_views=1)
    assert torch.equal(before, torch.get_rng_state())
