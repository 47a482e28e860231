"""Labelled images by index, from parquet, the Hub, CIFAR's and STL-10's files, image folders, web shards or list files.

An image is read by its index alone. The order of an epoch is then a pure function of seed and epoch, and a resumed run
sees the same images. Metrics are computed over all images of a set, so a missing, unlabelled or broken image is an
error and nothing is skipped.

Sets of images without labels, subsets (long-tailed, balanced) and decoding into memory are here as well.

Axis letters: N = images, m = images of a subset, C = classes, h, w = height and width.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from jaxtyping import Int, Int64, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from gkl_vl.addresses import is_local
from gkl_vl.data.classes import are_numbers, folder_order, match_classes
from gkl_vl.data.files import (
    IMAGE_SUFFIXES,
    endings_text,
    image_paths,
    note_others,
    one_split,
    read_file,
    require_images,
    subfolders,
)
from gkl_vl.data.images import BrokenSample, EncodedImage
from gkl_vl.data.shards import Sample, checked_shards, is_shards, list_shards, read_samples, shards_below
from gkl_vl.data.tables import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    ParquetRows,
    Rows,
    class_labels,
    files_of_split,
    hub_rows,
    image_of,
    integers,
    parquet_files,
    require_image_column,
    usual_column,
)
from gkl_vl.errors import UserError, first_line, notice

CIFAR = {
    "cifar-10-batches-py": torchvision.datasets.CIFAR10,
    "cifar-100-python": torchvision.datasets.CIFAR100,
}
STL10 = "stl10_binary"
LARGEST_LABEL = 10**7
"""Larger ones are ids of something else; a count of their classes would not fit in memory."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images by index, without labels."""

    name: str
    size: int
    images: Callable[[int], EncodedImage]
    """Image by index, not read yet; sent to worker processes."""

    def read(self, index: int) -> Image.Image:
        """Image by index, decoded to RGB. Raises: UserError for an image that cannot be decoded."""
        return self.images(index).decode()

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Images by index, with one label each."""

    name: str
    labels: Int64[Tensor, " N"]
    num_classes: int
    classnames: tuple[str, ...] | None
    """Names by label; None if the source has none."""
    images: Callable[[int], EncodedImage]
    """Image by index, not read yet; sent to worker processes."""

    def read(self, index: int) -> Image.Image:
        """Image by index, decoded to RGB. Raises: UserError for an image that cannot be decoded."""
        return self.images(index).decode()

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> Int64[Tensor, " C"]:
        """Number of images per class."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def subset(self, indices: Int[Tensor, " m"]) -> "LabelledSet":
        """The images at `indices`, in that order; the classes stay the same."""
        return replace(self, labels=self.labels[indices], images=_SubsetImages(self.images, indices))

    def in_order(self, classnames: Sequence[str] | None, *, num_classes: int, others: str) -> "LabelledSet":
        """The set with other labels: its classes in the order of given ones, of which it may lack some.

        Classes are matched by name (`data/classes.py`). Where only one side has names and these are not numbers, its
        labels are taken as they are: names say nothing about a list of numbers.

        Args:
            classnames: the classes by label; None = without names, labels 0 to num_classes - 1.
            others: whose classes these are, for messages.

        Raises: UserError for a class that is not among the given ones.
        """
        own, reference = self.classnames, classnames
        if (own is None or reference is None) and not are_numbers(own or reference or ()):
            if self.num_classes > num_classes or (own is not None and self.num_classes < num_classes):
                raise UserError(
                    f"{self.name} has {self.num_classes} classes and {others} {num_classes}, without names by which "
                    "they could be matched: name data of the same classes"
                )
            names = own if reference is None else tuple(reference)
            return replace(self, num_classes=num_classes, classnames=names)
        own = own or tuple(map(str, range(self.num_classes)))
        reference = tuple(reference or map(str, range(num_classes)))
        places = torch.tensor(match_classes(own, reference, whose=self.name, others=others))
        return replace(self, labels=places[self.labels], num_classes=len(reference), classnames=reference)


def open_labelled(
    source: str, split: str, *, root: str | None = None, columns: tuple[str, str] | None = None
) -> LabelledSet:
    """Opens the labelled images that `source` names.

    Args:
        source: a folder of parquet in the Hub's layout (`train-*.parquet`, directly in it or one level down), a folder
            with CIFAR's or STL-10's own files (`cifar-10-batches-py`, `cifar-100-python`, `stl10_binary`), an image
            folder (SPLIT/CLASS/*, endings `IMAGE_SUFFIXES`), or a dataset on the Hub. `a-{000..9}.tar`, `a-*.tar` =
            local web shards, members KEY.<one of IMAGE_SUFFIXES> and KEY.cls. `x.txt` = a list of lines
            `path/of/image.jpg LABEL`, the format of ImageNet-LT, Places-LT and iNaturalist 2018.
        split: of a folder or a Hub dataset; "validation" also matches a folder's "val". Shards and lists are one split.
        root: the folder that paths in a list are relative to, by default the list's own.
        columns: image and label of parquet or a Hub dataset if they are not among `IMAGE_COLUMNS` and `LABEL_COLUMNS`.

    Raises: UserError for a source that does not exist or cannot be read, a missing split, or images without label.
    """
    if not is_local(source):
        raise UserError(f"{source!r} is remote: images are read in random order, so download it first")
    if Path(source).is_dir():
        return _folder_set(source, split, columns)
    if is_shards(source):
        return _shard_set(source, list_shards(source))
    if source.lower().endswith(".txt"):
        return _list_set(source, root)
    if Path(source).exists():
        raise UserError(f"{source!r} is a file of an unknown kind: expected a folder, shards (.tar) or a list (.txt)")
    hint = "folders of images or parquet, shards (.tar) and lists (.txt) also work"
    rows = hub_rows(source, split, subject=f"{source!r} (split {split!r})", hint=hint)
    return _table_set(f"{source}:{split}", rows, columns)


def refuse_unused_options(
    sources: Sequence[str], *, root: str | None = None, columns: tuple[str, str] | None = None
) -> None:
    """Raises: UserError for `root` if no source is a list, and for `columns` if none is a table."""
    lists = [source for source in sources if source.lower().endswith(".txt")]
    if root is not None and not lists:
        raise UserError(f"--root {root} is for lists (.txt) and has no effect on {' and '.join(sources)}: leave it out")
    others = [source for source in sources if source not in lists and not is_shards(source)]
    if columns is not None and not any(not Path(source).is_dir() or parquet_files(Path(source)) for source in others):
        raise UserError(
            f"--columns {' '.join(columns)} are of tables (parquet, the Hub) and have no effect on "
            f"{' and '.join(sources)}: leave them out"
        )


def open_image_set(source: str, split: str, *, columns: tuple[str, str] | None = None) -> ImageSet:
    """Opens the images of a split without labels; labels that exist are not read. STL-10's split is "unlabeled".

    Args:
        source: as for `open_labelled`, except shards and lists; images may be at any depth of a folder's SPLIT.
        columns: the first is the image column.

    Raises: UserError for a source that does not exist or cannot be read.
    """
    name, folder = f"{source}:{split}", Path(source)
    if (folder / STL10).is_dir():
        files = _stl10(source, split)
        return ImageSet(name=name, size=len(files.data), images=_Pixels(name, files.data.transpose(0, 2, 3, 1)))
    if folder.is_dir() and not parquet_files(folder):
        below = folder / one_split(subfolders(folder), split=split, source=source)
        paths, others = image_paths(below)
        if not paths:
            raise UserError(
                f"{str(below)!r} holds no image ({', '.join(IMAGE_SUFFIXES)}), it has {endings_text(others)}"
            )
        note_others(str(below), others)
        return ImageSet(name=name, size=len(paths), images=_files(str(below), paths))
    if folder.is_dir():
        rows = ParquetRows(files_of_split(parquet_files(folder), folder, split, source))
    else:
        rows = hub_rows(source, split, subject=f"{source!r} (split {split!r})", hint="or name a folder")
    column = columns[0] if columns else usual_column(IMAGE_COLUMNS, rows.schema.names)
    require_image_column(name, rows.schema, column)
    return ImageSet(name=name, size=len(rows), images=_TableImages(name, rows.select([column]), column))


def open_cifar(source: str, split: str, folder: str) -> LabelledSet:
    """Opens CIFAR's own files in `folder`, a key of `CIFAR`, within `source`. Raises: UserError, as `open_labelled`."""
    split = one_split(["train", "test"], split=split, source=source)
    try:
        files = CIFAR[folder](source, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(
            f"{str(Path(source) / folder)!r} is not what torchvision downloads ({first_line(error)}): fetch it again"
        ) from error
    return _labelled_set(f"{source}:{split}", files.targets, files.classes, _Pixels(f"{source}:{split}", files.data))


def class_folders(name: str, folder: str, label_of: dict[str, int], classnames: Sequence[str]) -> LabelledSet:
    """The images of FOLDER/CLASS/ for the classes of `label_of`, sorted by CLASS and file name.

    Args:
        label_of: label by the name of the class's folder; other folders are ignored.
        classnames: by label; more than `label_of` has if the set is incomplete.

    Raises: UserError for a class without images.
    """
    paths, labels, skipped = [], [], Counter()
    for class_folder, label in label_of.items():
        of_class, others = image_paths(os.path.join(folder, class_folder))
        if not of_class:
            raise UserError(
                f"the class folder {os.path.join(folder, class_folder)!r} holds no image "
                f"({', '.join(IMAGE_SUFFIXES)}), it has {endings_text(others)}"
            )
        paths += [f"{class_folder}/{path}" for path in of_class]
        labels += [label] * len(of_class)
        skipped.update(others)
    note_others(folder, skipped)
    return _labelled_set(name, labels, classnames, _files(folder, paths))


def in_memory(data: LabelledSet | ImageSet, *, size: int | None = None) -> UInt8[Tensor, "N 3 h w"]:
    """Decodes all images; with `size`, resized to size x size.

    Raises: UserError if their sizes differ.
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
                "can be kept in memory, so resize them or read them from disk"
            )
        images[index] = image
    return images


# ---- images by index ---------------------------------------------------------------------------------------------


def pixel_image(where: str, pixels: UInt8[np.ndarray, "h w 3"]) -> EncodedImage:
    """Pixels in memory as an `EncodedImage`. The encoding is PPM, a header and the raw bytes, so it is lossless."""
    return EncodedImage(where, partial(_as_ppm, pixels))


def _as_ppm(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    h, w, _ = pixels.shape
    return b"P6 %d %d 255\n" % (w, h) + pixels.tobytes()


@dataclass(frozen=True)
class _SubsetImages:
    images: Callable[[int], EncodedImage]
    indices: Int[Tensor, " m"]

    def __call__(self, index: int) -> EncodedImage:
        return self.images(int(self.indices[index]))


@dataclass(frozen=True)
class _TableImages:
    name: str
    rows: Rows
    column: str

    def __call__(self, index: int) -> EncodedImage:
        return EncodedImage(f"{self.name} row {index}", partial(_read_cell, self.rows, self.column, index))


def _read_cell(rows: Rows, column: str, index: int) -> bytes:
    image = image_of(rows.row(index)[column], rows.folder(index))
    # A cell without an image is decoded like an empty file: a BrokenImage.
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
    # One block of bytes: reference counts would copy a list of a million strings into every forked worker.
    paths: np.ndarray

    def __call__(self, index: int) -> EncodedImage:
        path = os.path.join(self.folder, os.fsdecode(self.paths[index]))
        return EncodedImage(path, partial(read_file, path))


def _files(folder: str, paths: Sequence[str]) -> _Files:
    return _Files(folder, np.array([os.fsencode(path) for path in paths], dtype=np.bytes_))


@dataclass(frozen=True)
class _ShardImages:
    shards: tuple[str, ...]
    places: Int64[Tensor, "N 3"]
    """Index of the shard, first byte, number of bytes."""

    def __call__(self, index: int) -> EncodedImage:
        number, offset, size = self.places[index].tolist()
        shard = self.shards[number]
        return EncodedImage(f"{shard} at byte {offset}", partial(read_file, shard, offset, size))


# ---- sources -----------------------------------------------------------------------------------------------------


def _labelled_set(
    name: str,
    labels: np.ndarray | Sequence[int],
    classnames: Sequence[str] | None,
    images: Callable[[int], EncodedImage],
) -> LabelledSet:
    """Checks the labels and builds the set. Without class names the number of classes is the largest label + 1."""
    if not len(labels):
        raise UserError(f"{name} holds no images")
    stored = np.asarray(labels)  # of any width: an id may not fit into 64 bits
    if (largest := int(stored.max())) > LARGEST_LABEL:
        raise UserError(f"{name} has the label {largest}: labels are the numbers of the classes, from 0")
    numbers = torch.from_numpy(stored.astype(np.int64))
    if numbers.min() < 0:
        raise UserError(
            f"{name} has the label {int(numbers.min())}, which means unlabelled: a test split may withhold its labels, "
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
        return _labelled_set(f"{source}:{split}", np.asarray(stl10.labels), stl10.classes, pixels)
    if files := parquet_files(folder):
        return _table_set(f"{source}:{split}", ParquetRows(files_of_split(files, folder, split, source)), columns)
    split = one_split(subfolders(folder), split=split, source=source)
    if shards := shards_below(folder / split):
        return _shard_set(f"{source}:{split}", checked_shards(shards))
    return _image_folder_set(f"{source}:{split}", os.path.join(source, split))


def _table_set(name: str, rows: Rows, columns: tuple[str, str] | None) -> LabelledSet:
    """The labelled images of a table."""
    existing = rows.schema.names
    image_column, label_column = columns or (usual_column(usual, existing) for usual in (IMAGE_COLUMNS, LABEL_COLUMNS))
    require_image_column(name, rows.schema, image_column)
    labels = integers(name, rows, label_column)
    classes = class_labels(rows.schema, label_column)
    images = _TableImages(name, rows.select([image_column]), image_column)
    return _labelled_set(name, labels, None if classes is None else classes[1], images)


def _stl10(source: str, split: str) -> torchvision.datasets.STL10:
    """Opens STL-10's own files, pixels [N 3 h w]; labels of "unlabeled" are -1."""
    split = one_split(["train", "test", "unlabeled"], split=split, source=source)
    try:
        return torchvision.datasets.STL10(source, split=split, download=False)
    except RuntimeError as error:
        raise UserError(
            f"{str(Path(source) / STL10)!r} is not what torchvision downloads ({first_line(error)}): fetch it again"
        ) from error


def _image_folder_set(name: str, folder: str) -> LabelledSet:
    classes = folder_order(subfolders(folder))
    if not classes:
        raise UserError(f"{folder!r} is not an image folder: it has no folder for each class, as {folder}/CLASS/x.jpg")
    if loose := [path.name for path in Path(folder).iterdir() if path.suffix[1:].lower() in IMAGE_SUFFIXES]:
        notice(f"{folder} has images outside of its class folders, which are not read: {len(loose)}, as {loose[0]}")
    return class_folders(name, folder, {each: label for label, each in enumerate(classes)}, classes)


def _list_set(source: str, root: str | None) -> LabelledSet:
    if not Path(source).is_file():
        raise UserError(f"the list {source!r} does not exist")
    paths, labels = [], []
    with open(source, encoding="utf-8-sig", errors="surrogateescape") as file:  # as for file names
        for number, line in enumerate(file, 1):
            words = line.rsplit(maxsplit=1)
            if len(words) < 2 or not words[1].isdecimal():
                raise UserError(f"{source!r} line {number} is {line.strip()!r}: expected path/of/image.jpg LABEL")
            paths.append(words[0])
            labels.append(int(words[1]))
    folder = str(Path(source).parent) if root is None else root
    require_images(source, folder, paths)
    return _labelled_set(source, labels, None, _files(folder, paths))


def _shard_set(name: str, shards: Sequence[str]) -> LabelledSet:
    if compressed := [shard for shard in shards if not shard.lower().endswith(".tar")]:
        raise UserError(
            f"the shard {compressed[0]!r} is compressed, and images are read by position: unpack it to a .tar"
        )
    places, labels = [], []
    for number, shard in enumerate(tqdm(shards, desc="index shards", unit="shard", leave=False, disable=None)):
        for sample in read_samples(shard, wanted=lambda ending: ending == "cls"):
            (offset, size), label = _labelled_sample(shard, sample)
            places.append((number, offset, size))
            labels.append(label)
    images = _ShardImages(tuple(shards), torch.tensor(places, dtype=torch.int64).reshape(-1, 3))
    return _labelled_set(name, labels, None, images)


def _labelled_sample(shard: str, sample: Sample) -> tuple[tuple[int, int], int]:
    """(first byte, number of bytes) of the image, and the label."""
    try:
        extent = sample.extents[sample.image()]
    except BrokenSample as error:
        raise UserError(f"{shard!r}: sample {sample.key!r} has {error}") from error
    if "cls" not in sample.contents:
        raise UserError(
            f"{shard!r}: sample {sample.key!r} has no .cls member, its members are .{', .'.join(sample.extents)}"
        )
    return extent, label_in(sample.contents["cls"], f"{shard!r}: sample {sample.key!r}")


def label_in(content: bytes, where: str) -> int:
    """The label in a .cls member. Raises: UserError, starting with `where`, for anything but an integer from 0."""
    text = content.decode("utf-8", errors="replace").strip()
    if not text.isdecimal():
        raise UserError(f"{where} has the label {text!r}: expected an integer from 0")
    return int(text)
