"""A stored result, embedding, logit or state is reused only if nothing changed that decides it: each input of each key
is changed one at a time."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import colour_blind_clip
from small_sets import colour_set, picture, write_picture, write_set
from torch import nn

from gkl_vl.data import identity
from gkl_vl.data.augment import light_augmentation
from gkl_vl.data.identity import file_state, images_identity
from gkl_vl.data.labelled import open_labelled, pixel_image
from gkl_vl.data.views import DiskViews, MemoryViews
from gkl_vl.evaluation import embed, sets, suite
from gkl_vl.evaluation.benchmark import Subject
from gkl_vl.evaluation.embed import Embedder, embed_images, embed_texts
from gkl_vl.evaluation.set_collections import Entry
from gkl_vl.evaluation.sets import BenchmarkSet, load_benchmark_set
from gkl_vl.evaluation.suite import Suite, file_name, result_file, run_suite
from gkl_vl.models import fingerprint
from gkl_vl.models.classifiers import Classifier
from gkl_vl.models.fingerprint import add_model, architecture
from gkl_vl.robustness import measure as measure_module
from gkl_vl.robustness.autoattack import Attack
from gkl_vl.robustness.targets import Examples, Target
from gkl_vl.teachers import store
from gkl_vl.training.label_kd import _contents


def key_of(model: nn.Module) -> str:
    digest = hashlib.sha256()
    add_model(digest, model)
    return digest.hexdigest()


# ---- models ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, heads: int = 2, activation: Callable = torch.relu):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, heads)
        self.linear = nn.Linear(8, 8)
        self.activation = activation
        self.mask = torch.zeros(3)  # neither parameter nor buffer

    def forward(self, x):
        return self.activation(self.linear(self.attention(x, x, x)[0]))


class Other(Block):
    def forward(self, x):
        return self.activation(self.attention(x, x, x)[0])


def scaled_gelu(scale: float) -> Callable:
    return lambda x: x * torch.sigmoid(scale * x)


def test_the_key_of_a_model_is_the_same_for_the_same_model():
    assert key_of(Block()) == key_of(Block()) and "0x" not in architecture(Block())
    assert key_of(Block(activation=scaled_gelu(1.7))) == key_of(Block(activation=scaled_gelu(1.7)))
    assert key_of(Block(activation=partial(torch.clamp, min=0))) == key_of(
        Block(activation=partial(torch.clamp, min=0))
    )


def test_settings_that_are_no_weights_change_the_key_of_a_model():
    models = [
        Block(),
        Block(heads=4),  # with the same weights and the same str()
        Block(activation=torch.tanh),
        Block(activation=scaled_gelu(1.7)),
        Block(activation=scaled_gelu(1.0)),
        *(Block(activation=function) for function in (lambda x: x + 1, lambda x: x + 2)),
        Block(activation=partial(torch.clamp, min=0)),
        Block(activation=partial(torch.clamp, min=1)),
        Other(),
    ]
    assert str(Block()) == str(Block(heads=4)) and len({key_of(model) for model in models}) == len(models)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.linear.weight.data.add_(1),  # torch's version counter does not see changes of `.data`
        lambda model: model.linear.weight.data.copy_(model.linear.weight.data.flip(0)),
        lambda model: model.linear.bias.data.copy_(model.linear.bias.data.flip(0)),
        lambda model: setattr(model.linear, "weight", nn.Parameter(model.linear.weight.detach() * 2)),
        lambda model: model.linear.weight.data.view(-1)[3:4].neg_(),
        lambda model: model.mask.add_(1),
        lambda model: model.half(),
        lambda model: model.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda model: setattr(model, "forward", lambda x: x),
        lambda model: setattr(model.attention, "num_heads", 4),
    ],
)
def test_a_model_that_is_changed_in_place_has_another_key(change):
    model = Block()
    before = key_of(model), key_of(model)
    change(model)
    assert before[0] == before[1] != key_of(model)


@pytest.mark.parametrize("rows", [1, 700])
def test_a_large_tensor_whose_rows_or_columns_are_swapped_has_another_key(rows):
    model = nn.Linear(rows, 1024, bias=False).requires_grad_(False)
    keys = [key_of(model)]
    for columns in (slice(0, 2), slice(700, 702)):
        weight = model.weight.data.view(-1)
        weight[columns] = weight[columns].flip(0)
        keys.append(key_of(model))
    assert len(set(keys)) == 3


def test_the_weights_are_hashed_again_only_after_a_change(monkeypatch):
    model, hashed = Block(), []
    monkeypatch.setattr(fingerprint, "_hash", lambda model: (hashed.append(1), b"hash")[1])
    for _ in range(3):
        key_of(model)
    model.linear.weight.data.add_(1)
    key_of(model)
    assert len(hashed) == 2


def test_versions_and_the_precision_of_products_change_the_key_of_a_model(monkeypatch):
    model = Block()
    keys = {key_of(model)}
    torch.set_float32_matmul_precision("high")
    keys.add(key_of(model))
    torch.set_float32_matmul_precision("highest")
    real = fingerprint.version
    for package in ("torch", "torchvision", "pillow", "open_clip_torch", "timm", "transformers"):
        monkeypatch.setattr(fingerprint, "version", lambda name, p=package: "9.9" if name == p else real(name))
        keys.add(key_of(model))
    assert len(keys) == 8


# ---- embeddings --------------------------------------------------------------------------------------------------


def test_weights_changed_under_one_embedder_are_embedded_again(tmp_path):
    clip = colour_blind_clip()
    dataset = load_benchmark_set(str(colour_set(tmp_path / "set", ["red", "green"])))
    embedder = Embedder(clip=clip, cache=tmp_path / "cache")
    first = embed_images(embedder, dataset).rows
    clip.towers.model.norm.running_mean += 0.5
    second = embed_images(embedder, dataset).rows
    assert not torch.equal(first, second)
    assert torch.equal(second, embed_images(replace(embedder, cache=None), dataset).rows)
    clip.towers.model.norm.running_mean -= 0.5
    assert torch.equal(first, embed_images(embedder, dataset).rows)


def test_rules_of_decoding_and_tokens_change_the_keys_of_embeddings(tmp_path, monkeypatch):
    dataset = load_benchmark_set(str(colour_set(tmp_path / "set", ["red", "green"])))
    cache = tmp_path / "cache"
    embedder = Embedder(clip=colour_blind_clip(), cache=cache)
    embed_images(embedder, dataset)
    monkeypatch.setattr(embed, "DECODE_RULES", 99)
    embed_images(embedder, dataset)
    assert len(list(cache.glob("images_*"))) == 2
    embed_texts(embedder, ["red", "green"])
    pairs = replace(embedder.clip, tokenize=lambda texts: torch.tensor([[0, 1]]))  # the same bytes in another shape
    embed_texts(replace(embedder, clip=pairs), ["red"])
    assert len(list(cache.glob("texts_*"))) == 2


# ---- sets --------------------------------------------------------------------------------------------------------


def test_the_state_of_a_file_changes_with_its_content_and_times(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"a")
    states = [file_state(path)]
    path.write_bytes(b"b")
    os.utime(path, ns=(0, states[0][2]))  # the time of the first: that of the inode still differs
    states.append(file_state(path))
    (tmp_path / "link").symlink_to(path)
    assert states[0] != states[1] == file_state(tmp_path / "link") == file_state(os.path.relpath(path))
    path.unlink()
    assert file_state(path)[1] == -1


def folder_set(root: Path, *, names: list[str] | None = None) -> BenchmarkSet:
    (root / "names.json").write_text(json.dumps({"pets": names or ["cat", "dog"]}))
    return load_benchmark_set("pets", root=str(root), classname_file=str(root / "names.json"))


@pytest.fixture
def pets(tmp_path) -> Path:
    for folder, colour in (("cat", "red"), ("dog", "blue")):
        write_picture(tmp_path / "pets" / "test" / folder / "1.png", colour)
    return tmp_path / "pets"


@pytest.mark.parametrize(
    "change",
    [
        lambda root: write_picture(root / "test" / "cat" / "1.png", "green"),
        lambda root: write_picture(root / "test" / "cat" / "2.png", "green"),
        lambda root: (root / "test" / "cat" / "1.png").rename(root / "test" / "dog" / "2.png"),
        lambda root: (root / "test" / "cat" / "1.png").touch(),
    ],
)
def test_a_changed_image_changes_the_identity_of_a_set(pets, change):
    write_picture(pets / "test" / "cat" / "0.png", "red")
    before = folder_set(pets).identity("cls")
    assert folder_set(pets).identity("cls") == before
    change(pets)
    assert folder_set(pets).identity("cls") != before


def test_names_prompts_kind_targets_and_rules_change_the_identity_of_a_set(pets, monkeypatch):
    dataset = folder_set(pets)
    others = [
        dataset,
        folder_set(pets, names=["cat", "hound"]),
        replace(dataset, templates=["{c}!"]),
        replace(dataset, templates={"cat": ["a"], "dog": ["b"]}),
        replace(dataset, kind="multilabel"),
        replace(dataset, classes=("0", "1")),
        replace(dataset, samples=sets._Relabelled(dataset.samples, (1, 0))),
    ]
    identities = [other.identity("cls") for other in others] + [dataset.identity()]
    monkeypatch.setattr(sets, "DECODE_RULES", 99)
    assert len({*identities, dataset.identity("cls")}) == 9


@pytest.mark.parametrize("change", ["image", "label", "caption"])
def test_shards_have_an_identity(tmp_path, change):
    def build(place: str, **other: bytes) -> BenchmarkSet:
        members = {"png": picture("red"), "cls": b"0", "txt": b"one"} | other
        return load_benchmark_set(str(write_set(tmp_path / place, [[("a", members)]], classnames=["x", "y"])))

    first = build("set")
    before = first.identity("cls", "txt")
    assert first.identity("cls", "txt") == before
    os.rename(tmp_path / "set", tmp_path / "old")
    build("set", **{"image": {"png": picture("blue")}, "label": {"cls": b"1"}, "caption": {"txt": b"two"}}[change])
    assert first.identity("cls", "txt") != before


def test_images_that_are_in_no_file_of_their_own_are_identified_by_content():
    def identity_of(*values: int) -> str:
        return images_identity(pixel_image("x", np.full((2, 2, 3), v, dtype=np.uint8)).read for v in values)

    assert identity_of(1, 2) == identity_of(1, 2) and len({identity_of(1, 2), identity_of(2, 1), identity_of(1)}) == 3


def test_the_rules_of_decoding_are_part_of_the_identity_of_images(monkeypatch):
    before = images_identity([])
    monkeypatch.setattr(identity, "DECODE_RULES", 99)
    assert images_identity([]) != before


# ---- suites ------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    calls = []
    original = suite.evaluate_set
    monkeypatch.setattr(suite, "evaluate_set", lambda *a, **how: (calls.append(how["name"]), original(*a, **how))[1])
    return calls


def suite_of(dataset: BenchmarkSet, output: Path, **other) -> Suite:
    output.mkdir(exist_ok=True)
    settings = {"recall_k": (1,), "seed": 0, "resume": True, "is_main": True} | other
    return Suite(sets=[("pets", dataset, [Entry("pets")])], output=output, **settings)


def subject_of(**settings) -> Subject:
    clip = colour_blind_clip()
    clip.towers.model.visual = nn.Identity()  # whose parameters are counted
    return Subject(model="m", pretrained="", embedder=Embedder(clip=clip, **settings))


def test_a_suite_reuses_a_result_only_while_nothing_changed(tmp_path, pets, measured, monkeypatch):
    dataset, output = folder_set(pets), tmp_path / "out"
    runs = [
        (suite_of(dataset, output), subject_of(), None),
        (suite_of(dataset, output), subject_of(amp=True), None),
        (suite_of(dataset, output), subject_of(max_broken=0.5), None),
        (suite_of(dataset, output, seed=1), subject_of(), None),
        (suite_of(dataset, output, recall_k=(1, 2)), subject_of(), None),
        (suite_of(dataset, output), subject_of(), subject_of()),
        (suite_of(dataset, output), subject_of(), replace(subject_of(), model="other name")),
        (suite_of(folder_set(pets, names=["cat", "hound"]), output), subject_of(), None),
        (suite_of(replace(dataset, templates=["{c}!"]), output), subject_of(), None),
    ]
    for run in runs[1:]:  # each against the first
        list(run_suite(*runs[0]))
        before = len(measured)
        list(run_suite(*runs[0]))
        assert len(measured) == before
        list(run_suite(*run))
        assert len(measured) == before + 1, run
    before = len(measured)
    write_picture(pets / "test" / "cat" / "1.png", "green")
    list(run_suite(*runs[-1]))
    assert len(measured) == before + 1
    for name in ("DRAWS", "RESULT_RULES"):
        monkeypatch.setattr(suite, name, 7)
        list(run_suite(*runs[-1]))
    assert len(measured) == before + 3


def test_models_and_sets_whose_file_names_collide_have_files_of_their_own(tmp_path, pets, measured):
    dataset = folder_set(pets)
    output = tmp_path / "out"
    for _ in range(2):
        for model in ("runs/a", "runs_a", "runs:a"):
            for name in ("a/pets", "a_pets"):
                entries = [(name, dataset, [Entry(name)])]
                run = replace(suite_of(dataset, output), sets=entries)
                (line,) = run_suite(run, replace(subject_of(), model=model), None)
                assert (line["dataset"], line["model"]) == (name, model)
    assert len(measured) == 6 == len(suite.all_lines(output))
    subject = replace(subject_of(), model="runs/a")
    first = output / file_name("a/pets", subject, "zeroshot_classification")
    assert result_file(output, "a/pets", subject, "zeroshot_classification") == first


# ---- teachers ----------------------------------------------------------------------------------------------------


def stored(folder: Path, **changes) -> int:
    """Stores logits with these changes; the number of files then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 3)).eval().requires_grad_(False)
    classifier = Classifier(name="x", model=model, mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=3)
    arguments = {
        "classifier": classifier,
        "views": MemoryViews(images=torch.zeros(5, 3, 4, 4, dtype=torch.uint8), seed=0),
        "labels": torch.zeros(5, dtype=torch.int64),
        "contents": "images",
        "num_views": 1,
        "top_k": None,
        "device": torch.device("cpu"),
        "folder": folder,
    }
    store.store_logits(**(arguments | changes))
    return len(list(folder.iterdir()))


def test_versions_and_rules_change_the_key_of_stored_logits(tmp_path, monkeypatch):
    assert stored(tmp_path) == stored(tmp_path) == 1
    monkeypatch.setattr(store, "DECODE_RULES", 99)
    assert stored(tmp_path) == 2
    real = fingerprint.version
    monkeypatch.setattr(fingerprint, "version", lambda name: "9.9" if name == "timm" else real(name))
    assert stored(tmp_path) == 3


def test_images_on_disk_are_identified_by_their_files_for_stored_logits(pets):
    def contents() -> str:
        data = open_labelled(str(pets), "test")
        views = DiskViews(data=data, augment=light_augmentation(8), plain=light_augmentation(8), seed=0, num_workers=0)
        return _contents(data, views)

    before = contents()
    assert contents() == before
    write_picture(pets / "test" / "cat" / "1.png", "green")
    assert contents() != before


def test_images_in_memory_are_identified_by_their_pixels_for_stored_logits(pets):
    data, images = open_labelled(str(pets), "test"), torch.zeros(2, 3, 4, 8, dtype=torch.uint8)
    views = [images, images + 1, images.reshape(2, 3, 8, 4)]
    assert len({_contents(data, MemoryViews(images=pixels, seed=0)) for pixels in views}) == 3


# ---- attacks -----------------------------------------------------------------------------------------------------


def test_each_input_changes_the_settings_of_an_attack(monkeypatch):
    attack = Attack(name="pgd20", norm="linf", epsilon=0.1)
    pixels = torch.zeros(3, 3, 4, 8, dtype=torch.uint8)
    examples = Examples(name="x", images=pixels, labels=torch.tensor([0, 1, 2]), num_classes=3, draw="all")
    target = Target(architecture="x", model=Block())

    def settings(attack=attack, target=target, examples=examples, batch_size=2) -> str:
        return json.dumps(measure_module._settings(attack, target, examples, batch_size))

    found = [
        settings(),
        settings(batch_size=3),
        settings(attack=replace(attack, epsilon=0.2)),
        settings(attack=replace(attack, seed=1)),
        settings(attack=replace(attack, name="pgd100")),
        settings(examples=replace(examples, labels=torch.tensor([1, 0, 2]))),
        settings(examples=replace(examples, images=pixels + 1)),
        settings(examples=replace(examples, images=pixels.reshape(3, 3, 8, 4))),
        settings(examples=replace(examples, num_classes=4)),
        settings(target=replace(target, model=Block(heads=4))),
        settings(target=replace(target, architecture="y")),
    ]
    assert settings() == found[0]
    target.model.linear.bias.data += 1
    found.append(settings())
    real = fingerprint.version
    monkeypatch.setattr(fingerprint, "version", lambda name: "9.9" if name == "torch" else real(name))
    assert len({*found, settings()}) == 13
