"""Inputs that people really have, for each reader of training pairs, labels and evaluation sets: the right value, a
broken pair with its reason, or one line. The rules are in docs/data.md."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
import timm
from PIL import Image
from pyarrow import parquet
from small_sets import picture, write_shard

from gkl_vl.data.captions import usable_captions
from gkl_vl.data.images import BrokenSample, decode
from gkl_vl.data.label_splits import read_labelled
from gkl_vl.data.labelled import open_image_set, open_labelled
from gkl_vl.data.pairs import open_images, open_source
from gkl_vl.data.prompts import read_prompts
from gkl_vl.data.sources import RawPair, Source
from gkl_vl.errors import UserError
from gkl_vl.evaluation.set_collections import expand
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.evaluation.sources import captioned_files
from gkl_vl.models import weights
from gkl_vl.models.classifiers import load_classifier
from gkl_vl.models.clip import load_clip

RED, GREEN, BLUE = (picture(colour) for colour in ("red", "green", "blue"))


def all_pairs(source: Source, *, parts: int = 1) -> list[RawPair]:
    """One epoch, sorted by key."""
    found = [pair for part in range(parts) for pair in source.epoch(0, 0, part, parts)]
    return sorted(found, key=lambda pair: pair.key)


def captions_of(source: Source) -> dict[str, list[str] | str]:
    """Captions by key, or the reason why the pair is broken."""
    found: dict[str, list[str] | str] = {}
    for pair in all_pairs(source):
        try:
            if pair.problem:
                raise BrokenSample(pair.problem)
            found[pair.key] = usable_captions(pair.captions)
        except BrokenSample as error:
            found[pair.key] = str(error)
    return found


def refused(call: Callable, *args, **kwargs) -> str:
    """The message of the UserError, which is one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def benchmark_shard(root: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """A set in CLIP_benchmark's layout with one shard; returns the shard."""
    write(root / "classnames.txt", "a\nb\n")
    write(root / "zeroshot_classification_templates.txt", "{c}\n")
    write(root / "test" / "nshards.txt", "1")
    write_shard(root / "test" / "0.tar", samples)
    return root / "test" / "0.tar"


def sample(index: int) -> tuple[str, dict[str, bytes]]:
    return f"k{index}", {"png": RED, "cls": b"1", "txt": b"a red square"}


def read_training(root: Path) -> list[str]:
    return [pair.key for pair in all_pairs(open_source(str(root / "test" / "0.tar")))]


def read_labels(root: Path) -> list[str]:
    data = open_labelled(str(root / "test" / "0.tar"), "test")
    return [data.images(index).where for index in range(len(data))]


def read_evaluation(root: Path) -> list[str]:
    return [record.where for record in load_benchmark_set(str(root)).records("cls")]


READERS = [read_training, read_labels, read_evaluation]


# ---- shards: one list of rules for all readers -------------------------------------------------------------------


@pytest.mark.parametrize("read", READERS)
def test_a_shard_cut_at_a_members_start_is_refused_by_every_reader(tmp_path, read):
    shard = benchmark_shard(tmp_path, [sample(index) for index in range(10)])
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[12].offset
    shard.write_bytes(shard.read_bytes()[:offset])
    assert "0.tar' ends early" in refused(read, tmp_path)


@pytest.mark.parametrize("read", READERS)
def test_a_shard_with_garbage_behind_a_member_is_refused_by_every_reader(tmp_path, read):
    shard = benchmark_shard(tmp_path, [sample(index) for index in range(4)])
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[6].offset
    shard.write_bytes(shard.read_bytes()[:offset] + b"x" * 512 + bytes(1024))  # it ends in zeros
    assert f"damaged (no end-of-archive mark at byte {offset})" in refused(read, tmp_path)


def test_a_compressed_shard_that_is_cut_is_refused(tmp_path):
    write_shard(tmp_path / "a.tar", [sample(index) for index in range(4)])
    whole = gzip.compress((tmp_path / "a.tar").read_bytes())
    for name in ("a.tgz", "a.tar.gz", "b.TAR.GZ"):
        write(tmp_path / name, whole)
        assert len(all_pairs(open_source(str(tmp_path / name)))) == 4
        write(tmp_path / name, whole[:-40])
        assert "ends early or is damaged" in refused(all_pairs, open_source(str(tmp_path / name)))
    assert "is compressed, and images are read by position" in refused(open_labelled, str(tmp_path / "a.tgz"), "train")


@pytest.mark.parametrize("read", READERS)
def test_hidden_and_foreign_members_are_no_samples(tmp_path, read):
    junk = ["._k0", ".hidden/k1", "__MACOSX/k2", "a/.ipynb_checkpoints/k3", "__meta__"]
    benchmark_shard(tmp_path, [(name, {"png": RED, "cls": b"0", "txt": b"junk"}) for name in junk] + [sample(7)])
    (found,) = read(tmp_path)
    assert "k7" in found or "0.tar" in found


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "members, reason",
    [
        ({"jpg": RED, "png": RED}, "two images, .png and .jpg: keep one"),
        ({"1.jpg": RED, "2.jpg": RED}, "its members are .1.jpg, .2.jpg"),
        ({"heic": RED}, "no image, its members are .heic"),
    ],
)
def test_a_sample_without_one_image_is_named_by_every_reader(tmp_path, read, members, reason):
    benchmark_shard(tmp_path, [("b", members | {"cls": b"1", "txt": b"a caption"}), sample(0)])
    if read is read_training:
        problems = captions_of(open_source(str(tmp_path / "test" / "0.tar")))
        assert reason in problems["b"] and problems["k0"] == ["a red square"]
    else:
        assert reason in refused(read, tmp_path) and "'b'" in refused(read, tmp_path)


def test_a_member_that_occurs_twice_is_a_broken_pair(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for image in (RED, GREEN):
            info = tarfile.TarInfo("k.png")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    assert captions_of(open_source(str(tmp_path / "a.tar"))) == {"k": "two .png members: keep one"}


def test_files_without_an_ending_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("0001")
        info.size = len(RED)
        tar.addfile(info, io.BytesIO(RED))
    assert captions_of(open_source(str(tmp_path / "a.tar"))) == {"0001": "no image, its name has no ending"}


def test_shards_are_named_by_glob_folder_and_braces(tmp_path):
    (tmp_path / "d").mkdir()
    for number in range(3):
        write_shard(tmp_path / "d" / f"{number}.tar", [(f"k{number}", {"png": RED, "txt": b"x"})])
        datasets.Dataset.from_dict({"url": ["http://x/y.jpg"], "caption": ["x"]}).to_parquet(
            tmp_path / "d" / f"{number}.parquet"
        )  # as img2dataset writes beside its shards
    for name in (f"{tmp_path}/d/*.tar", f"{tmp_path}/d", f"{tmp_path}/d/{{0..2}}.tar"):
        assert list(captions_of(open_source(name))) == ["k0", "k1", "k2"]
        assert [pair.key for pair in all_pairs(open_images(name))] == ["k0", "k1", "k2"]
    message = refused(open_source, f"{tmp_path}/d/no-*.tar")
    assert "does not exist" in message and "'a-*.tar'" in message


def test_a_git_lfs_pointer_is_no_shard(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    write(tmp_path / "a.tar", pointer)
    for call in (open_source, open_images, lambda name: open_labelled(name, "train")):
        assert "a.tar' is a Git LFS pointer, not the file: run `git lfs pull`" in refused(call, str(tmp_path / "a.tar"))


def test_columns_name_the_members_and_fields_of_shards(tmp_path):
    record = json.dumps({"caption": "short", "alt": "long", "sentences": [{"raw": "one"}, {"raw": "two"}]}).encode()
    members = {"png": RED, "jpg": GREEN, "txt": b"text", "desc": b"other", "json": record}
    write_shard(tmp_path / "a.tar", [("k", members)])
    name = str(tmp_path / "a.tar")
    for columns, captions in [
        (("jpg", "txt"), ["text"]),
        (("png", "desc"), ["other"]),
        (("jpg", "alt"), ["long"]),
        (("jpg", "sentences.raw"), ["one", "two"]),
    ]:
        (pair,) = all_pairs(open_source(name, columns=columns))
        assert list(pair.captions) == captions and pair.image == (GREEN if columns[0] == "jpg" else RED)
    assert "no .gif member" in captions_of(open_source(name, columns=("gif", "txt")))["k"]
    assert "has no 'nosuch', only 'caption', 'alt'" in captions_of(open_source(name, columns=("jpg", "nosuch")))["k"]


@pytest.mark.parametrize("file", ["sizes.json", "__len__", "0_stats.json"])
@pytest.mark.parametrize("content", ["[1]", "five", '{"0.tar": "many", "successes": -1}', "[" * 100_000])
def test_malformed_sizes_are_one_line(tmp_path, file, content):
    write_shard(tmp_path / "0.tar", [sample(0)])
    write(tmp_path / file, content)
    assert file in refused(open_source, str(tmp_path / "0.tar"))


# ---- equal shares of an epoch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shards_of_known_sizes_are_divided_by_pairs(tmp_path, parts):
    sizes = [1, 20, 4, 12]
    first = 0
    for number, size in enumerate(sizes):
        write_shard(tmp_path / f"{number}.tar", [sample(first + index) for index in range(size)])
        first += size
        write(tmp_path / f"{number}_stats.json", json.dumps({"successes": size, "count": size + 3}))  # img2dataset's
    source = open_source(str(tmp_path))
    assert source.num_pairs == 37 and source.num_parts is None and source.note(parts) is None
    for epoch in range(3):
        shares = [[pair.key for pair in source.epoch(0, epoch, part, parts)] for part in range(parts)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert sorted(key for share in shares for key in share) == sorted(f"k{index}" for index in range(37))


def test_wrong_sizes_are_refused(tmp_path):
    write_shard(tmp_path / "0.tar", [sample(index) for index in range(5)])
    for size in (4, 6):
        write(tmp_path / "sizes.json", json.dumps({"0.tar": size}))
        source = open_source(str(tmp_path))
        assert f"holds 5 pairs, and the file with sizes beside it says {size}" in refused(all_pairs, source)


def test_unequal_shares_are_reported(tmp_path):
    for number, size in enumerate([1, 1, 30]):
        write_shard(tmp_path / f"{number}.tar", [sample(index) for index in range(size)])
    source = open_source(str(tmp_path))
    assert source.note(1) is None
    assert "3 shards are read by 3 streams whose shares of the data are" in source.note(3)
    assert "write sizes.json" in source.note(2)


# ---- folders -----------------------------------------------------------------------------------------------------


def test_an_image_with_a_text_beside_it_is_a_pair(tmp_path):
    write(tmp_path / "a.png", RED)
    write(tmp_path / "a.txt", "a red square,\nin two lines")
    write(tmp_path / "deep" / "b.v2.PNG", GREEN)
    write(tmp_path / "deep" / "b.v2.json", json.dumps({"caption": ["green", "also green"], "alt": "g"}))
    write(tmp_path / "c.png", BLUE)
    write(tmp_path / ".ipynb_checkpoints" / "a.png", RED)
    write(tmp_path / "._a.png", b"\0\5\x16\7")
    source = open_source(str(tmp_path))
    assert captions_of(source) == {
        "a.png": ["a red square,\nin two lines"],
        "c.png": "no caption",
        "deep/b.v2.PNG": ["green", "also green"],
    }
    assert decode(all_pairs(source)[2].image).getpixel((0, 0)) == (0, 255, 0)
    lines = open_source(str(tmp_path), caption_lines=True)
    assert captions_of(lines)["a.png"] == ["a red square,", "in two lines"]
    assert captions_of(open_source(str(tmp_path), columns=("PNG", "alt")))["deep/b.v2.PNG"] == ["g"]


def test_a_folder_without_captions_says_how_to_add_them(tmp_path):
    write(tmp_path / "a.png", RED)
    assert "put the caption of x.jpg into x.txt" in refused(open_source, str(tmp_path))
    write(tmp_path / "metadata.csv", "file_name,text\na.png,a red square\n")
    message = refused(open_source, str(tmp_path))
    assert "metadata.csv with --columns file_name text" in message
    named = open_source(f"{tmp_path}/metadata.csv", columns=("file_name", "text"))
    assert captions_of(named) == {"a.png": ["a red square"]}


def write_split_folder(root: Path, kind: str) -> None:
    for split, colour in (("train", RED), ("test", GREEN)):
        if kind == "parquet":
            table = {"image": [colour], "caption": [split]}
            datasets.Dataset.from_dict(table).to_parquet(root / f"{split}-00000-of-00001.parquet")
        elif kind == "converted":  # the Hub's own conversion to parquet
            (root / "default" / split).mkdir(parents=True)
            datasets.Dataset.from_dict({"image": [colour], "caption": [split]}).to_parquet(
                root / "default" / split / "0000.parquet"
            )
        elif kind == "shards":
            (root / split).mkdir()
            write_shard(root / split / "0.tar", [(split, {"png": colour, "txt": split.encode()})])
        else:
            write(root / split / "a.png", colour)
            write(root / split / "a.txt", split)


@pytest.mark.parametrize("kind", ["parquet", "converted", "shards", "images"])
def test_a_split_of_a_folder_is_read_alone(tmp_path, kind):
    write_split_folder(tmp_path, kind)
    for name, split in ((f"{tmp_path}:train", "train"), (f"{tmp_path}:test", "test"), (str(tmp_path), "train")):
        assert list(captions_of(open_source(name)).values()) == [[split]]
        (pair,) = all_pairs(open_images(name))
        assert decode(pair.image).getpixel((0, 0)) == ((255, 0, 0) if split == "train" else (0, 255, 0))
    for call in (open_source, open_images):
        assert "has no split 'nosuch', splits there: test, train" in refused(call, f"{tmp_path}:nosuch")


def test_a_folder_with_splits_and_no_train_asks_for_one(tmp_path):
    write(tmp_path / "test" / "a.png", RED)
    write(tmp_path / "val" / "a.png", RED)
    message = f"has test, val, and which of these to train on is not clear: name one, as {tmp_path}:test"
    assert message in refused(open_images, str(tmp_path))


def test_a_class_may_be_named_as_a_split(tmp_path):
    for name in ("car", "plane", "train"):
        write(tmp_path / name / "a.png", RED)
    source = open_images(str(tmp_path))
    assert source.num_pairs == 3 and source.classnames == ("car", "plane", "train")
    write(tmp_path / "test" / "a.png", RED)
    assert "has car, plane, test, train, and which of these" in refused(open_images, str(tmp_path))
    assert open_images(f"{tmp_path}:train").num_pairs == 1


def test_a_file_has_no_split(tmp_path):
    write(tmp_path / "t.csv", "filepath,title\na.png,x\n")
    assert "is one file and has no split 'train': leave out ':train'" in refused(open_source, f"{tmp_path}/t.csv:train")


@pytest.mark.parametrize("junk", [".ipynb_checkpoints", "__MACOSX", ".DS_Store", "__pycache__"])
def test_junk_folders_and_files_are_no_classes_and_no_images(tmp_path, junk, capsys):
    for name in ("ant", "bee", junk):
        write(tmp_path / "train" / name / "0.png", RED)
    write(tmp_path / "train" / "ant" / junk / "1.png", RED)
    write(tmp_path / "train" / "ant" / "._0.png", b"\0\5\x16\7")
    data = open_labelled(str(tmp_path), "train")
    assert data.classnames == ("ant", "bee") and len(data) == 2
    assert load_benchmark_set(str(tmp_path), split="train").classnames == ["ant", "bee"]
    assert len(open_image_set(str(tmp_path), "train")) == 2
    source = open_images(f"{tmp_path}/train")
    assert source.num_pairs == 2 and source.classnames == ("ant", "bee")
    assert capsys.readouterr().err == ""


def test_files_of_other_kinds_are_counted(tmp_path, capsys):
    for name in ("a.png", "b.heic", "c.heic", "d", "e.txt"):
        write(tmp_path / "train" / "ant" / name, RED)
    assert len(open_labelled(str(tmp_path), "train")) == 1
    assert "train has files that are no images and are not read: 2 .heic, 1 without" in capsys.readouterr().err
    (tmp_path / "train" / "ant" / "a.png").unlink()
    assert "it has 2 .heic, 1 without ending" in refused(open_labelled, str(tmp_path), "train")
    assert "it has 2 .heic, 1 without ending" in refused(open_images, f"{tmp_path}/train")


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    write(tmp_path / "train" / "ant" / "a.png", RED)
    (tmp_path / "train" / "ant" / "loop").symlink_to(tmp_path)
    assert len(open_labelled(str(tmp_path), "train")) == open_images(f"{tmp_path}/train").num_pairs == 1


def test_a_file_name_that_is_not_utf8_is_a_key(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(RED)
    (pair,) = all_pairs(open_images(str(tmp_path)))
    assert pair.key == "caf\\udce9.png" and decode(pair.image).size == (8, 8)


# ---- CSV, TSV, JSON lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "|", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["t.csv", "t.CSV"])
def test_the_delimiter_is_found_and_a_byte_order_mark_skipped(tmp_path, delimiter, mark, name):
    rows = f"{mark}filepath;title\r\na.png;a red car\r\n\r\nb.png;5 % off\r\n"
    write(tmp_path / name, rows.replace(";", delimiter))
    assert captions_of(open_source(str(tmp_path / name))) == {"a.png": ["a red car"], "b.png": ["5 % off"]}


def test_a_quote_in_a_tsv_is_a_letter(tmp_path):
    write(tmp_path / "t.tsv", 'filepath\ttitle\n0\tone\n1\t"two\n2\tthree\n3\tfour 5"\n')
    assert captions_of(open_source(str(tmp_path / "t.tsv"))) == {
        "0": ["one"], "1": ['"two'], "2": ["three"], "3": ['four 5"'],
    }  # fmt: skip


def test_a_tsv_of_quoted_cells_is_read_with_the_flag_or_by_its_header(tmp_path):
    name = str(tmp_path / "t.tsv")
    write(Path(name), 'filepath\ttitle\n0\t"a ""big"" car"\n')
    assert "line 2 has a cell in double quotes: give --quoted" in refused(open_source, name)
    assert captions_of(open_source(name, quoted=True)) == {"0": ['a "big" car']}
    assert captions_of(open_source(name, quoted=False)) == {"0": ['"a ""big"" car"']}
    write(Path(name), '"filepath"\t"title"\n"0"\t"a ""big"" car"\n')
    assert captions_of(open_source(name)) == {"0": ['a "big" car']}


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_too_many_cells_are_refused_with_the_line(tmp_path, ending):
    delimiter = "," if ending == "csv" else "\t"
    rows = ["filepath,title", "0.jpg,fine", "1.jpg,a red car, parked, in Paris"]
    write(tmp_path / f"t.{ending}", "\n".join(rows).replace(",", delimiter))
    message = refused(open_source, str(tmp_path / f"t.{ending}"))
    assert f"t.{ending}' line 3 has 4 cells for the 2 columns filepath, title" in message


def test_too_few_cells_are_a_broken_pair(tmp_path):
    write(tmp_path / "t.csv", "filepath,title\n0.jpg,fine\n1.jpg\n")
    assert captions_of(open_source(str(tmp_path / "t.csv"))) == {"0.jpg": ["fine"], "1.jpg": "line 3 has 1 of 2 cells"}


@pytest.mark.parametrize(
    "rows, line, reason",
    [
        (['0.jpg,"one', "1.jpg,two", "2.jpg,three"], 2, "has a quote that does not enclose a cell"),
        (['0.jpg,"one', '1.jpg,"two"', "2.jpg,three"], 2, "has a quote that does not enclose a cell"),
        (["0.jpg,zero", '1.jpg,"one', '2.jpg,two"', "3.jpg,3"], 3, "has a cell of several lines that look like rows"),
        (['0.jpg,"one\t', '1.jpg\ttwo"'], 2, "has a cell of several lines that look like rows"),
    ],
)
def test_an_open_quote_is_refused_with_its_line(tmp_path, rows, line, reason):
    write(tmp_path / "t.csv", "\n".join(["filepath,title", *rows]) + "\n")
    assert f"t.csv' line {line} {reason}" in refused(open_source, str(tmp_path / "t.csv"))


def test_a_quoted_cell_holds_delimiters_quotes_and_line_ends(tmp_path):
    write(tmp_path / "t.csv", 'filepath,title\n0.jpg,"a ""red"" car,\nparked, in Paris"\n1.jpg,5" screen\n')
    assert captions_of(open_source(str(tmp_path / "t.csv"))) == {
        "0.jpg": ['a "red" car,\nparked, in Paris'],
        "1.jpg": ['5" screen'],
    }


def test_a_long_cell_is_read(tmp_path):
    write(tmp_path / "t.csv", f"filepath,title\n0.jpg,{'x' * 200_000}\n")
    assert len(captions_of(open_source(str(tmp_path / "t.csv")))["0.jpg"][0]) == 200_000


def test_a_table_that_is_not_utf8_is_refused_with_the_line_and_the_remedy(tmp_path):
    write(tmp_path / "t.csv", "filepath,title\n0.jpg,fine\n1.jpg,café\n".encode("latin-1"))
    message = refused(open_source, str(tmp_path / "t.csv"))
    assert "t.csv' line 3 is not UTF-8 (byte 0xe9)" in message and "iconv -f latin1 -t utf-8" in message


def test_images_that_are_urls_are_broken_with_a_remedy(tmp_path):
    write(tmp_path / "t.csv", "filepath,title\nhttps://host.org/0.jpg,fine\n")
    assert "fetch the images first, for example with img2dataset" in str(captions_of(open_source(f"{tmp_path}/t.csv")))


def test_empty_tables_and_repeated_columns_are_refused(tmp_path):
    write(tmp_path / "t.csv", "filepath,title\n\n")
    assert "holds no rows" in refused(open_source, str(tmp_path / "t.csv"))
    write(tmp_path / "t.csv", "filepath,title,title\n0.jpg,a,b\n")
    assert "has the column 'title' twice: rename one" in refused(open_source, str(tmp_path / "t.csv"))
    write(tmp_path / "t.csv", "")
    assert "t.csv' is empty: write a header" in refused(open_source, str(tmp_path / "t.csv"))


def test_json_lines_are_a_table(tmp_path):
    lines = ['{"image": "a.png", "caption": "one"}', "", '{"image": "b.png", "caption": ["two", "three"]}', "[1]", "{"]
    lines += ["7", '{"image": "c.png", "caption": {"en": "a"}}', '{"image": "d.png", "caption": 5}', '{"caption": "a"}']
    write(tmp_path / "t.jsonl", "\n".join(lines))
    found = captions_of(open_source(str(tmp_path / "t.jsonl")))
    assert found["a.png"] == ["one"] and found["b.png"] == ["two", "three"]
    assert {key: value for key, value in found.items() if isinstance(value, str)}.keys() == {
        "line 4", "line 5", "line 6", "line 7", "line 8", "line 9",
    }  # fmt: skip
    assert "'caption' is a struct of en: name one with --columns, as caption.en" in found["line 7"]
    assert captions_of(open_source(f"{tmp_path}/t.jsonl", columns=("image", "caption.en")))["c.png"] == ["a"]


@pytest.mark.parametrize("name", ["data.json", "data.zip", "data.h5", "noending"])
def test_a_file_of_an_unknown_kind_is_named_as_such(tmp_path, name):
    write(tmp_path / name, "{}")
    path = str(tmp_path / name)
    assert "is a file of an unknown kind: expected shards (.tar, .tgz), a table" in refused(open_source, path)
    assert "is a file of an unknown kind" in refused(open_labelled, path, "train")


# ---- captions that are no text -----------------------------------------------------------------------------------

VALUES = {
    "struct": ({"en": "a car", "de": "b"}, "'caption' is a struct of en, de: name one with --columns, as caption.en"),
    "number": (5, "'caption' has a number where a text is expected"),
    "list with a number": (["a car", 5], "'caption' has a number where a text is expected"),
    "list of structs": ([{"raw": "a car", "imgid": 3}], "'caption' is a struct of raw, imgid"),
    "truth value": (True, "'caption' has a truth value where a text is expected"),
    "nothing": (None, "no caption"),
    "empty list": ([], "no caption"),
    "blank": ("  \n", "no caption"),
    "half a character": ("car \ud800", "a caption with half a surrogate pair"),
}


@pytest.mark.parametrize("door", ["shard", "folder", "jsonl"])
@pytest.mark.parametrize("kind", VALUES)
def test_a_caption_that_is_no_text_is_a_broken_pair(tmp_path, door, kind):
    value, reason = VALUES[kind]
    record = json.dumps({"caption": value})
    if door == "shard":
        write_shard(tmp_path / "a.tar", [("k", {"png": RED, "json": record.encode()})])
        source = open_source(str(tmp_path / "a.tar"))
    elif door == "folder":
        write(tmp_path / "k.png", RED)
        write(tmp_path / "k.json", record)
        source = open_source(str(tmp_path))
    else:
        write(tmp_path / "t.jsonl", json.dumps({"image": "k.png", "caption": value}))
        source = open_source(str(tmp_path / "t.jsonl"))
    (found,) = captions_of(source).values()
    assert isinstance(found, str) and reason in found


@pytest.mark.parametrize("record", [b"[1, 2]", b"7", b'"a"', b"{", b"\xff", b"[" * 100_000])
def test_json_that_is_no_object_is_a_broken_pair(tmp_path, record):
    write_shard(tmp_path / "a.tar", [("k", {"png": RED, "json": record}), sample(1)])
    found = captions_of(open_source(str(tmp_path / "a.tar")))
    assert "json" in found["k"].lower() and found["k1"] == ["a red square"]


# ---- parquet -----------------------------------------------------------------------------------------------------


def write_table(path: Path, columns: dict, row_group_size: int = 2) -> str:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return str(path)


IMAGE = [{"bytes": RED, "path": None}]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"image": IMAGE, "caption": [5]}, "'caption' is int64, not text: name another with --columns"),
        ({"image": IMAGE, "caption": [{"en": "a", "de": "b"}]}, "is a struct of en, de: name one with --columns"),
        ({"image": IMAGE, "caption": [[{"raw": "a", "imgid": 3}]]}, "'caption' is a struct of raw, imgid"),
        ({"image": IMAGE, "caption": [[1, 2]]}, "'caption' is int64, not text"),
        ({"image": [7], "caption": ["a"]}, "column 'image' is int64, no encoded image"),
        ({"image": [{"url": "x"}], "caption": ["a"]}, "column 'image' is struct<url: string>, no encoded image"),
        ({"url": ["http://x/y.jpg"], "caption": ["a"]}, "has no column 'image', only url, caption"),
    ],
)
def test_columns_of_another_type_are_refused(tmp_path, columns, message):
    assert message in refused(open_source, write_table(tmp_path / "t.parquet", columns))


def test_fields_of_structs_and_categories_are_captions(tmp_path):
    sentences = [[{"raw": "one", "imgid": 1}, {"raw": "two", "imgid": 1}]]
    categories = pyarrow.array(["a category"]).dictionary_encode()
    name = write_table(tmp_path / "t.parquet", {"image": IMAGE, "sentences": sentences, "c": categories})
    for caption, expected in (("sentences.raw", ["one", "two"]), ("c", ["a category"])):
        assert list(captions_of(open_source(name, columns=("image", caption))).values()) == [expected]
    assert "'sentences' has no field 'nosuch', only raw, imgid" in refused(
        open_source, name, columns=("image", "sentences.nosuch")
    )


def test_parquet_files_of_different_columns_are_refused(tmp_path):
    write_table(tmp_path / "0.parquet", {"image": IMAGE, "caption": ["a"]})
    write_table(tmp_path / "1.parquet", {"image": IMAGE, "text": ["a"]})
    message = refused(open_source, str(tmp_path))
    assert "column 'caption' differs between parquet files" in message and "1.parquet' lacks it" in message
    write_table(tmp_path / "1.parquet", {"image": IMAGE, "caption": [5]})
    assert "0.parquet' has it as string, '" in refused(open_source, str(tmp_path))


@pytest.mark.parametrize("damage", [lambda body: body[:-20], lambda body: b"", lambda body: b"PAR1" + bytes(20)])
def test_damaged_parquet_is_one_line(tmp_path, damage):
    path = Path(write_table(tmp_path / "train.parquet", {"image": IMAGE, "caption": ["a"], "label": [0]}))
    path.write_bytes(damage(path.read_bytes()))
    for call in (lambda: open_source(str(path)), lambda: open_labelled(str(tmp_path), "train")):
        assert "the parquet file" in (message := refused(call)) and "train.parquet' cannot be read" in message


def test_a_missing_image_in_a_table_is_a_broken_pair(tmp_path):
    images = [{"bytes": None, "path": None}, {"bytes": None, "path": "a.png"}, None]
    write(tmp_path / "a.png", RED)
    name = write_table(tmp_path / "t.parquet", {"image": images, "caption": ["a", "b", "c"]})
    first, second, third = all_pairs(open_source(name))
    assert decode(second.image).getpixel((0, 0)) == (255, 0, 0)  # its path starts at the table
    for pair in (first, third):
        with pytest.raises(BrokenSample, match="no image"):
            decode(pair.image)


@pytest.mark.parametrize("parts", [1, 3])
def test_parquet_is_read_in_place_in_equal_parts(tmp_path, parts, monkeypatch):
    def no_copy(*args, **kwargs):
        raise AssertionError("a local table was copied")

    monkeypatch.setattr(datasets, "load_dataset", no_copy)
    for file, rows in enumerate([7, 4]):
        table = {"image": IMAGE * rows, "caption": [f"{file} {row}" for row in range(rows)], "label": list(range(rows))}
        write_table(tmp_path / f"train-{file}.parquet", table)
    source = open_source(str(tmp_path))
    shares = [[pair.captions[0] for pair in source.epoch(0, 0, part, parts)] for part in range(parts)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sorted(sum(shares, [])) == [f"0 {row}" for row in range(7)] + [f"1 {row}" for row in range(4)]
    again = [pair.captions[0] for part in range(parts) for pair in source.epoch(0, 1, part, parts)]
    assert sorted(again) == sorted(sum(shares, [])) and again != sum(shares, [])
    data = open_labelled(str(tmp_path), "train")
    assert data.labels.tolist() == [*range(7), *range(4)] and data.read(10).size == (8, 8)


# ---- texts and downloads -----------------------------------------------------------------------------------------


TEXT_DOORS: dict[str, Callable[[Path], object]] = {
    "names.txt of a collection": lambda file: expand([str(file)]),
    "prompts.txt": lambda file: read_prompts(str(file), classnames=("a", "b")),
    "prompts.json": lambda file: read_prompts(str(file), classnames=("a", "b")),
    "flickr8k_test_karpathy.txt": lambda file: captioned_files("flickr8k", file, "test"),
    "classnames.txt": lambda file: load_benchmark_set(str(file.parent)),
    "labelled.txt": lambda file: read_labelled(str(file), open_labelled(str(file.parent), "train")),
    "t.csv": lambda file: open_source(str(file)),
    "sizes.json": lambda file: open_source(str(file.parent / "0.tar")),
}


@pytest.mark.parametrize("door", TEXT_DOORS)
def test_a_text_that_is_not_utf8_is_refused_with_its_line(tmp_path, door):
    benchmark_shard(tmp_path, [sample(0)])
    write_shard(tmp_path / "0.tar", [sample(0)])
    write(tmp_path / "train" / "ant" / "a.png", RED)
    if door == "labelled.txt":
        (tmp_path / "test" / "0.tar").unlink()
    file = write(tmp_path / door.split()[0], "café\n".encode("latin-1"))
    message = refused(TEXT_DOORS[door], file)
    assert f"{file.name}' line 1 is not UTF-8 (byte 0xe9)" in message and "iconv" in message


def test_a_byte_order_mark_is_no_part_of_the_first_class(tmp_path):
    benchmark_shard(tmp_path, [sample(0)])
    write(tmp_path / "classnames.txt", "\ufeffa\nb\n\n")
    assert load_benchmark_set(str(tmp_path)).classnames == ["a", "b"]
    write(tmp_path / "classnames.txt", "a\n\nb\n")  # is b label 1 or 2?
    assert "classnames.txt' line 2 is empty: remove it" in refused(load_benchmark_set, str(tmp_path))


def test_a_full_disk_under_a_download_is_named_as_such(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    monkeypatch.setattr(datasets, "load_dataset", full)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    monkeypatch.setattr(weights, "snapshot_download", full)
    monkeypatch.setattr(timm, "create_model", full)
    for call in (
        lambda: open_source("org/name"),
        lambda: open_labelled("org/name", "train"),
        lambda: load_benchmark_set("wds/cars"),
        lambda: load_clip("hf-hub:org/name"),
        lambda: load_classifier("timm:resnet18.a1_in1k", num_classes=1000, weights="pretrained"),
    ):
        message = refused(call)
        assert "no space left on the disk of the download cache" in message and "set HF_HOME" in message


# ---- further members of these kinds ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["{}", "{}/*/*.parquet"])
def test_paths_in_parquet_start_at_their_own_file(tmp_path, name):
    for folder, image in (("a", RED), ("b", GREEN)):
        write(tmp_path / folder / "0.png", image)
        write_table(tmp_path / folder / f"{folder}x.parquet", {"image": ["0.png"], "caption": [folder]})
    colours = {
        pair.captions[0]: decode(pair.image).getpixel((0, 0)) for pair in all_pairs(open_source(name.format(tmp_path)))
    }
    assert colours == {"a": (255, 0, 0), "b": (0, 255, 0)}


def test_class_names_that_differ_between_parquet_files_are_refused(tmp_path):
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        table = datasets.Dataset.from_dict({"image": IMAGE, "label": [0]}, features=features)
        table.to_parquet(tmp_path / f"test-0000{number}-of-00002.parquet")
    assert "00000-of-00002.parquet' and '" in (message := refused(open_labelled, str(tmp_path), "test"))
    assert "class names of" in message and "differ" in message


@pytest.mark.parametrize("splits", [("Train", "Test"), ("train2017", "val2017"), ("train", "unlabeled")])
def test_splits_are_known_without_case_and_numbers(tmp_path, splits, capsys):
    for split, image in zip(splits, (RED, GREEN), strict=True):
        write(tmp_path / split / "a.png", image)
        write(tmp_path / split / "a.txt", split)
    for name in (str(tmp_path), f"{tmp_path}:train", f"{tmp_path}:{splits[0]}"):
        assert list(captions_of(open_source(name)).values()) == [[splits[0]]]
    assert f"{splits[0]} is read, not {splits[1]}" in capsys.readouterr().err


def test_shards_named_by_split_are_read_by_split(tmp_path):
    for name in ("train-000", "train-001", "val-000"):
        write_shard(tmp_path / f"{name}.tar", [(name, {"png": RED, "txt": b"x"})])
    assert list(captions_of(open_source(str(tmp_path)))) == ["train-000", "train-001"]
    assert list(captions_of(open_source(f"{tmp_path}:val"))) == ["val-000"]


def test_a_table_beside_train_is_not_trained_on_silently(tmp_path):
    for name in ("train", "holdout"):
        write_table(tmp_path / f"{name}.parquet", {"image": IMAGE, "caption": [name]})
    assert "has holdout, train, and which of these to train on is not clear" in refused(open_source, str(tmp_path))
    assert list(captions_of(open_source(f"{tmp_path}:train")).values()) == [["train"]]


def test_a_size_of_zero_is_checked(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", [sample(number)])
    write(tmp_path / "sizes.json", '{"0.tar": 0, "1.tar": 1}')
    assert "sizes.json' has 0 for 0.tar, which holds pairs" in refused(open_source, str(tmp_path))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_in_a_shard_is_no_silent_loss(tmp_path, read, kind):
    shard = benchmark_shard(tmp_path, [])
    with tarfile.open(shard, "w") as tar:
        for name, content in (("a.png", RED), ("a.cls", b"0"), ("a.txt", b"x"), ("b.cls", b"1"), ("b.txt", b"y")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = kind, "a.png"
        tar.addfile(link)
    if read is read_training:
        found = captions_of(open_source(str(shard)))
        assert found["a"] == ["x"] and "--dereference" in found["b"]
    else:
        assert "'b'" in (message := refused(read, tmp_path)) and ".png is a link to another file" in message


@pytest.mark.parametrize("compressed", [False, True])
def test_joined_shards_are_refused_or_read(tmp_path, compressed):
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", [(name, {"png": RED, "txt": b"x"})])
    bodies = [(tmp_path / f"{name}.tar").read_bytes() for name in ("a", "b")]
    if compressed:
        write(tmp_path / "c.tgz", b"".join(map(gzip.compress, bodies)))
    else:
        write(tmp_path / "c.tar", b"".join(bodies))
    source = open_source(str(tmp_path / ("c.tgz" if compressed else "c.tar")))
    assert "data behind its end-of-archive mark" in refused(all_pairs, source)
    whole = bodies[0]  # pigz and bgzip write one file as several gzip members
    write(tmp_path / "d.tgz", gzip.compress(whole[:700]) + gzip.compress(whole[700:]))
    assert list(captions_of(open_source(str(tmp_path / "d.tgz")))) == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        'title,filepath\n"one,0.png\ntwo",1.png\nc,2.png\n',
        'filepath,title\nim/0,"one\nim/1,two"\nim/2,three\n',
        'filepath,title\n0.jfif,"one\n1.jfif,two"\n2.jfif,three\n',
    ],
)
def test_a_quote_that_closes_a_row_later_is_refused(tmp_path, text):
    write(tmp_path / "t.csv", text)
    assert "line 2 has a cell of several lines that look like rows" in refused(open_source, f"{tmp_path}/t.csv")
    assert len(captions_of(open_source(f"{tmp_path}/t.csv", quoted=True))) == 2


def test_line_ends_of_old_macs_and_spaces_before_quotes(tmp_path):
    write(tmp_path / "t.csv", 'filepath,title\r0.png, "a ""b"", c"\r1.png,d\r')
    assert captions_of(open_source(f"{tmp_path}/t.csv")) == {"0.png": ['a "b", c'], "1.png": ["d"]}


def test_utf16_and_unbalanced_braces_have_a_remedy(tmp_path):
    write(tmp_path / "t.tsv", "filepath\ttitle\n0.png\ta\n".encode("utf-16"))
    assert "is UTF-16: convert it with `iconv -f utf-16" in refused(open_source, f"{tmp_path}/t.tsv")
    assert "write a-{000..999}.tar" in refused(open_source, f"{tmp_path}/a-{{000..9.tar")


def test_a_member_name_that_is_no_text_is_a_key(tmp_path):
    write_shard(tmp_path / "a.tar", [("caf\udce9", {"png": RED, "txt": b"x"})])
    write(tmp_path / "t.jsonl", '{"image": "\\ud800.png", "caption": "x"}')
    for name, key in (("a.tar", "caf\\udce9"), ("t.jsonl", "\\ud800.png")):
        assert list(captions_of(open_source(str(tmp_path / name)))) == [key]


@pytest.mark.parametrize("label", ["99999999999999999999", "10000000000000"])
def test_a_label_that_is_an_id_is_refused(tmp_path, label):
    write(tmp_path / "0.png", RED)
    write(tmp_path / "list.txt", f"0.png {label}\n")
    assert f"has the label {label}: labels are the numbers of the classes" in refused(
        open_labelled, f"{tmp_path}/list.txt", "train"
    )
    benchmark_shard(tmp_path, [("k", {"png": RED, "cls": label.encode()})])
    assert f"has the label {label}" in refused(read_labels, tmp_path)


CAPTION_FILES = {
    "coco_test_karpathy.json": {"images": [{"id": 1, "file_name": "a.jpg"}]}
    | {"annotations": [{"image_id": 1, "caption": None}]},
    "dataset_flickr8k.json": {"images": [{"filename": "a.jpg", "split": "test", "sentences": [{"raw": 5}]}]},
    "add_att.json": {"0": {"filename": "a.jpg", "caption": "x", "negative_caption": None}},
}


@pytest.mark.parametrize("file", CAPTION_FILES)
def test_captions_of_a_published_set_that_are_no_text_are_refused(tmp_path, file):
    write(tmp_path / file, json.dumps(CAPTION_FILES[file]))
    write(tmp_path / "a.jpg", RED)
    write(tmp_path / "val2017" / "a.jpg", RED)
    name = "sugar_crepe/add_att" if file == "add_att.json" else str(tmp_path)
    message = refused(load_benchmark_set, name, root=str(tmp_path))
    assert f"{file}': image 'a.jpg' has" in message and "where a text is expected" in message
    if file == "add_att.json":
        write(tmp_path / file, json.dumps({"0": {"filename": "a.jpg", "caption": "x", "negative_caption": " "}}))
        assert "image 'a.jpg' has an empty caption" in refused(load_benchmark_set, name, root=str(tmp_path))


def test_a_caption_file_without_a_header_is_refused(tmp_path):
    write(tmp_path / "flickr8k_test_karpathy.txt", "a.jpg,one\nb.jpg,two\n")
    assert "line 1 is 'a.jpg,one': write a header" in refused(load_benchmark_set, "flickr8k", root=str(tmp_path))


def test_more_shards_than_counted_are_refused(tmp_path):
    benchmark_shard(tmp_path, [sample(0)])
    write_shard(tmp_path / "test" / "1.tar", [sample(1)])
    assert "nshards.txt counts 1 shards, but" in refused(load_benchmark_set, str(tmp_path))


def test_what_a_folder_holds_beside_its_classes_is_counted(tmp_path, capsys):
    write(tmp_path / "test" / "ant" / "a.png", RED)
    write(tmp_path / "test" / "loose.png", RED)
    assert len(open_labelled(str(tmp_path), "test")) == 1
    assert "images outside of its class folders, which are not read: 1, as loose.png" in capsys.readouterr().err
    for name in ("a.png", "b.heic", "c.jfif"):
        write(tmp_path / "pairs" / name, RED)
        write(tmp_path / "pairs" / f"{name[0]}.txt", "x")
    assert open_source(f"{tmp_path}/pairs").num_pairs == 1
    assert "are not read: 1 .heic, 1 .jfif" in capsys.readouterr().err


def test_a_caption_of_two_images_is_a_broken_pair(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        write(tmp_path / name, RED)
    for name in ("a.txt", "b.TXT"):
        write(tmp_path / name, "x")
    reason = "two images with one caption: keep one"
    assert captions_of(open_source(str(tmp_path))) == {"a.jpg": reason, "a.png": reason, "b.png": ["x"]}


def test_columns_that_a_shard_lacks_are_named_with_those_it_has(tmp_path):
    write_shard(tmp_path / "a.tar", [("k", {"png": RED, "txt": b"x"})])
    assert captions_of(open_source(f"{tmp_path}/a.tar", columns=("PNG", "TXT"))) == {"k": ["x"]}
    found = captions_of(open_source(f"{tmp_path}/a.tar", columns=("image", "caption")))
    assert found == {"k": "no .image member, its members are .png, .txt: name one with --columns"}


def test_a_key_that_occurs_twice_in_a_record_is_a_broken_pair(tmp_path):
    write(tmp_path / "t.jsonl", '{"image": "a.png", "caption": "x", "caption": "y"}')
    assert "the key 'caption' occurs twice" in captions_of(open_source(f"{tmp_path}/t.jsonl"))["line 1"]


def test_a_parquet_column_that_occurs_twice_is_refused(tmp_path):
    table = pyarrow.table([pyarrow.array([RED]), pyarrow.array(["x"]), pyarrow.array(["y"])], names=["image", "c", "c"])
    parquet.write_table(table, tmp_path / "t.parquet")
    assert "has the column 'c' twice" in refused(open_source, f"{tmp_path}/t.parquet", columns=("image", "c"))


# ---- images through every door -----------------------------------------------------------------------------------


def odd_image() -> bytes:
    """Stored lying: left half opaque blue, right half transparent black. Upright: blue on top, white below."""
    image = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


DOORS: dict[str, Callable[[Path], Image.Image]] = {
    "pairs of a shard": lambda root: decode(all_pairs(open_source(f"{root}/set/test/0.tar"))[0].image),
    "pairs of a folder": lambda root: decode(all_pairs(open_source(f"{root}/folder/test/a"))[0].image),
    "pairs of a table": lambda root: decode(all_pairs(open_source(f"{root}/test.parquet"))[0].image),
    "pairs of a list": lambda root: decode(all_pairs(open_source(f"{root}/t.csv"))[0].image),
    "images": lambda root: decode(all_pairs(open_images(f"{root}/folder/test"))[0].image),
    "labels of a shard": lambda root: open_labelled(f"{root}/set/test/0.tar", "test").read(0),
    "labels of folders": lambda root: open_labelled(f"{root}/folder", "test").read(0),
    "labels of a table": lambda root: open_labelled(str(root), "test").read(0),
    "labels of a list": lambda root: open_labelled(f"{root}/l.txt", "test").read(0),
    "images of a split": lambda root: open_image_set(f"{root}/folder", "test").read(0),
    "evaluation of shards": lambda root: next(load_benchmark_set(f"{root}/set").records("cls")).decode(),
    "evaluation of folders": lambda root: next(load_benchmark_set(f"{root}/folder").records("cls")).decode(),
    "evaluation of captions": lambda root: next(load_benchmark_set("flickr8k", root=str(root)).records("txt")).decode(),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_turns_images_upright_on_white(tmp_path, door):
    image = odd_image()
    benchmark_shard(tmp_path / "set", [("a", {"png": image, "cls": b"0", "txt": b"x"})])
    write(tmp_path / "folder" / "test" / "a" / "a.png", image)
    write(tmp_path / "folder" / "test" / "a" / "a.txt", "x")
    write(tmp_path / "t.csv", "filepath,title\nfolder/test/a/a.png,x\n")
    write(tmp_path / "l.txt", "folder/test/a/a.png 0\n")
    write(tmp_path / "flickr8k_test_karpathy.txt", "image,caption\na.jpg,x\n")
    write(tmp_path / "a.jpg", image)
    write_table(tmp_path / "test.parquet", {"image": [{"bytes": image, "path": None}], "caption": ["x"], "label": [0]})
    upright = DOORS[door](tmp_path)
    assert upright.size == (8, 16) and upright.mode == "RGB"
    assert upright.getpixel((4, 2)) == (0, 0, 255) and upright.getpixel((4, 13)) == (255, 255, 255)
