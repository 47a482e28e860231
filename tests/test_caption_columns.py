"""Captions in several columns, such as real and synthetic: from every kind of source, drawn by their shares."""

import json
import random
from collections import Counter
from pathlib import Path

import datasets
import pytest
import test_recipes
import torch
from small_models import CONFIG
from small_sets import picture, write_picture, write_shard

from gkl_vl.data.augment import light_augmentation
from gkl_vl.data.captions import draw_captions
from gkl_vl.data.pair_stream import PairStream
from gkl_vl.data.pairs import open_source
from gkl_vl.data.sources import RawPair, memory_source
from gkl_vl.errors import UserError

call = test_recipes.call


def pairs_of(name: str, *columns: str) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], str]]:
    source = open_source(name, columns=columns)
    pairs = [pair for block in range(len(source.pairs.blocks)) for pair in source.pairs.read(block)]
    return {pair.key: (pair.captions, pair.columns, pair.problem) for pair in pairs}


def test_shards_have_texts_and_fields_of_any_json_member(tmp_path):
    """As MobileCLIP's .syn.json beside .txt."""
    shard = str(tmp_path / "a.tar")
    synthetic = json.dumps({"syn_text": ["s1", "s2"]}).encode()
    samples = [
        ("a", {"png": picture("red"), "txt": b"real", "syn.json": synthetic}),
        ("b", {"png": picture("red"), "txt": b"alone"}),
        ("c", {"png": picture("red"), "json": json.dumps({"caption": "one", "alt": "two"}).encode()}),
    ]
    write_shard(tmp_path / "a.tar", samples)
    read = pairs_of(shard, "png", "txt", "syn.json.syn_text")
    assert read["a"] == (("real", "s1", "s2"), (0, 1, 1), "")
    assert read["b"] == (("alone",), (0,), "")  # a pair may lack a column
    assert pairs_of(shard, "png", "alt", "caption")["c"] == (("two", "one"), (0, 1), "")
    problem = "its .syn.json is JSON: name a field of it with --columns, as syn.json.FIELD"
    assert problem in pairs_of(shard, "png", "syn.json")["a"][2]
    with pytest.raises(UserError, match="has a caption in 'syn.json.syn_txt': check --columns"):
        open_source(shard, columns=["png", "txt", "syn.json.syn_txt"])


def test_tables_and_folders_have_several_columns(tmp_path):
    write_picture(tmp_path / "x.png", "red", size=8)
    rows = "filepath,title,synthetic\nx.png,real,made\nx.png,only,\n"
    (tmp_path / "t.csv").write_text(rows)
    assert open_source(f"{tmp_path}/t.csv", columns=["filepath", "synthetic", "title"]).pairs.rows.pair(0).columns == (
        0,
        1,
    )
    record = {"image": "x.png", "title": "real", "synthetic": ["made", "more"]}
    (tmp_path / "t.jsonl").write_text(json.dumps(record) + "\n")
    table = {"image": [picture("red")], "title": ["real"], "synthetic": [["made", "more"]]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.parquet"):
        (read,) = pairs_of(f"{tmp_path}/{name}", "image", "title", "synthetic").values()
        assert read == (("real", "made", "more"), (0, 1, 1), "")
    (tmp_path / "folder").mkdir()
    write_picture(tmp_path / "folder" / "x.png", "red", size=8)
    (tmp_path / "folder" / "x.txt").write_text("real")
    (tmp_path / "folder" / "x.syn.txt").write_text("made")
    (read,) = pairs_of(f"{tmp_path}/folder", "png", "txt", "syn.txt").values()
    assert read == (("real", "made"), (0, 1), "")
    with pytest.raises(UserError, match="names one twice"):
        open_source(f"{tmp_path}/t.csv", columns=["filepath", "title", "title"])
    with pytest.raises(UserError, match="none of the first 1,000 pairs .* has a caption in 'nosuch': check"):
        open_source(f"{tmp_path}/t.jsonl", columns=["image", "title", "nosuch"])
    with pytest.raises(UserError, match="nosuch"):
        open_source(f"{tmp_path}/t.csv", columns=["filepath", "title", "nosuch"])
    with pytest.raises(UserError, match="--columns filepath must name the image and the caption column: name both"):
        open_source(f"{tmp_path}/t.csv", columns=["filepath"])


@pytest.mark.parametrize(
    ("weights", "count"), [(None, 1), (None, 2), ((3.0, 1.0), 1), ((3.0, 1.0), 2), ((1.0, 2.0), 5)]
)
def test_each_column_has_its_share_of_the_draws(weights, count):
    """At most one draw away from the share in every step, and the share in the mean."""
    columns = [0, 1, 1, 1, 0, 0]
    share = (0.5, 0.5) if weights is None else [w / sum(weights) for w in weights]
    total = Counter()
    for seed in range(2000):
        drawn = draw_captions(random.Random(seed), columns, weights, count)
        assert len(drawn) == count
        of_column = Counter(columns[number] for number in drawn)
        for column in (0, 1):
            assert abs(of_column[column] - count * share[column]) < 1
            assert len({n for n in drawn if columns[n] == column}) == min(of_column[column], 3)
        total += Counter(drawn)
    for number, column in enumerate(columns):
        assert total[number] / 2000 == pytest.approx(count * share[column] / 3, abs=0.05)


def test_a_column_without_captions_has_no_share_and_short_columns_repeat():
    assert sorted(draw_captions(random.Random(0), [1, 1], (5.0, 1.0, 2.0), 2)) == [0, 1]
    assert draw_captions(random.Random(0), [2], (5.0, 1.0, 2.0), 3) == [0, 0, 0]


def test_a_batch_has_one_real_and_one_synthetic_caption():
    """(1+1), also where captions before are empty; the texts are told apart by their length."""
    texts, columns = ("", "r" * 3, "r" * 4, "s" * 13, " ", "s" * 14), (0, 0, 0, 1, 1, 1)
    pairs = [RawPair(f"p{i}", picture("red"), texts, columns) for i in range(8)]
    stream = PairStream(
        memory_source("toy", pairs),
        augment=light_augmentation(8),
        tokenizers={"text": lambda texts: torch.tensor([[len(text)] for text in texts])},
        batch_size=4,
        seed=0,
        rank=0,
        world_size=1,
        num_workers=0,
        captions_per_image=2,
    )
    iterator, seen = iter(stream), set()
    for _ in range(8):
        for real, synthetic in next(iterator)["text"][:, :, 0].tolist():
            assert real in (3, 4) and synthetic in (13, 14)
            seen |= {real, synthetic}
    assert seen == {3, 4, 13, 14}


def test_the_recipe_draws_by_the_shares(tmp_path, call):
    """All captions of the second column are equal, so that with its share alone every image has every caption."""
    rows = "".join(f"{n}.png,real {n},made\n" for n in range(8))
    (tmp_path / "t.csv").write_text("filepath,title,synthetic\n" + rows)
    for n in range(8):
        write_picture(tmp_path / f"{n}.png", "red", size=8)
    (tmp_path / "student.json").write_text(json.dumps(CONFIG))
    flags = ["--train-data", f"{tmp_path}/t.csv", "--columns", "filepath", "title", "synthetic", "--steps", "1"]
    flags += ["--teacher", "none", "--student", f"{tmp_path}/student.json", "--batch-size", "8", "--workers", "0"]
    for shares, expected in ((["1e-9", "1"], 1.0), (["1", "1e-9"], 0.125)):
        name = f"run_{shares[0]}"
        code, _, errors = call(*flags, "--caption-weights", *shares, "--output-dir", name)
        assert code == 0, errors
        assert json.loads(Path(name, "results.jsonl").read_text().splitlines()[-1])["train/batch_acc1"] == expected


def test_the_recipe_takes_a_share_for_each_column(tmp_path, call):
    (tmp_path / "t.csv").write_text("filepath,title,synthetic\nx.png,real,made\n")
    flags = ["--train-data", f"{tmp_path}/t.csv", "--columns", "filepath", "title", "synthetic", "--steps", "1"]
    code, _, errors = call(*flags, "--caption-weights", "1", "2", "3")
    assert code == 2 and "--caption-weights has 3 values for 2 caption columns: give one for each" in errors
    code, _, errors = call("--caption-weights", "1", "2")
    assert code == 2 and "--caption-weights has 2 values for 1 caption columns" in errors
