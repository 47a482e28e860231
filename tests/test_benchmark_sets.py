"""An evaluation set in CLIP_benchmark's layout is read completely and in order; a set that is missing, truncated or
inconsistent gives an error of one line that names the place."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from small_sets import COLOURS, colour_set, picture, write_set, write_shard

from gkl_vl.data.images import BrokenImage
from gkl_vl.data.prompts import CIFAR_TEMPLATES
from gkl_vl.errors import UserError
from gkl_vl.evaluation.sets import BUNDLED, TARGET_OF, load_benchmark_set, load_benchmark_sets


def folder_set(root: Path, name: str = "colours"):
    return load_benchmark_set(name, root=str(root))


def complaint(call) -> str:
    """The message of the UserError that `call` must raise: one line."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_samples_come_in_order_with_their_labels(tmp_path):
    order = ["red", "blue", "green", "green", "red"]
    dataset = folder_set(colour_set(tmp_path / "set", order, shards=2))
    assert (dataset.name, dataset.kind, len(dataset.samples.shards)) == ("colours", "classification", 2)
    assert dataset.classnames == ["red", "green", "blue"]
    assert dataset.templates == ["{c}", "something {c}"]
    for colour, (image, label) in zip(order, dataset, strict=True):
        assert image.mode == "RGB" and image.getpixel((3, 3)) == COLOURS[colour]
        assert dataset.classnames[label] == colour


def test_captions_of_a_classification_set_can_be_requested(tmp_path):
    dataset = folder_set(colour_set(tmp_path / "set", ["red", "blue"]))
    captions = [record.targets["txt"] for record in dataset.records("txt")]
    assert captions == [["something red", "a red square"], ["something blue", "a blue square"]]


def test_a_retrieval_set_yields_all_captions_of_an_image(tmp_path):
    samples = [("a", {"jpg": picture("red", ending="jpg"), "txt": b"one\n  two \n\nthree"})]
    dataset = folder_set(write_set(tmp_path / "set", [samples], dataset_type=["Retrieval "]))
    assert dataset.kind == "retrieval" and dataset.classnames is None
    assert [captions for _, captions in dataset] == [["one", "two", "three"]]


def npy(values, dtype: str = "float32") -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values, dtype=dtype))
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "bool"])
def test_a_multilabel_set_has_a_row_for_each_image(tmp_path, dtype):
    samples = [
        ("a", {"png": picture("red"), "npy": npy([1, 0, 1], dtype)}),
        ("b", {"png": picture("blue"), "npy": npy([0, 0, 0], dtype)}),
    ]
    files = {"dataset_type": ["multilabel"], "classnames": list(COLOURS), "zeroshot_classification_templates": ["{c}"]}
    dataset = folder_set(write_set(tmp_path / "set", [samples], **files))
    assert (dataset.kind, dataset.classnames, dataset.templates) == ("multilabel", list(COLOURS), ["{c}"])
    rows = [row for _, row in dataset]
    assert rows == [[1, 0, 1], [0, 0, 0]] and {type(number) for row in rows for number in row} == {int}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy([0, 1]), "has 2 numbers in its .npy member for 3 class names"),
        (npy([0, 1, 2]), "of shape [3] and type float32: expected 0s and 1s"),
        (npy([0, -1, 1]), "expected 0s and 1s"),
        (npy([0, float("nan"), 1]), "expected 0s and 1s"),
        (npy([[0, 1, 1]]), "of shape [1, 3]"),
        (npy(["0", "1", "1"], "U1"), "type <U1"),
        (npy([0, 1, 1])[:-1], "is not an array"),
        (b"0 1 1", "is not an array"),
        (b"", "is not an array"),
    ],
)
def test_a_row_that_is_not_one_number_by_class_is_refused(tmp_path, content, message):
    samples = [("a", {"png": picture("red"), "npy": content})]
    root = write_set(tmp_path / "set", [samples], dataset_type=["multilabel"], classnames=list(COLOURS))
    line = complaint(lambda: list(folder_set(root)))
    assert message in line and "sample 'a'" in line


def test_a_pickle_within_npy_is_not_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    file = io.BytesIO()
    np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    samples = [("a", {"png": picture("red"), "npy": file.getvalue()})]
    root = write_set(tmp_path / "set", [samples], dataset_type=["multilabel"], classnames=["x"])
    assert "is not an array" in complaint(lambda: list(folder_set(root)))
    assert not (tmp_path / "sprung").exists()


def test_every_kind_has_a_target():
    assert TARGET_OF == {"classification": "cls", "multilabel": "npy", "retrieval": "txt", "choice": "txt"}


def test_an_image_is_read_lazily(tmp_path):
    root = colour_set(tmp_path / "set", ["red", "blue"], shards=1)
    first, second = folder_set(root).records("cls")
    assert first.read() == picture("red") and first.read() == picture("red")
    sent = pickle.loads(pickle.dumps(second))
    assert sent.read() == picture("blue") and sent.targets == {"cls": 2} and len(pickle.dumps(second)) < 1000
    (root / "test" / "0.tar").unlink()
    line = complaint(first.decode)
    assert "0.tar' cannot be read" in line


def test_a_file_that_is_gone_is_not_a_broken_image(tmp_path):
    """Only an image that does not decode may be skipped and counted."""
    samples = [(key, {"png": content, "cls": b"0"}) for key, content in (("a", b"none"), ("b", picture("red")))]
    root = write_set(tmp_path / "set", [samples])
    broken, whole = folder_set(root).records("cls")
    with pytest.raises(BrokenImage, match="sample 'a' cannot be decoded"):
        broken.decode()
    shard = root / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:2600])
    with pytest.raises(UserError, match="0.tar' ends before byte") as caught:
        whole.decode()
    assert not isinstance(caught.value, BrokenImage)


@pytest.mark.parametrize("ending", ["webp", "png", "jpg", "jpeg"])
def test_all_image_endings_of_the_layout_are_read(tmp_path, ending):
    samples = [("a", {ending.upper(): picture("green", ending=ending), "cls": b" 0\n"})]
    (_, label), *_ = list(folder_set(write_set(tmp_path / "set", [samples], classnames=["x"])))
    assert label == 0


def test_images_in_other_modes_become_rgb(tmp_path):
    samples = []
    for mode in ("L", "RGBA", "P", "CMYK"):
        file = io.BytesIO()
        Image.new(mode, (4, 4)).save(file, "tiff" if mode == "CMYK" else "png")
        samples.append((mode, {"png": file.getvalue(), "cls": b"0"}))
    assert [image.mode for image, _ in folder_set(write_set(tmp_path / "set", [samples]))] == ["RGB"] * 4


def test_keys_hold_folders_but_no_dots_and_meta_files_are_no_samples(tmp_path):
    samples = [
        ("__meta__", {"json": b"{}"}),
        ("a/._1", {"png": b"what macOS leaves behind"}),
        ("a/1", {"seg.png": b"not the image", "png": picture("red"), "cls": b"0"}),
        ("b/1", {"png": picture("blue"), "cls": b"1"}),
    ]
    assert [label for _, label in folder_set(write_set(tmp_path / "set", [samples]))] == [0, 1]


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_sets_are_complete(name):
    dataset = load_benchmark_set(name)
    records = list(dataset.records("cls"))
    assert dataset.classnames and dataset.templates
    assert len(set(dataset.classnames)) == len(dataset.classnames)
    assert len(records) == sum(1 for _ in dataset.records("txt")) > 100
    assert records[0].decode().size == (64, 64)


def test_placeholders_of_the_root_are_filled_in(tmp_path):
    colour_set(tmp_path / "a" / "b" / "x", ["red"])
    colour_set(tmp_path / "a-b" / "x", ["blue"])
    (_, red), (_, blue) = (
        next(iter(load_benchmark_set("wds/a/b", root=f"{tmp_path}/{place}/x")))
        for place in ("{dataset}", "{dataset_cleaned}")
    )
    assert (red, blue) == (0, 2)


def test_other_braces_in_a_root_are_literal(tmp_path):
    colour_set(tmp_path / "{0}" / "colours", ["red"])
    assert len(list(folder_set(tmp_path / "{0}" / "{dataset}"))) == 1


def test_a_folder_is_a_name_too(tmp_path):
    assert len(list(load_benchmark_set(str(colour_set(tmp_path / "set", ["red", "red"]))))) == 2


def test_one_root_for_two_sets_needs_a_placeholder(tmp_path):
    root = str(colour_set(tmp_path / "set", ["red"]))
    assert "write {dataset}" in complaint(lambda: load_benchmark_sets(["a", "b"], root=root, split="test"))
    assert len(load_benchmark_sets(["a"], root=root, split="test")) == 1


@pytest.mark.parametrize(("name", "classes"), [("imagenet1k", 1000), ("wds/imagenetv2", 1000), ("imagenet-r", 200)])
def test_imagenet_has_open_clips_names_and_prompts(tmp_path, name, classes):
    root = write_set(tmp_path / "set", [[("a", {"png": picture("red"), "cls": b"7"})]])
    dataset = folder_set(root, name)
    # imagenet-r numbers 200 classes of its own: the names of all 1000 would give a wrong score.
    assert dataset.classnames is not None and len(dataset.classnames) == classes
    assert dataset.classnames[:2] == (["tench", "goldfish"] if classes == 1000 else ["goldfish", "great white shark"])
    assert (dataset.classnames == list(IMAGENET_CLASSNAMES)) == (classes == 1000)
    assert dataset.templates is not None and len(dataset.templates) == 80
    filled = [template.replace("{c}", "cat") for template in dataset.templates]
    assert filled == [template("cat") for template in OPENAI_IMAGENET_TEMPLATES]


def test_files_of_an_imagenet_folder_win_over_open_clips(tmp_path):
    root = write_set(tmp_path / "set", [[]], classnames=["x"], zeroshot_classification_templates=["{c}!"])
    dataset = folder_set(root, "imagenet1k")
    assert (dataset.classnames, dataset.templates) == (["x"], ["{c}!"])


def test_a_set_of_the_hub_is_downloaded_by_split(tmp_path, monkeypatch):
    arguments = {}

    def snapshot_download(repo, **settings):
        arguments.update(settings, repo=repo)
        return str(colour_set(tmp_path / "cache", ["green"]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert [label for _, label in load_benchmark_set("wds/vtab/pets")] == [1]
    assert arguments == {
        "repo": "clip-benchmark/wds_vtab-pets",
        "repo_type": "dataset",
        "revision": "main",
        "allow_patterns": ["*.txt", "test/*"],
    }
    shutil.rmtree(tmp_path / "cache")
    load_benchmark_set("cars", root="https://huggingface.co/datasets/me/{dataset}_wds/tree/v2")
    assert (arguments["repo"], arguments["revision"]) == ("me/cars_wds", "v2")


def test_a_set_in_the_hubs_cache_is_found_offline(tmp_path, monkeypatch):
    cache = tmp_path / "datasets--clip-benchmark--wds_colours"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    colour_set(cache / "snapshots" / ("0" * 40), ["blue"])
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **settings: download(repo, cache_dir=tmp_path, **settings),
    )
    assert [label for _, label in load_benchmark_set("colours")] == [2]


def test_an_unknown_set_offline_names_what_there_is():
    line = complaint(lambda: load_benchmark_set("wds/no_such_set"))
    assert "clip-benchmark/wds_no_such_set" in line and "HF_HUB_OFFLINE" in line and "emoji_unseen" in line


def test_an_unknown_set_gives_the_nearest_names():
    assert "similar names are imagenet_sketch, " in complaint(lambda: load_benchmark_set("imagenet-sketch"))
    assert "similar names are emoji_unseen" in complaint(lambda: load_benchmark_set("emoji_unsen"))
    assert "similar names" not in complaint(lambda: load_benchmark_set("xyzzy"))
    assert "similar names" not in complaint(lambda: load_benchmark_set("vtab/pets"))  # known, only not here


def test_an_unknown_set_online_says_that_the_hub_has_none(monkeypatch):
    class Response:
        headers, request, status_code = {}, None, 404

    def snapshot_download(repo, **settings):
        raise RepositoryNotFoundError("404 Client Error\nand more lines", response=Response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "the Hub has no clip-benchmark/wds_nope" in complaint(lambda: load_benchmark_set("nope"))


@pytest.mark.parametrize("url", ["https://huggingface.co/datasets/me/set", "https://example.org/{dataset}"])
def test_a_url_that_is_no_branch_of_a_hub_dataset_is_refused(url):
    assert "/tree/BRANCH" in complaint(lambda: load_benchmark_set("x", root=url))


def test_an_absent_folder_or_split_or_shard_is_named(tmp_path):
    assert "nowhere of --dataset_root does not exist" in complaint(lambda: folder_set(tmp_path / "nowhere"))
    root = colour_set(tmp_path / "set", ["red", "blue", "green"], shards=3)
    assert "splits there: test" in complaint(lambda: load_benchmark_set("x", root=str(root), split="val"))
    os.remove(root / "test" / "1.tar")
    line = complaint(lambda: folder_set(root))
    assert "1.tar is missing" in line and "counts 3" in line


def test_other_types_and_counts_are_refused(tmp_path):
    root = write_set(tmp_path / "set", [], dataset_type=["captioning"])
    assert "'captioning': classification, multilabel and retrieval" in complaint(lambda: folder_set(root))
    (root / "dataset_type.txt").unlink()
    assert "no samples in its 0 shards" in complaint(lambda: list(folder_set(root)))
    (root / "test" / "nshards.txt").write_text("two")
    assert "'two'" in complaint(lambda: folder_set(root))


def test_a_shard_cut_anywhere_is_an_error_and_never_a_smaller_set(tmp_path):
    root = colour_set(tmp_path / "set", ["red", "blue", "green"], shards=1)
    shard = root / "test" / "0.tar"
    whole = shard.read_bytes()
    end = len(whole.rstrip(b"\0"))
    # 512 is a boundary between blocks: there tarfile alone would see a sound, shorter archive.
    for cut in [*range(0, end, 512), *range(100, end, 512)]:
        shard.write_bytes(whole[:cut])
        assert "0.tar" in complaint(lambda: list(folder_set(root)))


def test_garbage_after_the_first_sample_is_an_error(tmp_path):
    root = colour_set(tmp_path / "set", ["red", "blue", "green"], shards=1)
    shard = root / "test" / "0.tar"
    content = bytearray(shard.read_bytes())
    middle = content.index(b"s0001.png")
    content[middle : middle + 512] = b"x" * 512
    shard.write_bytes(content)
    assert "ends early or is damaged" in complaint(lambda: list(folder_set(root)))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"cls": b"0"}, "has no image"),
        ({"png": b"no picture", "cls": b"0"}, "cannot be decoded"),
        ({"png": picture("red")[:45], "cls": b"0"}, "cannot be decoded"),
        ({"png": picture("red"), "cls": b"3"}, "label 3: 3 class names cover 0 to 2"),
        ({"png": picture("red"), "cls": b"-1"}, "label '-1'"),
        ({"png": picture("red"), "txt": b"red"}, "may be one for eval/retrieval.py"),
    ],
)
def test_a_bad_sample_is_an_error_that_names_it(tmp_path, members, message):
    samples = [("good", {"png": picture("red"), "cls": b"0"}), ("bad", members)]
    root = write_set(tmp_path / "set", [samples], classnames=list(COLOURS))
    line = complaint(lambda: list(folder_set(root)))
    assert message in line and "sample 'bad'" in line and "0.tar" in line


@pytest.mark.parametrize(
    ("members", "message"),
    [({"txt": b" \n"}, "empty caption"), ({"cls": b"0"}, "may be one for eval/zero_shot.py")],
)
def test_an_image_without_captions_is_an_error(tmp_path, members, message):
    root = write_set(tmp_path / "set", [[("bad", {"png": picture("red"), **members})]])
    assert message in complaint(lambda: list(folder_set(root).records("txt")))


def test_an_empty_shard_among_others_is_fine(tmp_path):
    root = colour_set(tmp_path / "set", ["red", "blue"], shards=2)
    write_shard(root / "test" / "0.tar", [])
    assert [label for _, label in folder_set(root)] == [2]


# ---- class names and prompts from files


def written(path: Path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


CUPL = {"red": ["a ripe tomato."], "green": ["grass."], "blue": ["the sky.", "the sea."]}


def test_files_of_names_and_prompts_win_over_the_sets_own(tmp_path):
    root = str(colour_set(tmp_path / "set", ["blue"]))
    names = written(tmp_path / "names.json", {"colours": ["rot", "gruen", "blau"], "other": ["x"]})
    prompts = written(tmp_path / "prompts.json", {"colours": ["ein {c}er Fleck"], "cupl": CUPL, "imagenet1k": ["{c}!"]})
    dataset = load_benchmark_set("wds/colours", root=root, classname_file=names, template_file=prompts)
    assert (dataset.classnames, dataset.templates) == (["rot", "gruen", "blau"], ["ein {c}er Fleck"])
    assert load_benchmark_set("cupl", root=root, template_file=prompts).templates == CUPL
    # CLIP_benchmark's fallback is for prompts alone
    assert load_benchmark_set("unnamed", root=root, template_file=prompts).templates == ["{c}!"]
    line = complaint(lambda: load_benchmark_set("unnamed", root=root, classname_file=names))
    assert "has no class names for 'unnamed': sets in it are colours, other" in line


@pytest.mark.parametrize(
    ("key", "matches"), [("wds/vtab/pets", 1), ("vtab/pets", 1), ("pets", 1), ("wds/pets", 0), ("VTAB/pets", 0)]
)
def test_a_set_goes_by_several_names_in_these_files(tmp_path, key, matches):
    root = str(colour_set(tmp_path / "set", ["blue"]))
    prompts = written(tmp_path / "prompts.json", {key: ["{c} of these"], "imagenet1k": ["{c} of others"]})
    dataset = load_benchmark_set("wds/vtab/pets", root=root, template_file=prompts)
    assert dataset.templates == (["{c} of these"] if matches else ["{c} of others"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": ["{c}"]}, "has no templates for 'colours' or imagenet1k: sets in it are other"),
        ({"colours": ["a photo"]}, "'colours': the template 'a photo' has no place for the class name: write {c}"),
        ({"colours": "{c}"}, "the templates of 'colours' must be a list of strings"),
        ({"colours": []}, "must be a list of strings"),
        ({"colours": {"red": "a tomato"}}, "must be a list of strings, or one for each class name"),
        (["{c}"], "holds a list where a dict is expected"),
    ],
)
def test_a_file_of_prompts_that_is_no_use_is_refused(tmp_path, content, message):
    root, file = str(colour_set(tmp_path / "set", ["blue"])), written(tmp_path / "prompts.json", content)
    assert message in complaint(lambda: load_benchmark_set("colours", root=root, template_file=file))


def test_a_file_of_class_names_that_is_no_use_is_refused(tmp_path):
    root, file = str(colour_set(tmp_path / "set", ["blue"])), tmp_path / "names.json"

    def refusal() -> str:
        return complaint(lambda: load_benchmark_set("colours", root=root, classname_file=str(file)))

    assert "names.json' does not exist" in refusal()
    file.write_bytes(b"\xff{")
    assert "names.json' line 1 is not UTF-8 (byte 0xff)" in refusal()
    file.write_text('{"colours": ["red"], "colours": ["blue"]}')
    assert "names.json' is no JSON (the key 'colours' occurs twice in one object)" in refusal()
    written(file, {"colours": ["red", "green"]})
    assert "has 2 class names for 'colours', which has 3 classes" in refusal()
    written(file, {"colours": [0, 1, 2]})
    assert "the class names of 'colours' must be a list of strings" in refusal()


def test_names_that_do_not_cover_the_labels_are_refused_where_the_shards_have_none(tmp_path):
    root = colour_set(tmp_path / "set", ["red", "blue"])
    (root / "classnames.txt").unlink()
    names = written(tmp_path / "names.json", {"colours": ["red", "green"]})
    dataset = load_benchmark_set("colours", root=str(root), classname_file=names)
    assert "label 2: 2 class names cover 0 to 1" in complaint(lambda: list(dataset.records("cls")))


def test_captions_need_neither_names_nor_prompts(tmp_path):
    samples = [("a", {"png": picture("red"), "txt": b"a caption"})]
    root = write_set(tmp_path / "set", [samples], dataset_type=["retrieval"])
    dataset = load_benchmark_set("x", root=str(root), classname_file="nowhere", template_file="nowhere")
    assert dataset.classnames is None and dataset.templates is None


def test_cifars_prompts_are_the_18_of_clip(tmp_path):
    root = write_set(tmp_path / "set", [[]], classnames=["x"])
    assert folder_set(root, "wds/vtab/cifar100").templates == CIFAR_TEMPLATES and len(set(CIFAR_TEMPLATES)) == 18
    assert CIFAR_TEMPLATES[:3] == ["a photo of a {c}.", "a blurry photo of a {c}.", "a black and white photo of a {c}."]
    assert CIFAR_TEMPLATES[7:10] == ["a photo of a small {c}.", "a photo of a big {c}.", "a photo of the {c}."]
    assert CIFAR_TEMPLATES[-1] == "a photo of the big {c}."
    assert folder_set(root, "others").templates is None  # shards come with theirs
