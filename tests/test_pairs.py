"""An epoch has every pair once, broken pairs are counted, and a resumed stream yields the same batches."""

import io
import json
import random
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from gkl_vl.data import pair_stream, sources
from gkl_vl.data.augment import apply_seeded, drawing_augmentation, light_augmentation
from gkl_vl.data.captions import CaptionRule, usable_captions
from gkl_vl.data.files import stable_hash
from gkl_vl.data.images import decode
from gkl_vl.data.pair_stream import PairLoader, PairStream, Place, Position
from gkl_vl.data.pairs import bundled_pairs, open_source
from gkl_vl.data.sources import RawPair, Source, memory_source, read_shard
from gkl_vl.errors import UserError


def picture(index: int, format: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (index % 256, 50, 200)).save(file, format)
    return file.getvalue()


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for suffix, body in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return path


def good(index: int) -> tuple[str, dict[str, bytes]]:
    return f"k{index:03d}", {"png": picture(index), "txt": f"caption {index}".encode()}


def write_shards(folder: Path, num_shards: int, each: int) -> str:
    for shard in range(num_shards):
        write_shard(folder / f"{shard:03d}.tar", [good(shard * each + i) for i in range(each)])
    return f"{folder}/{{000..{num_shards - 1:03d}}}.tar"


def toy_pairs(num: int) -> list[RawPair]:
    return [RawPair(f"p{i}", picture(i), (f"caption {i}", f"other {i}")) for i in range(num)]


def lengths(texts: list[str]) -> torch.Tensor:
    """A tokenizer: characters as numbers."""
    return torch.tensor([[ord(c) for c in text.ljust(14)[:14]] for text in texts])


def stream(source, *, rank=0, world_size=1, num_workers=0, start=None, seed=0, batch_size=4, captions=1):
    return PairStream(
        source,
        augment=light_augmentation(8),
        tokenizers={"text": lengths},
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        captions_per_image=captions,
        start=start,
    )


def take(loader: PairLoader, num: int) -> list[dict]:
    return list(islice(iter(loader), num))


def same(a: dict, b: dict) -> bool:
    return a["keys"] == b["keys"] and all(torch.equal(a[k], b[k]) for k in ("image", "text", "text_ids"))


# ---- sources


@pytest.mark.parametrize("parts", [1, 3, 6])
@pytest.mark.parametrize("kind", ["shards", "memory"])
def test_the_parts_of_an_epoch_have_every_pair_once(tmp_path, kind, parts):
    if kind == "shards":
        source = open_source(write_shards(tmp_path, 6, 7))
    else:
        source = memory_source("toy", toy_pairs(42))
    epochs = []
    for epoch in (0, 1):
        keys = [pair.key for part in range(parts) for pair in source.epoch(3, epoch, part, parts)]
        assert len(keys) == 42 and len(set(keys)) == 42
        epochs.append(keys)
    assert epochs[0] != epochs[1]
    again = [pair.key for part in range(parts) for pair in source.epoch(3, 0, part, parts)]
    assert again == epochs[0]
    other_seed = [pair.key for part in range(parts) for pair in source.epoch(4, 0, part, parts)]
    assert other_seed != epochs[0]


def test_a_buffer_smaller_than_the_shard_still_yields_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHUFFLE_BUFFER", 5)
    source = open_source(write_shards(tmp_path, 1, 23))
    keys = [pair.key for pair in source.epoch(0, 0, 0, 1)]
    assert sorted(keys) == [f"k{i:03d}" for i in range(23)] and keys != sorted(keys)


def test_too_few_shards_are_refused_with_the_numbers(tmp_path):
    source = open_source(write_shards(tmp_path, 3, 2))
    with pytest.raises(UserError, match=r"3 shards cannot be split over 2 processes x 2 workers = 4: lower --workers"):
        stream(source, world_size=2, num_workers=2)


def test_a_missing_shard_raises_at_once(tmp_path):
    pattern = write_shards(tmp_path, 2, 2).replace("001", "004")
    with pytest.raises(UserError, match=r"002.tar' does not exist \(3 of 5 are missing\)"):
        open_source(pattern)


def test_a_truncated_shard_is_named(tmp_path):
    path = write_shard(tmp_path / "a.tar", [good(i) for i in range(9)])
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(UserError, match="a.tar' ends early or is damaged"):
        list(read_shard(str(path)))
    with pytest.raises(
        UserError, match="a.tar' ends early .6000 bytes without an end-of-archive mark.: fetch it again"
    ):
        open_source(str(path))  # before the run


def test_sources_are_joined_and_sized(tmp_path):
    for name, each in (("a", 3), ("b", 5)):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, 2, each)
    spec = f"{tmp_path}/a/{{000..001}}.tar::{tmp_path}/b/000.tar"
    assert open_source(spec).num_pairs is None
    (tmp_path / "a" / "sizes.json").write_text(json.dumps({"000.tar": 3, "001.tar": 3}))
    (tmp_path / "b" / "__len__").write_text("5")
    source = open_source(spec)
    assert source.num_pairs == 11 and source.num_parts == 3  # __len__ is no size of a shard
    assert len(list(source.epoch(0, 0, 0, 1))) == 11


def test_a_pipe_is_a_shard(tmp_path):
    path = write_shard(tmp_path / "a.tar", [good(1), good(2)])
    source = open_source(f"pipe:cat {path}")
    assert sorted(pair.key for pair in source.epoch(0, 0, 0, 1)) == ["k001", "k002"]


def test_pairs_are_read_from_all_kinds_of_members(tmp_path):
    samples = [
        ("a", {"jpg": picture(1, "jpeg"), "txt": b"one\n\ntwo\n", "json": b'{"caption": "not this"}'}),
        ("dir/b", {"png": picture(2), "json": b'{"caption": "three"}'}),
        ("dir2/b", {"webp": picture(3, "webp"), "json": b'{"caption": ["four", "five"]}'}),
        ("c", {"PNG": picture(4), "txt": b"six"}),
        ("d", {"png": picture(5), "json": b"not json"}),
        ("readme", {"md": b"something else"}),
    ]
    path = str(write_shard(tmp_path / "a.tar", samples))
    read = list(read_shard(path, rule=CaptionRule(lines=True)))
    assert [pair.key for pair in read] == ["a", "dir/b", "dir2/b", "c", "d", "readme"]
    assert [usable_captions(pair.captions) for pair in read[:4]] == [
        ["one", "two"],
        ["three"],
        ["four", "five"],
        ["six"],
    ]
    assert all(decode(pair.image).size == (16, 12) for pair in read[:4])
    assert "no JSON" in read[4].problem and "no image, its members are .md" in read[5].problem
    assert next(read_shard(path, rule=CaptionRule())).captions == ("one\n\ntwo\n",)  # the whole text by default


@pytest.mark.parametrize("name, delimiter", [("t.csv", ","), ("t.tsv", "\t"), ("open_clip.csv", "\t")])
def test_tables_of_text_have_relative_paths_and_named_columns(tmp_path, name, delimiter):
    (tmp_path / "images").mkdir()
    for index in range(3):
        (tmp_path / "images" / f"{index}.png").write_bytes(picture(index))
    lines = [delimiter.join(["filepath", "title", "alt"])]
    lines += [delimiter.join([f"images/{i}.png", f"title {i}", f"alt {i}"]) for i in range(3)]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    source = open_source(str(tmp_path / name))
    read = sorted(source.epoch(0, 0, 0, 1), key=lambda pair: pair.key)
    assert [usable_captions(pair.captions) for pair in read] == [["title 0"], ["title 1"], ["title 2"]]
    assert decode(read[1].image).getpixel((0, 0)) == (1, 50, 200)
    renamed = open_source(str(tmp_path / name), columns=("filepath", "alt"))
    assert {pair.captions[0] for pair in renamed.epoch(0, 0, 0, 1)} == {"alt 0", "alt 1", "alt 2"}
    with pytest.raises(UserError, match="no column 'url', only filepath, title, alt: name them with --columns"):
        open_source(str(tmp_path / name), columns=("url", "title"))


def test_parquet_of_the_hubs_layout(tmp_path):
    for part in range(2):
        rows = {
            "img": [{"bytes": picture(10 * part + i), "path": None} for i in range(3)],
            "text": [f"caption {part}{i}" for i in range(3)],
        }
        features = datasets.Features({"img": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"train-{part}.parquet")
    source = open_source(str(tmp_path), columns=("img", "text"))
    assert source.num_pairs == 6
    reds = {pair.captions[0]: decode(pair.image).getpixel((0, 0))[0] for pair in source.epoch(0, 0, 0, 1)}
    assert reds == {f"caption {part}{i}": 10 * part + i for part in range(2) for i in range(3)}
    one = open_source(str(tmp_path / "train-1.parquet"), columns=("img", "text"))
    assert one.num_pairs == 3
    with pytest.raises(UserError, match="no column 'caption', only img, text"):
        open_source(str(tmp_path))


def test_a_source_that_does_not_exist_raises_one_line(tmp_path):
    with pytest.raises(UserError, match=r"'.*nothing.csv' does not exist"):
        open_source(str(tmp_path / "nothing.csv"))
    with pytest.raises(UserError, match="could not be had from the Hub.*check the name and the connection") as caught:
        open_source("org/surely-no-such-set")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="holds no shard, no parquet file and no image .*, it has nothing"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["shards", "sized shards", "parquet", "folder", "memory"])
def test_the_blocks_hold_every_pair_once_in_order_with_its_place(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "BLOCK_ROWS", 5)
    if "shards" in kind:
        urls = write_shards(tmp_path, 3, 5)
        if kind == "sized shards":
            (tmp_path / "sizes.json").write_text(json.dumps({f"{shard:03d}.tar": 5 for shard in range(3)}))
        source, names = open_source(urls), [f"{tmp_path}/{shard:03d}.tar" for shard in range(3)]
    else:
        names = ["row 0", "row 5", "row 10"]
        if kind == "memory":
            source = memory_source("toy", toy_pairs(13))
        elif kind == "folder":
            for key, members in map(good, range(13)):
                for ending, content in members.items():
                    (tmp_path / f"{key}.{ending}").write_bytes(content)
            source = open_source(str(tmp_path))
        else:
            table = {"image": [picture(i) for i in range(13)], "caption": [f"caption {i}" for i in range(13)]}
            datasets.Dataset.from_dict(table).to_parquet(tmp_path / "x.parquet", batch_size=4)
            source = open_source(str(tmp_path / "x.parquet"))
    assert list(source.pairs.blocks) == names
    stored = {(pair.block, pair.row): pair for block in range(3) for pair in source.pairs.read(block)}
    assert list(stored) == [divmod(index, 5) for index in range(source.num_pairs or 15)]
    of_epoch = {(pair.block, pair.row): pair for part in range(2) for pair in source.epoch(0, 1, part, 2)}
    assert of_epoch == stored and list(of_epoch) != list(stored)


# ---- broken pairs


def with_broken(num: int, every: int) -> list[RawPair]:
    """Pairs of which every `every`-th is broken, in three ways in turn."""
    rows = toy_pairs(num)
    ways = [{"image": b"no image"}, {"captions": ("", "  ")}, {"image": None}]
    for count, index in enumerate(range(0, num, every)):
        pair = rows[index]
        change = {"image": pair.image, "captions": pair.captions} | ways[count % 3]
        rows[index] = RawPair(pair.key, change["image"], change["captions"])
    return rows


def test_broken_pairs_are_skipped_and_counted():
    loader = PairLoader(stream(memory_source("toy", with_broken(60, 30))))
    batches = iter(loader)
    keys = [key for batch in islice(batches, 14) for key in batch["keys"]]
    assert "p0" not in keys and "p30" not in keys and len(set(keys)) == 56
    assert loader.num_skipped() <= 2
    next(batches)  # in the second epoch: both broken pairs of the first are counted
    assert 2 <= loader.num_skipped() <= 4


def test_too_many_broken_pairs_raise_and_three_are_named():
    loader = PairLoader(stream(memory_source("toy", with_broken(300, 5))))
    with pytest.raises(UserError, match=r"51 of the last \d+ pairs of 'toy' are broken, among them p\d+ \(.*;.*;"):
        take(loader, 1000)


def test_an_error_in_a_worker_is_raised_as_one_line():
    loader = PairLoader(stream(memory_source("toy", with_broken(300, 2)), num_workers=1))
    with pytest.raises(UserError, match="51 of the last") as caught:
        take(loader, 1000)
    assert "Traceback" not in str(caught.value)


def test_fewer_pairs_than_workers_are_refused():
    with pytest.raises(UserError, match="has 1 pairs, fewer than 2"):
        stream(memory_source("toy", toy_pairs(1)), world_size=2)


# ---- streams


@pytest.mark.parametrize("num_workers, stops", [(0, [1, 7]), (2, [1, 6, 7])])
def test_a_resumed_stream_yields_the_same_batches(num_workers, stops):
    source = memory_source("toy", with_broken(50, 24))
    uninterrupted = PairLoader(stream(source, num_workers=num_workers))
    whole = take(uninterrupted, 16)
    for stop in stops:
        first = PairLoader(stream(source, num_workers=num_workers))
        batches = take(first, stop)
        position = json.loads(json.dumps(first.position()))  # as a checkpoint stores it
        second = PairLoader(stream(source, num_workers=num_workers, start=Position.of(position)))
        batches += take(second, 16 - stop)
        assert all(same(a, b) for a, b in zip(batches, whole, strict=True))
        assert second.position() == uninterrupted.position()
        assert second.num_skipped() == uninterrupted.num_skipped() > 0


def test_a_resumed_stream_reads_no_earlier_epoch():
    pairs, read = toy_pairs(8), []

    class Counted(sources.IndexedPairs):
        def epoch(self, seed, number, part, parts):
            read.append(number)
            return super().epoch(seed, number, part, parts)

    source = Source("toy", len(pairs), None, Counted(memory_source("toy", pairs).pairs.rows))
    first = PairLoader(stream(source))
    batches = take(first, 5)  # of four: the fifth ends in the third epoch
    start = Position.of(first.position())
    read.clear()
    (again,) = take(PairLoader(stream(source, start=start)), 1)
    assert read == [2] and same(again, take(PairLoader(stream(source)), 6)[5]) and not same(again, batches[4])


def test_broken_pairs_before_a_resume_count_after_it():
    source = memory_source("toy", with_broken(300, 5))
    first = PairLoader(stream(source))
    take(first, 40)
    assert 0 < first.num_skipped() < 51
    with pytest.raises(UserError, match=r"51 of the last \d+ pairs") as stopped:
        take(PairLoader(stream(source, start=Position.of(first.position()))), 1000)
    with pytest.raises(UserError) as straight:
        take(PairLoader(stream(source)), 1000)
    assert str(stopped.value).split(" are")[0] == str(straight.value).split(" are")[0]


def test_another_number_of_workers_is_refused_on_resume():
    with pytest.raises(UserError, match="--workers 2 gives 2 streams, the checkpoint has 1"):
        stream(memory_source("toy", toy_pairs(9)), num_workers=2, start=Position(3, (Place(),)))


def test_ranks_and_workers_share_an_epoch(tmp_path):
    source = open_source(write_shards(tmp_path, 4, 8))
    counts: Counter = Counter()
    for rank in range(2):
        loader = PairLoader(stream(source, rank=rank, world_size=2, num_workers=2))
        counts.update(key for batch in take(loader, 4) for key in batch["keys"])
    assert len(counts) == 32 and set(counts.values()) == {1}


def test_a_second_iteration_of_a_loader_restarts_with_its_position():
    loader = PairLoader(stream(memory_source("toy", toy_pairs(20))))
    first, position = take(loader, 3), loader.position()
    again = take(loader, 3)
    assert all(same(x, y) for x, y in zip(first, again, strict=True))
    assert loader.position() == position


def test_another_seed_is_another_stream():
    source = memory_source("toy", toy_pairs(20))
    a, b, c = (take(PairLoader(stream(source, seed=seed)), 2) for seed in (0, 0, 1))
    assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert not same(a[0], c[0])


def test_a_caption_that_was_tokenised_already_is_not_again_and_has_the_same_tokens(monkeypatch):
    monkeypatch.setattr(pair_stream, "CACHED_CAPTIONS", 5)
    tokenised = []
    tokenize = pair_stream._CachedTokens(lambda captions: tokenised.append(captions) or lengths(captions))
    for batch in (["a", "b", "a"], ["b", "c"], ["d", "e", "f"], ["a", "f"], ["1", "2", "3", "4", "5", "6", "7"]):
        assert torch.equal(tokenize(batch), lengths(batch))
    # The third batch would make six rows: the earlier ones are dropped.
    assert tokenised == [["a", "b"], ["c"], ["d", "e", "f"], ["a"], ["1", "2", "3", "4", "5", "6", "7"]]


def test_text_ids_are_equal_where_captions_are():
    source = memory_source("toy", [RawPair(f"p{i}", picture(i), (f"caption {i % 3}",)) for i in range(8)])
    batch = take(PairLoader(stream(source, batch_size=8)), 1)[0]
    captions = ["".join(map(chr, row)).strip() for row in batch["text"].tolist()]
    for i in range(8):
        for j in range(8):
            assert (batch["text_ids"][i] == batch["text_ids"][j]) == (captions[i] == captions[j])
    assert batch["text_ids"][0] == stable_hash(captions[0])


def test_captions_of_an_image_differ_where_it_has_enough():
    pairs = [RawPair(f"p{i}", picture(i), tuple(f"{i} {c}" for c in range(i + 1))) for i in range(6)]
    first = take(PairLoader(stream(memory_source("toy", pairs), batch_size=6)), 1)[0]
    drawn = set()
    for batch in take(PairLoader(stream(memory_source("toy", pairs), batch_size=6, captions=3)), 9):
        assert batch["text"].shape == (6, 3, 14) and batch["text_ids"].shape == (6, 3)
        for key, tokens, ids in zip(*(batch[k] for k in ("keys", "text", "text_ids")), strict=True):
            pair = int(key[1:])
            texts = ["".join(map(chr, row)).strip() for row in tokens.tolist()]
            assert all(text.startswith(f"{pair} ") for text in texts)
            assert ids.tolist() == [stable_hash(text) for text in texts]
            assert len(set(texts)) == min(pair + 1, 3)
            drawn.add(texts[0])
    assert len(drawn) > 15  # of 21
    alone = take(PairLoader(stream(memory_source("toy", pairs), batch_size=6, captions=3)), 1)[0]
    assert torch.equal(alone["text"][:, 0], first["text"]), "the first caption is the one of a single caption"


# ---- augmentation and the bundled set


def test_an_augmentation_is_drawn_by_its_seed_alone():
    image, augment = Image.effect_noise((64, 64), 90).convert("RGB"), drawing_augmentation(48)
    before = torch.get_rng_state(), random.getstate()
    a, b, c = (apply_seeded(augment, image, seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before[0], torch.get_rng_state())
    assert a.shape == (3, 48, 48) and a.dtype == torch.uint8


def test_an_augmentation_that_fails_leaves_the_generator():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        apply_seeded(lambda image: torch.rand(1) / (1 // 0), Image.new("RGB", (2, 2)), 1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_light_augmentation_keeps_nine_tenths():
    image = Image.new("RGB", (100, 60), (9, 8, 7))
    view = apply_seeded(light_augmentation(32), image, 0)
    assert view.shape == (3, 32, 32) and torch.equal(view[:, 0, 0], torch.tensor([9, 8, 7], dtype=torch.uint8))
    crop = light_augmentation(32).transforms[0]
    assert isinstance(crop, v2.RandomResizedCrop) and tuple(crop.scale) == (0.9, 1.0)


def test_the_bundled_pairs_are_of_two_styles():
    bundled = bundled_pairs()
    assert {pair.key.split("-")[0] for pair in bundled} == {"noto", "twemoji"}
    assert open_source(None).num_pairs == len(bundled)
