"""The bundled emoji are complete: images of one size, labels that match the captions, no held-out emoji in training;
the bundled tokenizer equals the one that its script builds."""

import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer

import gkl_vl
from gkl_vl.assets.build_tokenizer import CONTEXT_LENGTH, VOCAB_SIZE, build

ASSETS = Path(gkl_vl.__file__).parent / "assets"
SPLITS = {
    "emoji/train": {"noto", "twemoji"},
    "emoji/test": {"fluent"},
    "emoji_unseen/test": {"noto", "twemoji", "fluent"},
}


def read_split(split: str) -> dict[str, dict[str, bytes]]:
    """key -> extension -> content, over all shards of a split."""
    folder = ASSETS / split
    samples = {}
    for shard in range(int((folder / "nshards.txt").read_text())):
        with tarfile.open(folder / f"{shard}.tar") as archive:
            for member in archive:
                key, extension = member.name.split(".")
                samples.setdefault(key, {})[extension] = archive.extractfile(member).read()
    return samples


@pytest.fixture(scope="module")
def splits():
    return {split: read_split(split) for split in SPLITS}


def class_names(split: str) -> list[str]:
    return (ASSETS / split).parent.joinpath("classnames.txt").read_text(encoding="utf-8").splitlines()


def captions(sample: dict[str, bytes]) -> list[str]:
    return sample["txt"].decode().splitlines()


def points(keys) -> set[str]:
    """Code points without the style: "noto-1f1eb-1f1f7" -> "1f1eb-1f1f7"."""
    return {key.partition("-")[2] for key in keys}


@pytest.mark.parametrize("split", SPLITS)
def test_every_picture_is_64_by_64_in_rgb(splits, split):
    for key, sample in splits[split].items():
        with Image.open(io.BytesIO(sample["webp"])) as image:
            image.load()
            assert (image.format, image.size, image.mode) == ("WEBP", (64, 64), "RGB"), key


@pytest.mark.parametrize("split", SPLITS)
def test_sizes_and_styles_are_as_listed(splits, split):
    sizes = {}
    for path in (ASSETS / split).glob("*.tar"):
        with tarfile.open(path) as archive:
            sizes[path.name] = sum(name.endswith(".webp") for name in archive.getnames())
    assert json.loads((ASSETS / split / "sizes.json").read_text()) == sizes
    assert int((ASSETS / split / "nshards.txt").read_text()) == len(sizes)
    assert sum(sizes.values()) == len(splits[split])
    assert {key.partition("-")[0] for key in splits[split]} == SPLITS[split]


@pytest.mark.parametrize("split", ["emoji/test", "emoji_unseen/test"])
def test_a_label_names_the_first_caption(splits, split):
    names = class_names(split)
    for key, sample in splits[split].items():
        label = int(sample["cls"])
        assert 0 <= label < len(names), key
        assert captions(sample)[0] == names[label], key


def test_training_pictures_show_every_class_in_both_styles(splits):
    names = sorted(captions(sample)[0] for sample in splits["emoji/train"].values())
    assert names == sorted(2 * class_names("emoji/train"))


def test_class_names_are_unique():
    names = class_names("emoji/train") + class_names("emoji_unseen/test")
    assert len(names) == len(set(names)) and all(name == name.strip().lower() != "" for name in names)


def test_no_held_out_emoji_is_in_the_training_split(splits):
    seen, unseen = points(splits["emoji/train"]), points(splits["emoji_unseen/test"])
    assert len(unseen) == len(class_names("emoji_unseen/test"))
    assert not seen & unseen
    assert points(splits["emoji/test"]) <= seen


def test_no_picture_is_both_trained_on_and_held_out(splits):
    pixels = {
        split: {Image.open(io.BytesIO(sample["webp"])).tobytes() for sample in splits[split].values()}
        for split in SPLITS
    }
    assert not pixels["emoji/train"] & (pixels["emoji/test"] | pixels["emoji_unseen/test"])


def test_no_caption_belongs_to_two_emoji(splits):
    owners = defaultdict(set)
    for samples in splits.values():
        for key, sample in samples.items():
            lines = captions(sample)
            assert lines and len(lines) == len(set(lines)) and "" not in lines, key
            for line in lines:
                owners[line].update(points([key]))
    assert {line: both for line, both in owners.items() if len(both) > 1} == {}


@pytest.mark.parametrize("folder", ["tokenizer", "teacher"])
def test_the_tokenizer_is_the_one_its_script_builds(folder):
    shipped, built = AutoTokenizer.from_pretrained(ASSETS / folder), build()
    assert shipped.get_vocab() == built.get_vocab()
    lines = ["flag of togo", "An emoji of a RED apple", "piñata, fête & keycap #", "", "🍎"]
    lines += class_names("emoji_unseen/test")
    assert shipped(lines).input_ids == built(lines).input_ids
    assert shipped.pad_token_id == built.pad_token_id == 0
    assert shipped.eos_token_id == max(shipped.get_vocab().values()) == VOCAB_SIZE - 1
    assert shipped.model_max_length == CONTEXT_LENGTH
    assert shipped("a cat").input_ids[-1] == shipped.eos_token_id


def test_the_assets_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 25 * 2**20
