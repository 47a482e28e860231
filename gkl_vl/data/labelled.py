"""Labelled images by number: from parquet or the Hub, CIFAR's files, image folders, web shards, or list files.

An image is read by its number alone. The order of an epoch is then a pure function of seed and epoch, and a run that is
taken up again sees the same images. A score is about all images of a set, so whatever is missing, unlabelled or broken
is an error and nothing is skipped.

Axis letters: N = images, m = chosen ones, C = classes, h, w = height and width.
"""

import glob
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from jaxtyping import Bool, Int, Int64, UInt8
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import find_classes, make_dataset
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm
from webdataset.shardlists import expand_urls

from gkl_vl.data.files import (
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    LABEL_COLUMNS,
    EncodedImage,
    encoded_image,
    hub_table,
    is_local,
    need_columns,
    read_file,
    require_end,
    require_images,
    undecoded,
    usual_column,
)
from gkl_vl.errors import UserError, first_line

CIFAR = {
    "cifar-10-batches-py": torchvision.datasets.CIFAR10,
    "cifar-100-python": torchvision.datasets.CIFAR100,
}
STL10 = "stl10_binary"


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images by number."""

    name: str
    size: int
    images: Callable[[int], EncodedImage]
    """Image by number, not read yet; it goes to worker processes."""

    def read(self, index: int) -> Image.Image:
        """Image by number, decoded, RGB. Raises: UserError for one that cannot be decoded."""
        return self.images(index).decode()

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Images with one label each."""

    name: str
    labels: Int64[Tensor, " N"]
    num_classes: int
    classnames: tuple[str, ...] | None
    """Names by label; None where the source has none."""
    images: Callable[[int], EncodedImage]
    """Image by number, not read yet; it goes to worker processes."""

    def read(self, index: int) -> Image.Image:
        """Image by number, decoded, RGB. Raises: UserError for one that cannot be decoded."""
        return self.images(index).decode()

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> Int64[Tensor, " C"]:
        """Images of each class."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def subset(self, indices: Int[Tensor, " m"]) -> "LabelledSet":
        """The images of these numbers, in their order, of the same classes."""
        return replace(self, labels=self.labels[indices], images=_Chosen(self.images, indices))


def open_labelled(
    source: str, split: str, *, root: str | None = None, columns: tuple[str, str] | None = None
) -> LabelledSet:
    """The labelled images that `source` names.

    Args:
        source: a folder of parquet in the Hub's layout (`train-*.parquet`, there or one folder down), a folder with
            CIFAR's or STL-10's own files (`cifar-10-batches-py`, `cifar-100-python`, `stl10_binary`), an image folder
            (SPLIT/CLASS/*.jpg), or a dataset on the Hub. `a-{000..9}.tar`, `a-*.tar` = web shards here, members
            KEY.jpg|jpeg|png|webp and KEY.cls. `x.txt` = a list of lines `path/of/image.jpg LABEL`, as ImageNet-LT,
            Places-LT and iNaturalist 2018 have them.
        split: of a folder or a Hub dataset; "validation" also finds a folder's "val". Shards and lists are one split.
        root: where the paths of a list begin, by default its own folder.
        columns: image and label of parquet or a Hub dataset where they are not among `IMAGE_COLUMNS` and
            `LABEL_COLUMNS`.

    Raises: UserError for what cannot be found or read, for a split that is not there, for images without label.
    """
    if not is_local(source):
        raise UserError(f"{source!r} is remote: images are read in any order, so download it first")
    if Path(source).is_dir():
        return _folder_set(source, split, columns)
    if source.endswith(".tar"):
        return _shard_set(source)
    if source.endswith(".txt"):
        return _list_set(source, root)
    hint = "folders of images or parquet, shards (.tar) and lists (.txt) are read here too"
    table = hub_table(source, split, asked=f"{source!r} (split {split!r})", hint=hint)
    return _table_set(f"{source}:{split}", table, columns)


def open_image_set(source: str, split: str, *, columns: tuple[str, str] | None = None) -> ImageSet:
    """The images of a split whose labels are not there, or not to be read; STL-10 calls its own "unlabeled".

    Args:
        source: as for `open_labelled`, but shards and lists; in a folder's SPLIT images may lie at any depth.
        columns: the first is that of the images.

    Raises: UserError for what cannot be found or read.
    """
    name, folder = f"{source}:{split}", Path(source)
    if (folder / STL10).is_dir():
        files = _stl10(source, split)
        return ImageSet(name=name, size=len(files.data), images=_Pixels(name, files.data.transpose(0, 2, 3, 1)))
    if folder.is_dir() and not _parquet_files(folder):
        inside = _split_among((path.name for path in folder.iterdir() if path.is_dir()), split=split, source=source)
        place = folder / inside
        paths = sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.suffix[1:].lower() in IMAGE_SUFFIXES)
        if not paths:
            raise UserError(f"{str(place)!r} holds no image (jpg, png, webp)")
        return ImageSet(name=name, size=len(paths), images=_files(str(place), paths))
    if folder.is_dir():
        table = _parquet_table(source, split, _parquet_files(folder))
    else:
        table = hub_table(source, split, asked=f"{source!r} (split {split!r})", hint="or name a folder")
    column = columns[0] if columns else usual_column(IMAGE_COLUMNS, table.column_names)
    need_columns(name, table.column_names, column, None)
    images = undecoded(table.select_columns([column]), column)
    return ImageSet(name=name, size=len(table), images=_TableImages(name, images, column))


def in_memory(data: LabelledSet | ImageSet, *, size: int | None = None) -> UInt8[Tensor, "N 3 h w"]:
    """All images, decoded, and with `size` resized to size x size.

    Raises: UserError where they differ in size.
    """
    images = torch.empty(0, dtype=torch.uint8)
    for index in tqdm(range(len(data)), desc=f"decode {data.name}", unit="image", leave=False, disable=None):
        decoded = data.read(index)
        if size is not None and decoded.size != (size, size):
            decoded = decoded.resize((size, size), Image.Resampling.BILINEAR)
        image = pil_to_tensor(decoded)
        if index == 0:
            images = torch.empty(len(data), *image.shape, dtype=torch.uint8)
        if image.shape != images.shape[1:]:
            (_, h, w), (_, other_h, other_w) = images.shape[1:], image.shape
            raise UserError(
                f"{data.name}: image 0 is {w}x{h} and image {index} is {other_w}x{other_h}: only images of one size "
                "are kept in memory, so resize them or read them from disk"
            )
        images[index] = image
    return images


# ---- parts of a set ----------------------------------------------------------------------------------------------


def long_tailed(data: LabelledSet, *, ratio: float, seed: int) -> LabelledSet:
    """Exponential imbalance as in CIFAR-LT: class i of C keeps int(n_max (1/ratio)^(i/(C-1))) images, drawn by seed.

    n_max = images of the most frequent class. A class that has fewer keeps all it has.

    Source: Cui et al. 2019 (class-balanced loss), Cao et al. 2019 (LDAM), `imbalance_cifar.py`.

    Raises: UserError for a ratio below 1, or one that leaves a class without images.
    """
    if not 1 <= ratio < math.inf:
        raise UserError(f"imbalance ratio {ratio}: it is the most frequent class over the rarest, at least 1")
    counts = data.counts()
    most, last = int(counts.max()), max(data.num_classes - 1, 1)
    keep = torch.tensor([int(most * (1 / ratio) ** (label / last)) for label in range(data.num_classes)])
    if keep.min() == 0:
        raise UserError(f"imbalance ratio {ratio} leaves the rarest class of {data.name} no image: at most {most}")
    order, rank = shuffled_ranks(data.labels, seed)
    return data.subset(order[rank < keep[data.labels[order]]].sort().values)


def balanced_subset(data: LabelledSet, n: int, seed: int) -> LabelledSet:
    """n images drawn by seed, as many of each class as there are, to within one.

    Raises: UserError for more images than there are.
    """
    if not 1 <= n <= len(data):
        raise UserError(f"{n} images of {data.name}: it has {len(data)}, ask for 1 to {len(data)}")
    order, rank = shuffled_ranks(data.labels, seed)
    return data.subset(order[rank.argsort(stable=True)[:n]].sort().values)


def shuffled_ranks(labels: Int[Tensor, " n"], seed: int) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """A random order of the images, and for each place in it the number of earlier images of the same class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels.cpu()[order]
    by_class = shuffled.argsort(stable=True)
    counts = torch.bincount(shuffled)
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[shuffled[by_class]]
    return order, rank


def shot_groups(counts: Int[Tensor, " C"]) -> dict[str, Bool[Tensor, " C"]]:
    """Classes by their training images: "many" (over 100), "medium" (20 to 100), "few" (under 20); some may be empty.

    Source: Liu et al. 2019, "Large-Scale Long-Tailed Recognition in an Open World".
    """
    many, few = counts > 100, counts < 20
    return {"many": many, "medium": ~many & ~few, "few": few}


def pixel_image(where: str, pixels: UInt8[np.ndarray, "h w 3"]) -> EncodedImage:
    """Pixels in memory as an image that decodes to them, through PPM: header and the bytes themselves."""
    return EncodedImage(where, partial(_as_ppm, pixels))


def _as_ppm(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    h, w, _ = pixels.shape
    return b"P6 %d %d 255\n" % (w, h) + pixels.tobytes()


@dataclass(frozen=True)
class _Chosen:
    images: Callable[[int], EncodedImage]
    indices: Int[Tensor, " m"]

    def __call__(self, index: int) -> EncodedImage:
        return self.images(int(self.indices[index]))


@dataclass(frozen=True)
class _TableImages:
    name: str
    table: Any  # datasets.Dataset, undecoded
    column: str

    def __call__(self, index: int) -> EncodedImage:
        return EncodedImage(f"{self.name} row {index}", partial(_read_cell, self.table, self.column, index))


def _read_cell(table: Any, column: str, index: int) -> bytes:
    image = encoded_image(table[index][column])
    # A cell without an image decodes as an empty file would.
    return read_file(image) if isinstance(image, str) else (image or b"")


@dataclass(frozen=True)
class _Pixels:
    name: str
    pixels: UInt8[np.ndarray, "N h w 3"]

    def __call__(self, index: int) -> EncodedImage:
        return pixel_image(f"{self.name} image {index}", self.pixels[index])


@dataclass(frozen=True)
class _Files:
    folder: str
    # One block of bytes: a list of a million strings would be copied into every worker, reference by reference.
    paths: np.ndarray

    def __call__(self, index: int) -> EncodedImage:
        path = os.path.join(self.folder, os.fsdecode(self.paths[index]))
        return EncodedImage(path, partial(read_file, path))


@dataclass(frozen=True)
class _ShardImages:
    shards: tuple[str, ...]
    places: Int64[Tensor, "N 3"]
    """Number of the shard, first byte, number of bytes."""

    def __call__(self, index: int) -> EncodedImage:
        number, offset, size = self.places[index].tolist()
        shard = self.shards[number]
        return EncodedImage(f"{shard} at byte {offset}", partial(read_file, shard, offset, size))


# ---- sources -----------------------------------------------------------------------------------------------------


def _set(
    name: str,
    labels: np.ndarray | Sequence[int],
    classnames: Sequence[str] | None,
    images: Callable[[int], EncodedImage],
) -> LabelledSet:
    """The set with its labels checked. Without class names there are as many classes as the largest label says."""
    numbers = torch.from_numpy(np.array(labels, dtype=np.int64))
    if not len(numbers):
        raise UserError(f"{name} holds no images")
    if numbers.min() < 0:
        raise UserError(
            f"{name} has the label {int(numbers.min())}, which stands for none: a test split keeps its labels back, "
            "use the split 'validation'"
        )
    num_classes = int(numbers.max()) + 1 if classnames is None else len(classnames)
    if numbers.max() >= num_classes:
        raise UserError(
            f"{name} has the label {int(numbers.max())}, its {num_classes} classes end at {num_classes - 1}"
        )
    names = None if classnames is None else tuple(classnames)
    return LabelledSet(name=name, labels=numbers, num_classes=num_classes, classnames=names, images=images)


def _folder_set(source: str, split: str, columns: tuple[str, str] | None) -> LabelledSet:
    folder = Path(source)
    if cifar := next((name for name in CIFAR if (folder / name).is_dir()), None):
        return open_cifar(source, split, cifar)
    if (folder / STL10).is_dir():
        stl10 = _stl10(source, split)
        pixels = _Pixels(f"{source}:{split}", stl10.data.transpose(0, 2, 3, 1))
        return _set(f"{source}:{split}", np.asarray(stl10.labels), stl10.classes, pixels)
    if files := _parquet_files(folder):
        return _table_set(f"{source}:{split}", _parquet_table(source, split, files), columns)
    return _image_folder_set(source, split)


def _parquet_files(folder: Path) -> list[Path]:
    # No deeper: an image folder has a million files down there.
    return sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])


def _split_among(there: Iterable[str], *, split: str, source: str) -> str:
    """The split as the folder spells it."""
    names = sorted(set(there))
    if split not in names and split == "validation" and "val" in names:
        return "val"
    if split not in names:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"{source!r} has no split {split!r}, splits there: {listed or 'none'}")
    return split


def _parquet_table(source: str, split: str, files: list[Path]) -> Any:
    """The split's `datasets.Dataset`."""
    import datasets

    # train-00000-of-00002.parquet, on the Hub also with a hash behind, or train.parquet
    splits = [re.sub(r"-\d.*", "", file.stem) for file in files]
    split = _split_among(splits, split=split, source=source)
    chosen = [file for file, of in zip(files, splits, strict=True) if of == split]
    folders = sorted({str(file.parent) for file in chosen})
    if len(folders) > 1:
        raise UserError(f"{source!r} has parquet of {split!r} in {' and '.join(folders)}: name one of these folders")
    try:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in chosen], split="train")
    except Exception as error:  # of datasets or of pyarrow, by what is damaged
        raise UserError(
            f"the parquet of {split!r} in {folders[0]!r} cannot be read ({first_line(error)}): fetch it again"
        ) from error


def _table_set(name: str, table: Any, columns: tuple[str, str] | None) -> LabelledSet:
    """A `datasets.Dataset`, memory-mapped."""
    import datasets
    import pyarrow

    there = table.column_names
    image_column, label_column = columns or (usual_column(usual, there) for usual in (IMAGE_COLUMNS, LABEL_COLUMNS))
    need_columns(name, there, image_column, label_column)
    labels = table.data.column(label_column)
    if not pyarrow.types.is_integer(labels.type) or labels.null_count:
        raise UserError(f"{name}: column {label_column!r} is not all whole numbers: name another with --columns")
    feature = table.features[label_column]
    classnames = feature.names if isinstance(feature, datasets.ClassLabel) else None
    images = undecoded(table.select_columns([image_column]), image_column)
    return _set(name, labels.to_numpy(), classnames, _TableImages(name, images, image_column))


def open_cifar(source: str, split: str, folder: str) -> LabelledSet:
    """CIFAR's own files: `folder`, a key of `CIFAR`, within `source`. Raises: UserError, as `open_labelled`."""
    split = _split_among(["train", "test"], split=split, source=source)
    try:
        files = CIFAR[folder](source, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(
            f"{str(Path(source) / folder)!r} is not what torchvision downloads ({first_line(error)}): fetch it again"
        ) from error
    return _set(f"{source}:{split}", files.targets, files.classes, _Pixels(f"{source}:{split}", files.data))


def _stl10(source: str, split: str) -> torchvision.datasets.STL10:
    """STL-10's own files, pixels [N 3 h w]; labels of "unlabeled" are -1."""
    split = _split_among(["train", "test", "unlabeled"], split=split, source=source)
    try:
        return torchvision.datasets.STL10(source, split=split, download=False)
    except RuntimeError as error:
        raise UserError(
            f"{str(Path(source) / STL10)!r} is not what torchvision downloads ({first_line(error)}): fetch it again"
        ) from error


def _image_folder_set(source: str, split: str) -> LabelledSet:
    split = _split_among((path.name for path in Path(source).iterdir() if path.is_dir()), split=split, source=source)
    folder = os.path.join(source, split)
    try:
        classes, label_of = find_classes(folder)
    except FileNotFoundError as error:
        raise _no_image_folder(folder, error) from error
    return class_folders(f"{source}:{split}", folder, label_of, classes)


def class_folders(name: str, folder: str, label_of: dict[str, int], classnames: Sequence[str]) -> LabelledSet:
    """The images of FOLDER/CLASS/ for the classes of `label_of`, in order of CLASS and of their own names.

    Args:
        label_of: label by the name of the class's folder; other folders are left alone.
        classnames: by label; more than there are folders where the set is not complete.

    Raises: UserError for a class without images.
    """
    try:
        samples = make_dataset(folder, label_of, extensions=tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES))
    except FileNotFoundError as error:
        raise _no_image_folder(folder, error) from error
    paths, labels = zip(*samples, strict=True)
    return _set(name, labels, classnames, _files(folder, [os.path.relpath(path, folder) for path in paths]))


def _no_image_folder(folder: str, error: Exception) -> UserError:
    return UserError(f"{folder!r} is no image folder, CLASS/*.jpg or png or webp ({first_line(error)})")


def _files(folder: str, paths: Sequence[str]) -> _Files:
    return _Files(folder, np.array([os.fsencode(path) for path in paths], dtype=np.bytes_))


def _list_set(source: str, root: str | None) -> LabelledSet:
    if not Path(source).is_file():
        raise UserError(f"the list {source!r} does not exist")
    paths, labels = [], []
    with open(source, encoding="utf-8", errors="surrogateescape") as file:  # as file names are
        for number, line in enumerate(file, 1):
            words = line.rsplit(maxsplit=1)
            if len(words) < 2 or not words[1].isdecimal():
                raise UserError(f"{source!r} line {number} is {line.strip()!r}: expected path/of/image.jpg LABEL")
            paths.append(words[0])
            labels.append(int(words[1]))
    folder = str(Path(source).parent) if root is None else root
    require_images(source, folder, paths)
    return _set(source, labels, None, _files(folder, paths))


def _shard_set(source: str) -> LabelledSet:
    shards = tuple(path for pattern in expand_urls(source) for path in _matches(pattern))
    missing = [shard for shard in shards if not Path(shard).is_file()]
    if missing:
        raise UserError(f"shard {missing[0]!r} does not exist ({len(missing)} of {len(shards)} are missing)")
    places, labels = [], []
    for number, shard in enumerate(tqdm(shards, desc="index shards", unit="shard", leave=False, disable=None)):
        for offset, size, label in _index(shard):
            places.append((number, offset, size))
            labels.append(label)
    return _set(source, labels, None, _ShardImages(shards, torch.tensor(places, dtype=torch.int64).reshape(-1, 3)))


def _matches(pattern: str) -> list[str]:
    """A glob's files; a plain path stays as it is, so that its absence is noticed."""
    return sorted(glob.glob(pattern)) or [pattern]


def _index(shard: str) -> list[tuple[int, int, int]]:
    """(first byte, number of bytes, label) of each image of a tar, from its headers and labels alone."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                directory, slash, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                key = directory + slash + stem
                if not member.isfile() or not stem:
                    continue
                if ending.lower() in IMAGE_SUFFIXES:
                    if key in images:
                        raise UserError(f"{shard!r}: sample {key!r} has two images: leave one")
                    images[key] = (member.offset_data, member.size)
                elif ending.lower() == "cls":
                    labels[key] = _label_in(tar, member, shard)
            require_end(shard, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"the shard {shard!r} ends early or is damaged ({first_line(error)}): fetch it again"
        ) from error
    if alone := sorted(images.keys() ^ labels.keys()):
        raise UserError(f"{shard!r}: sample {alone[0]!r} has no {'.cls member' if alone[0] in images else 'image'}")
    return [(*images[key], labels[key]) for key in images]


def _label_in(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: str) -> int:
    body = tar.extractfile(member)
    assert body is not None  # isfile() said so
    text = body.read().decode("utf-8", errors="replace").strip()
    if not text.isdecimal():
        raise UserError(f"{shard!r}: {member.name!r} says {text!r}: expected a label, a whole number from 0")
    return int(text)
