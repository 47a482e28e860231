"""The published files of a benchmark are read unchanged: every image with its label or all its captions."""

import hashlib
import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torchvision
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from small_sets import COLOURS, colour_of, colour_set, picture, write_picture

from gkl_vl.data.prompts import CIFAR_TEMPLATES
from gkl_vl.errors import UserError
from gkl_vl.evaluation.set_collections import COLLECTIONS
from gkl_vl.evaluation.sets import BenchmarkSet, load_benchmark_set, load_benchmark_sets
from gkl_vl.evaluation.sources import IMAGENET, SUGAR_CREPE, imagenet_classes

PROMPTS = [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]


def complaint(call) -> str:
    """The message of the UserError that `call` must raise: one line."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load(name: str, root: Path, split: str = "test") -> BenchmarkSet:
    return load_benchmark_set(name, root=str(root), split=split)


def named_labels(dataset: BenchmarkSet) -> list[tuple[str, int, str]]:
    """(colour of the image, label, its class name) of all samples."""
    assert dataset.classnames is not None
    return [(colour_of(image), label, dataset.classnames[label]) for image, label in dataset]


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


# ---- labelled images: the Hub, parquet, CIFAR's own files, image folders


def write_parquet(path: Path, colours: list[str], names: list[str], column: str = "image") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {
        column: [{"bytes": picture(colour), "path": None} for colour in colours],
        "label": [list(COLOURS).index(colour) for colour in colours],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def test_parquet_in_the_hubs_layout(tmp_path):
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ["blue", "red"], ["deep_red", "green", "blue"])
    dataset = load("mine", tmp_path)
    assert (dataset.kind, dataset.classnames) == ("classification", ["deep red", "green", "blue"])
    assert named_labels(dataset) == [("blue", 2, "blue"), ("red", 0, "deep red")]
    assert dataset.templates == PROMPTS
    record = next(dataset.records("cls"))
    assert record.read() == picture("blue") and "row 0" in record.where
    assert pickle.loads(pickle.dumps(record)).read() == picture("blue")
    assert next(dataset.records()).targets == {}
    assert "splits there: test" in complaint(lambda: load("mine", tmp_path, "train"))
    assert "has labels and no captions" in complaint(lambda: list(dataset.records("txt")))


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", ["green", "red"], ["red_one", "green_one", "blue_one"], column="img")
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), split="train")
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *, split: calls.append((name, split)) or table)
    dataset = load_benchmark_set("hf-hub:org/cifar10", root="elsewhere", split="validation")
    assert calls == [("org/cifar10", "validation")]
    assert named_labels(dataset) == [("green", 1, "green one"), ("red", 0, "red one")]
    assert dataset.templates == CIFAR_TEMPLATES  # by the last part of its name


def test_a_dataset_that_the_hub_has_not():
    assert "'org/none' (split 'test') is no file here" in complaint(lambda: load_benchmark_set("hf-hub:org/none"))


def cifar_files(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, labels: list[int], classes: list[str]) -> None:
    """CIFAR's own files of grey images; torchvision's checksums are replaced by theirs."""
    of, folder, key, meta = {
        "cifar10": (torchvision.datasets.CIFAR10, "cifar-10-batches-py", "labels", "label_names"),
        "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python", "fine_labels", "fine_label_names"),
    }[name]
    (root / folder).mkdir(parents=True)

    def write(file: str, content: dict) -> list[str]:
        body = pickle.dumps(content)
        (root / folder / file).write_bytes(body)
        return [file, hashlib.md5(body).hexdigest()]

    file, md5 = write("meta", {meta: classes})
    monkeypatch.setattr(of, "meta", {"filename": file, "key": meta, "md5": md5})
    data = np.stack([np.full(3072, 10 * label, dtype=np.uint8) for label in labels])
    monkeypatch.setattr(of, "train_list", [])
    monkeypatch.setattr(of, "test_list", [write("test", {"data": data, key: labels})])


def test_cifars_two_sets_lie_in_one_folder(tmp_path, monkeypatch):
    cifar_files(tmp_path, monkeypatch, "cifar10", [3, 1], ["airplane", "automobile", "bird", "cat"])
    cifar_files(tmp_path, monkeypatch, "cifar100", [0, 2], ["apple", "aquarium_fish", "baby"])
    ten, hundred = load_benchmark_sets(["cifar10", "cifar100"], root=str(tmp_path), split="test")
    assert ten.classnames == ["airplane", "automobile", "bird", "cat"] and ten.templates == CIFAR_TEMPLATES
    assert hundred.classnames == ["apple", "aquarium fish", "baby"] and hundred.templates == CIFAR_TEMPLATES
    for dataset, labels in ((ten, [3, 1]), (hundred, [0, 2])):
        assert [label for _, label in dataset] == labels
        assert [image.getpixel((31, 0)) for image, _ in dataset] == [(10 * label,) * 3 for label in labels]
    records = list(ten.records("cls"))
    assert records[0].read() == b"P6 32 32 255\n" + bytes([30] * 3072)
    assert len(pickle.dumps(records[0])) < 2 * 3072  # its own pixels alone
    (tmp_path / "cifar-10-batches-py").rename(tmp_path / "away")
    assert "cifar-10-batches-py' is not what torchvision" in complaint(lambda: load("cifar10", tmp_path))


def test_shards_in_one_folder_do_not_serve_two_names(tmp_path):
    root = str(colour_set(tmp_path / "set", ["red"]))
    assert "write {dataset}" in complaint(lambda: load_benchmark_sets(["cifar10", "cifar100"], root=root, split="test"))


def test_an_image_folder(tmp_path):
    for colour in ("red", "blue"):
        write_picture(tmp_path / "test" / f"dark_{colour}" / "1.PNG", colour)
    dataset = load_benchmark_set(str(tmp_path))
    assert named_labels(dataset) == [("blue", 0, "dark blue"), ("red", 1, "dark red")]
    assert "splits there: test" in complaint(lambda: load("x", tmp_path, "val"))


def test_a_folder_of_nothing_known(tmp_path):
    assert "holds none of shards (val/nshards.txt), an image folder" in complaint(lambda: load("x", tmp_path, "val"))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.tar").touch()
    assert "test/nshards.txt does not exist" in complaint(lambda: load("x", tmp_path))


# ---- ImageNet's family


def test_the_family_numbers_its_classes_as_clip_benchmark_does():
    """Numbers of classes, and of some the WordNet id and the name, which anyone can look up."""
    classes = {name: list(imagenet_classes(name).items()) for name in IMAGENET}
    assert {name: len(of) for name, of in classes.items()} == {
        "imagenet1k": 1000, "imagenetv2": 1000, "imagenet_sketch": 1000,
        "imagenet-a": 200, "imagenet-r": 200, "imagenet-o": 200,
    }  # fmt: skip
    assert [name for _, name in classes["imagenet1k"]] == list(IMAGENET_CLASSNAMES)
    assert classes["imagenet1k"][0] == ("n01440764", "tench") and classes["imagenet1k"][999] == (
        "n15075141",
        "toilet paper",
    )
    assert classes["imagenet-a"][0] == ("n01498041", "stingray") and classes["imagenet-a"][-1] == ("n12267677", "acorn")
    assert classes["imagenet-r"][0] == ("n01443537", "goldfish") and classes["imagenet-r"][-1] == ("n12267677", "acorn")
    assert classes["imagenet-o"][0] == ("n01443537", "goldfish")
    assert classes["imagenet-o"][1] == ("n01704323", "triceratops")
    assert classes["imagenet-o"][-1] == ("n13052670", "hen of the woods mushroom")
    # of the ids in CLIP_benchmark 1.6.2, sorted and joined by spaces
    assert {
        name: hashlib.md5(" ".join(i for i, _ in classes[name]).encode()).hexdigest()[:8] for name in IMAGENET[3:]
    } == {
        "imagenet-a": "a0758426",
        "imagenet-r": "89bea71d",
        "imagenet-o": "8f1dccc5",
    }


@pytest.mark.parametrize(
    ("name", "place", "labels"),
    [
        ("imagenet1k", "val", (1, 6, 988)),
        ("imagenet1k", "test", (1, 6, 988)),
        ("imagenet_sketch", "sketch", (1, 6, 988)),
        ("imagenet_sketch", ".", (1, 6, 988)),
        ("imagenet-r", ".", (0, 3, 199)),
        ("imagenet-r", "imagenet-r", (0, 3, 199)),
    ],
)
def test_class_folders_that_are_missing_shift_no_label(tmp_path, name, place, labels):
    for wordnet_id, colour in (("n12267677", "blue"), ("n01443537", "red"), ("n01498041", "green")):
        write_picture(tmp_path / place / wordnet_id / "ILSVRC2012_val_00000001.JPEG", colour)
    dataset = load(name, tmp_path)
    assert dataset.classnames == list(imagenet_classes(name).values()) and dataset.templates == PROMPTS
    first, second, third = labels
    assert named_labels(dataset) == [
        ("red", first, "goldfish"),
        ("green", second, "stingray"),
        ("blue", third, "acorn"),
    ]


def test_imagenet_a_and_o_have_their_own_200(tmp_path):
    write_picture(tmp_path / "n01531178" / "0.jpg", "red")
    assert named_labels(load("imagenet-a", tmp_path)) == [("red", 1, "goldfinch")]
    line = complaint(lambda: load("imagenet-o", tmp_path))
    assert "n01531178 is none of its 200 classes: remove it" in line
    write_picture(tmp_path / "imagenet-o" / "n01770081" / "0.jpg", "blue")
    assert named_labels(load("imagenet-o", tmp_path)) == [("blue", 2, "harvestman")]


@pytest.mark.parametrize("place", [".", "ImageNetV2-matched-frequency", "imagenetv2-matched-frequency-format-val"])
def test_imagenetv2_has_its_labels_as_folders(tmp_path, place):
    for label, colour in ((10, "red"), (9, "green"), (100, "blue")):
        write_picture(tmp_path / place / str(label) / "a.jpeg", colour)
    assert sorted(named_labels(load("imagenetv2", tmp_path))) == [
        ("blue", 100, "black swan"),
        ("green", 9, "ostrich"),
        ("red", 10, "brambling"),
    ]
    write_picture(tmp_path / place / "1000" / "a.jpeg", "red")
    assert "1000 is none of its 1000 classes" in complaint(lambda: load("imagenetv2", tmp_path))


def test_the_images_of_one_split_are_not_anothers(tmp_path):
    write_picture(tmp_path / "n01443537" / "0.jpg", "red")
    assert "no class folders (n01440764/, ...) in" in complaint(lambda: load("imagenet1k", tmp_path, "train"))
    write_picture(tmp_path / "train" / "n01440764" / "0.jpg", "blue")
    assert named_labels(load("imagenet1k", tmp_path, "train")) == [("blue", 0, "tench")]


def test_a_class_folder_without_images_is_named(tmp_path):
    write_picture(tmp_path / "val" / "n01443537" / "0.jpg", "red")
    (tmp_path / "val" / "n01440764").mkdir()
    assert "n01440764" in complaint(lambda: load("imagenet1k", tmp_path))


def test_wordnet_ids_are_no_class_names(tmp_path):
    """A prompt like "a photo of a n01443537" would give a number that looks like one."""
    write_picture(tmp_path / "some" / "test" / "n01443537" / "0.jpg", "red")
    assert "call it imagenet1k, imagenet-a, ..., and give its folder as --dataset_root" in complaint(
        lambda: load_benchmark_set(str(tmp_path / "some"))
    )
    names = str(write_json(tmp_path / "names.json", {str(tmp_path / "some"): ["fish"]}))
    assert load_benchmark_set(str(tmp_path / "some"), classname_file=names).classnames == ["fish"]
    (tmp_path / "some").rename(tmp_path / "imagenet-r")
    for name in (f"{tmp_path}/imagenet-r", f"{tmp_path}/imagenet-r/"):
        assert named_labels(load_benchmark_set(name)) == [("red", 0, "goldfish")]


def test_imagenet_in_parquet(tmp_path):
    write_parquet(tmp_path / "test-0.parquet", ["blue"], ["a", "b", "c"])
    assert named_labels(load("imagenet1k", tmp_path)) == [("blue", 2, "c")]


# ---- ObjectNet


def objectnet(root: Path, mappings: Path) -> None:
    folders = {"air_freshener": "Air freshener", "t_shirt": "T-shirt", "banana": "Banana", "alarm_clock": "Alarm clock"}
    write_json(mappings / "folder_to_objectnet_label.json", folders)
    shared = {"Alarm clock": "analog clock; digital clock", "Banana": "banana", "T-shirt": "jersey, T-shirt"}
    write_json(mappings / "objectnet_to_imagenet_1k.json", shared)
    for folder, colour in (("banana", "green"), ("air_freshener", "blue"), ("t_shirt", "red")):
        write_picture(root / "images" / folder / "a.png", colour)


@pytest.mark.parametrize(
    ("root", "mappings"), [("", ""), ("objectnet-1.0", "objectnet-1.0/mappings"), ("", "mappings")]
)
def test_objectnet_has_the_classes_it_shares_with_imagenet(tmp_path, root, mappings):
    objectnet(tmp_path / root, tmp_path / mappings)
    dataset = load("objectnet", tmp_path)
    assert dataset.classnames == ["alarm clock", "banana", "t-shirt"] and dataset.templates == PROMPTS
    assert named_labels(dataset) == [("green", 1, "banana"), ("red", 2, "t-shirt")]  # no alarm clock, and no freshener


def test_objectnet_without_its_files(tmp_path):
    objectnet(tmp_path, tmp_path / "mappings")
    (tmp_path / "mappings" / "objectnet_to_imagenet_1k.json").unlink()
    assert "objectnet_to_imagenet_1k.json' does not exist" in complaint(lambda: load("objectnet", tmp_path))
    objectnet(tmp_path, tmp_path / "mappings")
    (tmp_path / "images").rename(tmp_path / "pictures")
    assert "objectnet: no folder" in complaint(lambda: load("objectnet", tmp_path))


# ---- captions


def coco(root: Path, split: str = "test", folder: str = "val2014") -> Path:
    """Images by id, not by place; six captions of one image, and captions of the two mixed."""
    images = [{"id": 9, "file_name": "COCO_9.jpg"}, {"id": 2, "file_name": "COCO_2.jpg"}]
    captions = [(9, "a red one"), (2, " two\n"), (9, "another")] + [(2, f"caption {i}") for i in range(5)]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(captions)]
    write_picture(root / folder / "COCO_9.jpg", "red")
    write_picture(root / folder / "COCO_2.jpg", "blue")
    return write_json(root / f"coco_{split}_karpathy.json", {"images": images, "annotations": annotations})


def images_and_captions(dataset: BenchmarkSet) -> list[tuple[str, list[str]]]:
    assert (dataset.classnames, dataset.templates) == (None, None)
    return [(colour_of(image), captions) for image, captions in dataset]


@pytest.mark.parametrize(("split", "folder"), [("test", "val2014"), ("val", "val2014"), ("train", "train2014")])
def test_coco_gives_all_captions_of_an_image(tmp_path, split, folder):
    coco(tmp_path, split, folder)
    dataset = load("mscoco_captions", tmp_path, split)
    assert dataset.kind == "retrieval"
    assert images_and_captions(dataset) == [
        ("blue", ["two", *(f"caption {i}" for i in range(5))]),
        ("red", ["a red one", "another"]),
    ]
    assert images_and_captions(load_benchmark_set(str(tmp_path), split=split)) == images_and_captions(
        dataset
    )  # known by its files
    assert "is a set for eval/retrieval.py" in complaint(lambda: list(dataset.records("cls")))
    assert next(dataset.records()).targets == {}
    record = pickle.loads(pickle.dumps(next(dataset.records("txt"))))
    assert record.read() == (tmp_path / folder / "COCO_2.jpg").read_bytes() and len(pickle.dumps(record)) < 1000


def test_coco_as_torchvision_reads_it(tmp_path):
    """In the same order, because the order decides between tied scores."""
    pytest.importorskip("pycocotools")
    file = coco(tmp_path)
    theirs = torchvision.datasets.CocoCaptions(str(tmp_path / "val2014"), str(file))
    ours = images_and_captions(load("mscoco_captions", tmp_path))
    assert [(colour_of(image), [text.strip() for text in captions]) for image, captions in theirs] == ours


@pytest.mark.parametrize(
    ("name", "folder"), [("flickr30k", "."), ("flickr30k", "flickr30k-images"), ("flickr8k", "Images")]
)
def test_flickrs_text_files(tmp_path, name, folder):
    lines = ["image,caption", "10.jpg,A dog , with a tail .", "10.jpg,2 dogs,", "", '7.jpg,"quoted", he said: x.jpg,']
    (tmp_path / f"{name}_test_karpathy.txt").write_text("\n".join(lines) + "\n")
    write_picture(tmp_path / folder / "10.jpg", "green")
    write_picture(tmp_path / folder / "7.jpg", "red")
    assert images_and_captions(load(name, tmp_path)) == [
        ("green", ["A dog , with a tail .", "2 dogs,"]),
        ("red", ['"quoted", he said: x.jpg,']),
    ]


def karpathy(root: Path, name: str, *, filepath: str | None) -> None:
    images = []
    for split, colour, texts in (
        ("train", "red", ["not this"]),
        ("test", "blue", ["one", "two"]),
        ("test", "green", ["3"]),
    ):
        place = {} if filepath is None else {"filepath": filepath}
        sentences = [{"raw": text, "tokens": []} for text in texts]
        images.append({"split": split, "filename": f"{colour}.jpg", "sentences": sentences, "imgid": 0} | place)
        write_picture(root / (filepath or ".") / f"{colour}.jpg", colour)
    write_json(root / f"dataset_{name}.json", {"images": images, "dataset": name})


@pytest.mark.parametrize(
    ("name", "file", "filepath"),
    [("mscoco_captions", "coco", "val2014"), ("flickr30k", "flickr30k", None), ("flickr8k", "flickr8k", None)],
)
def test_karpathys_own_files_hold_all_splits(tmp_path, name, file, filepath):
    karpathy(tmp_path, file, filepath=filepath)
    assert images_and_captions(load(name, tmp_path)) == [("blue", ["one", "two"]), ("green", ["3"])]
    assert images_and_captions(load(name, tmp_path, "train")) == [("red", ["not this"])]
    assert "has no split 'val', splits there: test, train" in complaint(lambda: load(name, tmp_path, "val"))


def test_annotations_that_are_not_there_are_named(tmp_path):
    line = complaint(lambda: load("mscoco_captions", tmp_path))
    assert f"neither {tmp_path}/coco_test_karpathy.json nor {tmp_path}/dataset_coco.json exists" in line
    (tmp_path / "flickr8k_test_karpathy.txt").touch()
    assert "flickr30k_val_karpathy.txt" in complaint(lambda: load("flickr30k", tmp_path, "val"))
    assert "flickr8k_test_karpathy.txt names no images" in complaint(lambda: load("flickr8k", tmp_path))


def test_images_that_are_not_there_are_counted(tmp_path):
    coco(tmp_path)
    (tmp_path / "val2014" / "COCO_9.jpg").unlink()
    line = complaint(lambda: load("mscoco_captions", tmp_path))
    assert "1 of the 2 images of" in line and "'COCO_9.jpg'" in line and "val2014" in line
    (tmp_path / "val2014" / "COCO_2.jpg").unlink()
    line = complaint(lambda: load("mscoco_captions", tmp_path))
    assert "2 of the 2 images of" in line and "val2014" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "is not in COCO's format: expected images and annotations (KeyError: 'annotations')"),
        ({"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}, "is not in COCO's format: expected"),
        ({"images": [], "annotations": []}, "names no images"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}, "has no caption for 1 images"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": " "}]}, "no caption"),
        ([{"caption": "x"}], "holds a list where a dict is expected"),
    ],
)
def test_malformed_annotations_are_one_line(tmp_path, content, message):
    write_json(tmp_path / "coco_test_karpathy.json", content)
    line = complaint(lambda: load("mscoco_captions", tmp_path))
    assert message in line and "coco_test_karpathy.json" in line


def test_malformed_annotations_of_the_other_formats(tmp_path):
    write_json(tmp_path / "dataset_coco.json", {"images": [{"filename": "a.jpg"}]})
    assert "is not in Karpathy's format: expected" in complaint(lambda: load("mscoco_captions", tmp_path))
    (tmp_path / "flickr8k_test_karpathy.txt").write_text("image,caption\na.jpg,x\nb.png,y\n")
    assert "line 3 is 'b.png,y': expected IMAGE.jpg,CAPTION" in complaint(lambda: load("flickr8k", tmp_path))


# ---- SugarCrepe


def crepe(root: Path, task: str) -> None:
    rows = {
        "0": {"filename": "1.jpg", "caption": f"right {task}", "negative_caption": "wrong"},
        "7": {"filename": "2.jpg", "caption": "a dog", "negative_caption": "no dog"},
        "3": {"filename": "1.jpg", "caption": "again", "negative_caption": "not again"},
    }
    write_json(root / f"{task}.json", rows)
    write_picture(root / "val2017" / "1.jpg", "red")
    write_picture(root / "val2017" / "2.jpg", "blue")


@pytest.mark.parametrize("root", [".", "{dataset}", "{dataset}/.."])
def test_sugar_crepes_tasks_lie_in_one_folder(tmp_path, root):
    folder = tmp_path if root == "." else tmp_path / "sugar_crepe"
    crepe(folder, "add_att")
    crepe(folder, "swap_obj")
    if root == "{dataset}/..":
        (folder / "add_att").mkdir()
        (folder / "swap_obj").mkdir()
    names = ["sugar_crepe/add_att", "sugar_crepe/swap_obj"]
    first, second = load_benchmark_sets(names, root=f"{tmp_path}/{root}", split="test")
    assert (first.name, first.kind, second.kind) == ("sugar_crepe/add_att", "choice", "choice")
    assert images_and_captions(first) == [
        ("red", ["right add_att", "wrong"]),
        ("blue", ["a dog", "no dog"]),
        ("red", ["again", "not again"]),
    ]
    assert images_and_captions(second)[0] == ("red", ["right swap_obj", "wrong"])


def test_what_is_wrong_with_sugar_crepe_is_named(tmp_path):
    assert "give the folder of add_att.json" in complaint(lambda: load_benchmark_set("sugar_crepe/add_att"))
    assert "tasks are add_att, add_obj, replace_att," in complaint(lambda: load("sugar_crepe/add", tmp_path))
    assert "replace_rel.json' does not exist" in complaint(lambda: load("sugar_crepe/replace_rel", tmp_path))
    crepe(tmp_path, "add_att")
    (tmp_path / "val2017" / "2.jpg").unlink()
    assert "1 of the 3 images of" in complaint(lambda: load("sugar_crepe/add_att", tmp_path))
    write_json(tmp_path / "add_att.json", {"0": {"filename": "1.jpg", "caption": "x"}})
    assert "(KeyError: 'negative_caption')" in complaint(lambda: load("sugar_crepe/add_att", tmp_path))
    assert {entry.dataset for entry in COLLECTIONS["sugar_crepe"]} == {f"sugar_crepe/{task}" for task in SUGAR_CREPE}
