"""Every source of labelled images returns what was written to it, and raises one line for what is wrong with it."""

import gc
import hashlib
import io
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
import torchvision
from PIL import Image
from pyarrow import parquet
from small_sets import write_shard
from torch.utils.data import DataLoader, Dataset

from gkl_vl.data.files import IMAGE_SUFFIXES
from gkl_vl.data.images import BrokenImage, BrokenSample, EncodedImage, decode
from gkl_vl.data.labelled import LabelledSet, in_memory, open_image_set, open_labelled, pixel_image
from gkl_vl.data.pairs import open_images
from gkl_vl.data.subsets import balanced_subset, long_tailed, shot_groups
from gkl_vl.errors import UserError

LABELS = [1, 0, 2, 1, 0, 0]
NAMES = ("ant", "bee", "cat")


def pixels(index: int, side: int = 4) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)


def picture(index: int, *, ending: str = "png", side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(index, side)).save(file, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending))
    return file.getvalue()


def is_picture(image: Image.Image, index: int) -> bool:
    return image.mode == "RGB" and np.array_equal(np.asarray(image), pixels(index))


class Solid:
    """Images of one colour, which encodes their index."""

    def __call__(self, index: int) -> EncodedImage:
        colour = np.array([index % 256, index // 256, 0], dtype=np.uint8)
        return pixel_image(f"number {index}", np.broadcast_to(colour, (2, 2, 3)))


def toy(labels: list[int], num_classes: int) -> LabelledSet:
    return LabelledSet(
        name="toy", labels=torch.tensor(labels), num_classes=num_classes, classnames=None, images=Solid()
    )


def numbers(data: LabelledSet) -> list[int]:
    """The original indices of images of `Solid`."""
    colours = [data.read(index).getpixel((0, 0)) for index in range(len(data))]
    return [red + 256 * green for red, green, _ in colours]


# ---- writers: each writes the images 0, 1, ... of LABELS and returns the source to open


def write_parquet(
    path: Path, indices: range, *, image: str = "img", label: str = "label", labels=LABELS, names=NAMES
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    feature = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({image: datasets.Image(), label: feature})
    rows = {image: [{"bytes": picture(i), "path": None} for i in indices], label: [labels[i] for i in indices]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def parquet_folder(root: Path) -> str:
    write_parquet(root / "data" / "train-00000-of-00002.parquet", range(4))
    write_parquet(root / "data" / "train-00001-of-00002-0a1b2c.parquet", range(4, 6))
    write_parquet(root / "data" / "test-00000-of-00001.parquet", range(2))
    return str(root)


def image_folder(root: Path) -> str:
    for split in ("train", "val"):
        for index, label in enumerate(LABELS):
            path = root / split / NAMES[label] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(index))
    return str(root)


def shards(root: Path) -> str:
    samples = [(f"train/k{i:03d}", {"PNG": picture(i), "cls": f"{label}\n".encode()}) for i, label in enumerate(LABELS)]
    samples[0][1]["json"] = b"{}"
    samples[1] = (samples[1][0], dict(reversed(samples[1][1].items())))  # the label first
    write_shard(root / "set-0000.tar", samples[:4])
    write_shard(root / "set-0001.tar", samples[4:])
    return f"{root}/set-{{0000..0001}}.tar"


def list_file(root: Path) -> str:
    (root / "a folder").mkdir()
    for index in range(len(LABELS)):
        (root / "a folder" / f"{index}.png").write_bytes(picture(index))
    lines = [f"a folder/{index}.png {label}" for index, label in enumerate(LABELS)]
    (root / "list.txt").write_text("\n".join(lines) + "\n")
    return str(root / "list.txt")


def cifar_files(root: Path, monkeypatch: pytest.MonkeyPatch, folder: str, key: str) -> str:
    """CIFAR's own layout with six images, with their checksums patched into torchvision, which compares them."""
    (root / folder).mkdir()
    of = torchvision.datasets.CIFAR10 if key == "labels" else torchvision.datasets.CIFAR100
    data = np.stack([pixels(i, 32).transpose(2, 0, 1).reshape(-1) for i in range(6)])

    def write(name: str, content: dict) -> list[str]:
        body = pickle.dumps(content)
        (root / folder / name).write_bytes(body)
        return [name, hashlib.md5(body).hexdigest()]

    names = write("names", {"names": list(NAMES)})
    monkeypatch.setattr(of, "meta", {"filename": names[0], "key": "names", "md5": names[1]})
    monkeypatch.setattr(of, "train_list", [write("first", {"data": data, key: LABELS})])
    monkeypatch.setattr(of, "test_list", [write("second", {"data": data[:2], key: LABELS[:2]})])
    return str(root)


def stl10_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """STL-10's own layout, six images in each split; its labels count from 1, its pixels go column by column."""
    folder = root / "stl10_binary"
    folder.mkdir()
    data = np.stack([pixels(i, 96).transpose(2, 1, 0) for i in range(6)])
    for split in ("train", "test", "unlabeled"):
        (folder / f"{split}_X.bin").write_bytes(data.tobytes())
        if split != "unlabeled":
            (folder / f"{split}_y.bin").write_bytes((np.array(LABELS, dtype=np.uint8) + 1).tobytes())
    (folder / "class_names.txt").write_text("\n".join(NAMES) + "\n")
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    return str(root)


SOURCES = {"parquet": parquet_folder, "shards": shards, "list": list_file}


# ---- sources


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_returns_what_was_written(tmp_path, kind):
    data = open_labelled(SOURCES[kind](tmp_path), "train")
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == LABELS
    assert len(data) == 6 and data.num_classes == 3 and data.counts().tolist() == [3, 2, 1]
    assert data.classnames == (NAMES if kind == "parquet" else None)
    assert all(is_picture(data.read(index), index) for index in reversed(range(6)))


@pytest.mark.parametrize("split", ["train", "val", "validation"])
def test_an_image_folder_has_its_classes_in_order_of_their_names(tmp_path, split):
    data = open_labelled(image_folder(tmp_path), split)
    assert data.classnames == NAMES and data.num_classes == 3
    assert data.labels.tolist() == sorted(LABELS)
    order = sorted(range(6), key=lambda index: (LABELS[index], index))
    assert all(is_picture(data.read(place), index) for place, index in enumerate(order))


@pytest.mark.parametrize(
    "folder, key", [("cifar-10-batches-py", "labels"), ("cifar-100-python", "fine_labels")], ids=["10", "100"]
)
def test_cifars_own_files(tmp_path, monkeypatch, folder, key):
    source = cifar_files(tmp_path, monkeypatch, folder, key)
    train, test = open_labelled(source, "train"), open_labelled(source, "test")
    assert train.labels.tolist() == LABELS and test.labels.tolist() == LABELS[:2]
    assert train.classnames == NAMES
    assert all(np.array_equal(np.asarray(train.read(index)), pixels(index, 32)) for index in range(6))
    with pytest.raises(UserError, match="has no split 'validation', splits there: test, train"):
        open_labelled(source, "validation")
    (tmp_path / folder / "second").write_bytes(b"cut")
    with pytest.raises(UserError, match=f"{folder}' is not what torchvision downloads .*: fetch it again"):
        open_labelled(source, "test")


class Whole(Dataset):
    def __init__(self, data: LabelledSet):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.data.read(index)).copy())


@pytest.mark.parametrize("kind", [*SOURCES, "folder", "cifar"])
def test_a_reader_goes_to_worker_processes(tmp_path, monkeypatch, kind):
    if kind == "cifar":
        source = cifar_files(tmp_path, monkeypatch, "cifar-10-batches-py", "labels")
    else:
        source = (SOURCES | {"folder": image_folder})[kind](tmp_path)
    data = open_labelled(source, "train").subset(torch.tensor([4, 1]))
    sent = replace(data, images=pickle.loads(pickle.dumps(data.images)))  # as to a worker that is not forked
    batches = list(DataLoader(Whole(sent), batch_size=2, num_workers=1))
    assert torch.equal(batches[0], torch.stack([Whole(data)[0], Whole(data)[1]]))


def test_splits_of_parquet(tmp_path):
    source = parquet_folder(tmp_path)
    assert open_labelled(source, "test").labels.tolist() == LABELS[:2]
    write_parquet(tmp_path / "data" / "validation.parquet", range(3))
    assert len(open_labelled(source, "validation")) == 3
    with pytest.raises(UserError, match="has no split 'val', splits there: test, train, validation"):
        open_labelled(source, "val")
    write_parquet(tmp_path / "other" / "train-0.parquet", range(3))
    with pytest.raises(UserError, match=r"parquet of 'train' in .*data and .*other: name one"):
        open_labelled(source, "train")
    assert len(open_labelled(str(tmp_path / "other"), "train")) == 3


@pytest.mark.parametrize("image, label", [("image", "label"), ("img", "fine_label"), ("image", "labels")])
def test_the_usual_columns_are_read(tmp_path, image, label):
    write_parquet(tmp_path / "train-0.parquet", range(6), image=image, label=label, names=None)
    data = open_labelled(str(tmp_path), "train")
    assert data.labels.tolist() == LABELS and data.num_classes == 3 and data.classnames is None
    assert is_picture(data.read(5), 5)


def test_other_columns_are_named(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", range(6), image="photo", label="kind")
    with pytest.raises(UserError, match="has no column 'image', only photo, kind: name them with --columns"):
        open_labelled(str(tmp_path), "train")
    data = open_labelled(str(tmp_path), "train", columns=("photo", "kind"))
    assert data.classnames == NAMES and is_picture(data.read(0), 0)
    with pytest.raises(UserError, match="column 'kind' is int64, no encoded image .*: name another with --columns"):
        open_labelled(str(tmp_path), "train", columns=("kind", "photo"))
    write_parquet(tmp_path / "test-0.parquet", range(3), labels=[0, None, 1], names=None)
    with pytest.raises(UserError, match="column 'label' is not all integers"):
        open_labelled(str(tmp_path), "test")


def test_class_names_count_the_classes(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", range(6), names=[*NAMES, "dog"])
    assert open_labelled(str(tmp_path), "train").num_classes == 4


def test_a_label_without_a_class_is_refused(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    rows = {"img": [{"bytes": picture(0), "path": None}], "label": [3]}  # datasets itself would not write it
    parquet.write_table(pyarrow.table(rows, schema=features.arrow_schema), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match="train has the label 3, its 3 classes end at 2"):
        open_labelled(str(tmp_path), "train")


def test_a_test_split_without_labels_is_refused(tmp_path):
    write_parquet(tmp_path / "test-0.parquet", range(2), labels=[-1, -1])
    with pytest.raises(
        UserError, match=r"test has the label -1, which means unlabelled: .* use the split 'validation'"
    ):
        open_labelled(str(tmp_path), "test")


def test_damaged_parquet_is_one_line(tmp_path):
    source = parquet_folder(tmp_path)
    path = tmp_path / "data" / "train-00000-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        UserError, match="the parquet file '.*data/train-00000-of-00002.parquet' cannot be read .*: fetch it again"
    ) as caught:
        open_labelled(source, "train")
    assert "\n" not in str(caught.value)


def test_a_source_that_is_not_local_is_loaded_from_the_hub(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'org/no-such-set' .split 'train'. is no file here and could not") as caught:
        open_labelled("org/no-such-set", "train")
    assert "\n" not in str(caught.value)
    write_parquet(tmp_path / "train-0.parquet", range(6))
    whole = datasets.load_dataset("parquet", data_files=str(tmp_path / "train-0.parquet"))

    def hub(name: str, *, split: str):
        assert name == "uoft-cs/cifar10"
        if split not in whole:
            raise ValueError(f"Unknown split {split!r}. Should be one of {list(whole)}.")
        return whole[split]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    data = open_labelled("uoft-cs/cifar10", "train")
    assert data.name == "uoft-cs/cifar10:train" and data.classnames == NAMES and is_picture(data.read(3), 3)
    with pytest.raises(UserError, match=r"Unknown split 'dev'. Should be one of \['train'\]"):
        open_labelled("uoft-cs/cifar10", "dev")


def test_a_missing_split_or_class_and_a_remote_source_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no split 'train', splits there: none"):
        open_labelled(str(tmp_path), "train")
    source = image_folder(tmp_path)
    with pytest.raises(UserError, match="has no split 'test', splits there: train, val"):
        open_labelled(source, "test")
    for index in range(12):
        (tmp_path / "val" / f"n{index:02d}").mkdir()
    with pytest.raises(UserError, match=r"splits there: ant, bee, cat, n00, n01, n02, n03, n04, n05, n06, \.\.\.$"):
        open_labelled(f"{source}/val", "train")
    message = f"class folder '.*val/n00' holds no image .{', '.join(IMAGE_SUFFIXES)}., it has nothing"
    with pytest.raises(UserError, match=message) as caught:
        open_labelled(source, "validation")
    assert "\n" not in str(caught.value)
    for remote in ("https://host.org/a-{0..9}.tar", "pipe:cat a.tar", "hf://datasets/org/a.tar"):
        with pytest.raises(UserError, match="is remote: .* download it first"):
            open_labelled(remote, "train")


# ---- shards


def test_shards_are_given_by_glob_and_in_several_places(tmp_path):
    shards(tmp_path)
    assert open_labelled(f"{tmp_path}/set-*.tar", "any").labels.tolist() == LABELS
    assert open_labelled(f"{tmp_path}/set-0001.tar::{tmp_path}/set-0000.tar", "").labels.tolist() == [0, 0, 1, 0, 2, 1]
    with pytest.raises(UserError, match=r"shard '.*set-0002.tar' does not exist \(2 of 4 are missing\)"):
        open_labelled(f"{tmp_path}/set-{{0000..0003}}.tar", "train")
    with pytest.raises(UserError, match=r"shard '.*none-\*.tar' does not exist"):
        open_labelled(f"{tmp_path}/none-*.tar", "train")


@pytest.mark.parametrize(
    "sample, reason",
    [
        ({"png": b""}, r"sample 'k' has no \.cls member"),
        ({"cls": b"1"}, "sample 'k' has no image"),
        ({"png": b"", "cls": b"-1"}, "sample 'k' has the label '-1': expected an integer from 0"),
        ({"png": b"", "jpg": b"", "cls": b"1"}, "sample 'k' has two images, .png and .jpg: keep one"),
        ({"txt": b"a caption"}, "sample 'k' has no image, its members are .txt"),
    ],
)
def test_a_malformed_sample_is_named(tmp_path, sample, reason):
    write_shard(tmp_path / "a.tar", [("k", sample)])
    with pytest.raises(UserError, match=reason):
        open_labelled(f"{tmp_path}/a.tar", "train")


def test_a_damaged_shard_is_one_line(tmp_path):
    shards(tmp_path)
    shard = tmp_path / "set-0001.tar"
    body = shard.read_bytes()
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-1]
    # within a member, between members, and an invalid header
    for damaged in (body[: last.offset_data + 1], body[: last.offset], body[: last.offset] + b"x" * 1024, b"no tar"):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match="set-0001.tar' ends early .*: fetch it again") as caught:
            open_labelled(f"{tmp_path}/set-*.tar", "train")
        assert "\n" not in str(caught.value)


# ---- list files


def test_a_list_can_be_in_another_folder_than_its_images(tmp_path):
    path = Path(list_file(tmp_path))
    (tmp_path / "lists").mkdir()
    moved = path.rename(tmp_path / "lists" / "ImageNet_LT_train.txt")
    data = open_labelled(str(moved), "train", root=str(tmp_path))
    assert data.labels.tolist() == LABELS and is_picture(data.read(2), 2)
    (tmp_path / "a folder" / "1.png").unlink()
    (tmp_path / "a folder" / "4.png").unlink()
    with pytest.raises(UserError, match=r"2 of the 6 images of .* are not below .*, the first is 'a folder/1.png'"):
        open_labelled(str(moved), "train", root=str(tmp_path))


@pytest.mark.parametrize("line", ["a.png", "a.png -1", "a.png x", "", "7"])
def test_a_malformed_line_is_named_by_its_number(tmp_path, line):
    path = Path(list_file(tmp_path))
    path.write_text(f"a folder/0.png\t1\n{line}\na folder/1.png 0\n")
    with pytest.raises(UserError, match=f"list.txt' line 2 is '{line}': expected path/of/image.jpg LABEL"):
        open_labelled(str(path), "train")


def test_a_list_that_is_empty_or_missing(tmp_path):
    with pytest.raises(UserError, match="the list .*list.txt' does not exist"):
        open_labelled(f"{tmp_path}/list.txt", "train")
    (tmp_path / "list.txt").touch()
    with pytest.raises(UserError, match="list.txt holds no images"):
        open_labelled(f"{tmp_path}/list.txt", "train")


def test_a_broken_image_is_named_when_it_is_read(tmp_path):
    data = open_labelled(list_file(tmp_path), "train")
    (tmp_path / "a folder" / "3.png").write_bytes(picture(3)[:40])
    assert is_picture(data.read(2), 2)
    with pytest.raises(UserError, match=r"a folder/3\.png cannot be decoded .*: fetch it again or remove it"):
        data.read(3)
    write_shard(tmp_path / "a.tar", [("k", {"jpg": b"nothing", "cls": b"0"})])
    with pytest.raises(UserError, match=r"a\.tar at byte 512 cannot be decoded"):
        open_labelled(f"{tmp_path}/a.tar", "train").read(0)


def test_an_image_is_read_on_each_call_and_its_file_is_closed(tmp_path):
    """A file left open is an error in pytest."""
    data = open_labelled(list_file(tmp_path), "train")
    path = tmp_path / "a folder" / "3.png"
    image = data.images(3)
    path.write_bytes(picture(5))
    assert image.where == str(path) and image.read() == picture(5) and is_picture(image.decode(), 5)
    whole = picture(3, side=64)
    path.write_bytes(whole[: len(whole) // 2])  # the header is whole, the pixels are not
    with pytest.raises(BrokenImage, match="3.png cannot be decoded"):
        image.decode()
    with pytest.raises(BrokenSample):
        decode(str(path))
    gc.collect()
    path.unlink()
    with pytest.raises(UserError, match="3.png' cannot be read") as caught:
        image.decode()
    assert not isinstance(caught.value, BrokenImage)


def test_a_row_without_an_image_is_a_broken_one(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    (tmp_path / "x.png").write_bytes(picture(4))
    rows = {"img": [None, {"bytes": None, "path": str(tmp_path / "x.png")}], "label": [0, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train-0.parquet")
    data = open_labelled(str(tmp_path), "train")
    assert is_picture(data.read(1), 4)
    with pytest.raises(BrokenImage, match="train row 0 cannot be decoded .*no image"):
        data.read(0)


def test_pixels_decode_to_themselves():
    for side in (1, 7, 32):
        image = pixel_image("here", pixels(0, side))
        assert image.decode().size == (side, side) and np.array_equal(np.asarray(image.decode()), pixels(0, side))
    turned = pixels(1).transpose(1, 0, 2)  # not contiguous
    assert np.array_equal(np.asarray(pixel_image("here", turned).decode()), turned)


# ---- parts of a set


def test_a_subset_of_a_subset():
    data = toy([0, 1, 2, 1], 4)
    part = data.subset(torch.tensor([3, 2, 0])).subset(torch.tensor([2, 0]))
    assert part.labels.tolist() == [0, 1] and part.num_classes == 4
    assert numbers(part) == [0, 3]
    assert len(data.subset(torch.tensor([], dtype=torch.int64))) == 0


def test_the_long_tail_of_cifar10_is_the_published_one():
    data = toy([index % 10 for index in range(50_000)], 10)
    tail = long_tailed(data, ratio=100.0, seed=0)
    assert tail.counts().tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tailed(data, ratio=10.0, seed=0).counts()[-1] == 500
    assert long_tailed(data, ratio=1.0, seed=0).counts().tolist() == [5000] * 10


@pytest.mark.parametrize("ratio", [10.0, 50.0, 100.0])
def test_the_long_tail_of_cifar100_follows_the_formula(ratio):
    data = toy([index // 500 for index in range(50_000)], 100)
    expected = [int(500 * (1 / ratio) ** (i / 99)) for i in range(100)]
    assert expected[0] == 500 and expected[-1] == int(500 / ratio)
    assert long_tailed(data, ratio=ratio, seed=3).counts().tolist() == expected


def test_a_long_tail_is_drawn_by_its_seed_from_the_set_itself():
    data = toy([index % 4 for index in range(400)], 4)
    a, b, c = (long_tailed(data, ratio=10.0, seed=seed) for seed in (5, 5, 6))
    assert numbers(a) == numbers(b) != numbers(c)
    assert len(set(numbers(a))) == len(a) and numbers(a) == sorted(numbers(a))
    assert [number % 4 for number in numbers(a)] == a.labels.tolist()
    assert set(range(0, 400, 4)) <= set(numbers(a))  # the first class stays whole


def test_a_class_gives_no_more_than_it_has():
    data = toy([0] * 100 + [1] * 3 + [2] * 100, 3)
    assert long_tailed(data, ratio=4.0, seed=0).counts().tolist() == [100, 3, 25]


@pytest.mark.parametrize("ratio", [0.99, 0.0, -2.0, float("nan"), float("inf")])
def test_a_ratio_below_one_is_refused(ratio):
    with pytest.raises(UserError, match=f"imbalance ratio {ratio} must be at least 1: "):
        long_tailed(toy([0, 1], 2), ratio=ratio, seed=0)


def test_a_ratio_that_empties_a_class_is_refused():
    with pytest.raises(UserError, match="ratio 8.0 leaves the rarest class of toy empty: use at most 7"):
        long_tailed(toy([0, 1] * 7, 2), ratio=8.0, seed=0)


@pytest.mark.parametrize("n, expected", [(4, [1, 1, 1, 1]), (10, [3, 3, 3, 1]), (31, [10, 10, 10, 1])])
def test_a_subset_is_balanced_as_far_as_the_classes_allow(n, expected):
    data = toy([0] * 10 + [1] * 10 + [2] * 10 + [3], 4)
    part = balanced_subset(data, n, 0)
    assert len(part) == n == len(set(numbers(part))) and part.counts().tolist() == expected
    assert part.labels.tolist() == data.labels[numbers(part)].tolist()


def test_a_balanced_subset_is_drawn_by_seed():
    data = toy([index % 5 for index in range(100)], 5)
    a, b, c = (numbers(balanced_subset(data, 12, seed)) for seed in (1, 1, 2))
    assert a == b != c
    assert sorted(balanced_subset(data, 12, 1).counts().tolist()) == [2, 2, 2, 3, 3]
    with pytest.raises(UserError, match="101 images of toy: it has 100, choose 1 to 100"):
        balanced_subset(data, 101, 0)
    with pytest.raises(UserError, match="0 images of toy"):
        balanced_subset(data, 0, 0)


def test_shot_groups_have_their_borders():
    groups = shot_groups(torch.tensor([0, 19, 20, 100, 101, 1280]))
    assert {name: mask.nonzero().flatten().tolist() for name, mask in groups.items()} == {
        "many": [4, 5],
        "medium": [2, 3],
        "few": [0, 1],
    }
    empty = shot_groups(torch.tensor([500, 500]))
    assert not empty["few"].any() and not empty["medium"].any() and empty["many"].all()


def test_all_images_in_memory(tmp_path):
    data = open_labelled(list_file(tmp_path), "train")
    images = in_memory(data)
    assert images.dtype == torch.uint8 and images.shape == (6, 3, 4, 4)
    assert all(np.array_equal(images[i].permute(1, 2, 0).numpy(), pixels(i)) for i in range(6))
    (tmp_path / "a folder" / "2.png").write_bytes(picture(2, side=5))
    with pytest.raises(UserError, match="image 0 is 4x4 and image 2 is 5x5: only images of one size .* from disk"):
        in_memory(data)


# ---- images without labels


def test_stl10s_own_files(tmp_path, monkeypatch):
    source = stl10_files(tmp_path, monkeypatch)
    data = open_labelled(source, "train")
    assert data.labels.tolist() == LABELS and data.classnames == NAMES
    more = open_image_set(source, "unlabeled")
    assert len(more) == len(data) == 6
    for index in range(6):
        assert np.array_equal(np.asarray(more.read(index)), pixels(index, 96))
        assert np.array_equal(np.asarray(data.read(index)), pixels(index, 96))
    with pytest.raises(UserError, match="has the label -1, which means unlabelled"):
        open_labelled(source, "unlabeled")
    with pytest.raises(UserError, match="has no split 'validation', splits there: test, train, unlabeled"):
        open_image_set(source, "validation")


def test_a_damaged_stl10_is_named(tmp_path):
    (tmp_path / "stl10_binary").mkdir()
    with pytest.raises(UserError, match="is not what torchvision downloads .*: fetch it again"):
        open_image_set(str(tmp_path), "unlabeled")


def test_images_of_a_folder_are_at_any_depth_and_those_of_a_table_need_no_label(tmp_path):
    for place, index in (("b.png", 1), ("a/deep/er.png", 0), ("c/d.PNG", 2), ("a/notes.txt", 3)):
        path = tmp_path / "folder" / "extra" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(index))
    images = open_image_set(str(tmp_path / "folder"), "extra")
    assert len(images) == 3 and all(is_picture(images.read(index), index) for index in range(3))
    assert in_memory(images).shape == (3, 3, 4, 4)
    table = datasets.Dataset.from_dict(
        {"img": [Image.fromarray(pixels(i)) for i in range(3)]}, features=datasets.Features({"img": datasets.Image()})
    )
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "extra-00000-of-00001.parquet")
    images = open_image_set(str(tmp_path / "table"), "extra")
    assert len(images) == 3 and all(is_picture(images.read(index), index) for index in range(3))
    (tmp_path / "folder" / "none").mkdir()
    for source, split, message in (
        ("folder", "none", rf"holds no image \({', '.join(IMAGE_SUFFIXES)}\)"),
        ("folder", "other", "has no split 'other', splits there: extra, none"),
        ("table", "train", "has no split 'train'"),
        ("nowhere", "train", "could not be had from the Hub"),
    ):
        with pytest.raises(UserError, match=message):
            open_image_set(str(tmp_path / source), split)
    with pytest.raises(UserError, match="has no column 'photo'"):
        open_image_set(str(tmp_path / "table"), "extra", columns=("photo", "label"))


def test_all_readers_of_a_folder_accept_the_same_image_endings(tmp_path):
    for index, name in enumerate(("ant/0.tif", "bee/1.bmp")):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(picture(index, ending=path.suffix[1:]))
    for data in (open_labelled(str(tmp_path), "train"), open_image_set(str(tmp_path), "train")):
        assert len(data) == 2 and all(is_picture(data.read(index), index) for index in range(2))
    pairs = list(open_images(str(tmp_path / "train")).epoch(0, 0, 0, 1))
    assert {pair.key for pair in pairs} == {"ant/0.tif", "bee/1.bmp"}
    assert all(is_picture(decode(pair.image), int(pair.key[4])) for pair in pairs)


def test_images_in_memory_can_be_of_another_size(tmp_path):
    data = open_labelled(parquet_folder(tmp_path), "train")
    resized = in_memory(data, size=2)
    assert resized.shape == (6, 3, 2, 2)
    expected = data.read(3).resize((2, 2), Image.Resampling.BILINEAR)
    assert np.array_equal(resized[3].permute(1, 2, 0).numpy(), np.asarray(expected))
    assert torch.equal(in_memory(data, size=4), in_memory(data))
