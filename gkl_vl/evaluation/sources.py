"""Sources of samples for evaluation sets: web shards, labelled images, and the file layouts of published benchmarks.

Calling a source with target names iterates over all its samples in order. Images are read lazily, so several processes
can iterate over the same set and each reads only its own images.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image

from gkl_vl.data.files import read_file, require_images, subfolders
from gkl_vl.data.images import BrokenSample, EncodedImage
from gkl_vl.data.labelled import LabelledSet, class_folders, label_in
from gkl_vl.data.shards import Sample, read_samples
from gkl_vl.errors import UserError, first_line, notice
from gkl_vl.reading import read_json, read_text

Target = Literal["cls", "npy", "txt"]

IMAGENET_SUBSETS = ("imagenet-a", "imagenet-r", "imagenet-o")
"""Sets with labels 0 to 199 for 200 of ImageNet's classes, in ImageNet's order; the others label all 1000."""
IMAGENET = ("imagenet1k", "imagenetv2", "imagenet_sketch", *IMAGENET_SUBSETS)
UNPACKED = {
    "imagenetv2": ("ImageNetV2-matched-frequency", "imagenetv2-matched-frequency-format-val"),
    "imagenet_sketch": ("sketch",),
}
"""Folder names in the published archives, where they differ from the name of the set."""
# fmt: off
IMAGENET_O = (
    1, 51, 70, 79, 89, 90, 107, 109, 117, 149, 327, 328, 341, 363, 392, 397, 398, 401, 411, 416, 418, 419, 420, 424,
    434, 439, 447, 451, 455, 459, 462, 464, 465, 470, 475, 489, 491, 494, 496, 498, 507, 512, 517, 522, 525, 530,
    533, 537, 539, 540, 545, 549, 550, 551, 552, 554, 556, 558, 559, 562, 563, 567, 574, 580, 583, 588, 589, 593,
    599, 604, 606, 607, 611, 613, 621, 624, 626, 629, 633, 635, 640, 641, 642, 643, 644, 645, 646, 648, 666, 669,
    674, 677, 678, 679, 680, 684, 686, 687, 688, 691, 694, 699, 703, 710, 712, 714, 716, 720, 722, 723, 729, 731,
    736, 738, 740, 741, 743, 747, 749, 753, 758, 761, 767, 769, 771, 772, 773, 778, 783, 784, 789, 791, 793, 794,
    795, 797, 800, 802, 804, 807, 811, 813, 815, 827, 828, 830, 833, 842, 843, 844, 845, 852, 853, 854, 855, 857,
    858, 859, 870, 877, 879, 886, 891, 897, 898, 900, 902, 906, 910, 911, 918, 920, 929, 931, 932, 934, 935, 937,
    938, 939, 941, 943, 945, 948, 949, 950, 951, 953, 954, 955, 957, 960, 962, 963, 965, 971, 980, 987, 988, 996,
)
"""ImageNet's labels of imagenet-o's classes."""
# fmt: on

CAPTION_FILES = {
    "mscoco_captions": ("coco_{split}_karpathy.json", "dataset_coco.json"),
    "flickr30k": ("flickr30k_{split}_karpathy.txt", "dataset_flickr30k.json"),
    "flickr8k": ("flickr8k_{split}_karpathy.txt", "dataset_flickr8k.json"),
}
"""CLIP_benchmark's file of one split, and Karpathy's file of all splits."""
FLICKR_FOLDERS = (".", "Images", "images", "flickr30k-images", "flickr30k_images")
SUGAR_CREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


@dataclass(frozen=True)
class Record:
    """One sample: the requested targets, and a function that reads the image."""

    where: str
    """Shard or file, and key; for error messages."""
    read: Callable[[], bytes]
    """Reads the encoded image, again at each call; can be pickled. Raises: UserError for a file that cannot be read."""
    targets: dict[Target, Any]
    """The requested targets: "cls" an integer, "npy" a list of 0 or 1 per class, "txt" a list of captions."""

    def decode(self) -> Image.Image:
        """Returns the image as RGB, the first frame of an animated one. Raises: BrokenImage."""
        return EncodedImage(self.where, self.read).decode()


@runtime_checkable
class Samples(Protocol):
    """The samples of a set; can be pickled, for worker processes."""

    def __call__(self, targets: Sequence[Target], /) -> Iterator[Record]:
        """Yields all records in order, with these targets. Raises: UserError for a record or target that is missing."""
        ...


# ---- web shards --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WebShards:
    """Tar files with members KEY.jpg (or another of `IMAGE_SUFFIXES`), and KEY.cls, KEY.npy or KEY.txt.

    Source: CLIP_benchmark 1.6.2, `datasets/builder.py::build_wds_dataset`.
    """

    name: str
    shards: list[Path]

    def __call__(self, targets: Sequence[Target]) -> Iterator[Record]:
        empty = True
        for shard in self.shards:
            for sample in read_samples(str(shard), wanted=lambda ending: ending in targets):
                empty = False
                yield self._record(shard, sample, targets)
        if empty:
            raise UserError(f"{self.name}: no samples in its {len(self.shards)} shards")

    def _record(self, shard: Path, sample: Sample, targets: Sequence[Target]) -> Record:
        where = f"{self.name}: {shard} sample {sample.key!r}"
        try:
            extent = sample.extents[sample.image()]
        except BrokenSample as error:
            raise UserError(f"{where} has {error}") from error
        for target in targets:
            if target not in sample.contents:
                raise _no_target(f"{where} has no .{target} member, this set", target)
        parsed: dict[Target, Any] = {target: PARSE[target](sample.contents[target], where) for target in targets}
        return Record(where, partial(read_file, str(shard), *extent), parsed)


def _no_target(prefix: str, target: Target) -> UserError:
    return UserError(f"{prefix} may be one for eval/{'zero_shot' if target == 'txt' else 'retrieval'}.py")


def _captions(value: bytes, where: str) -> list[str]:
    try:
        captions = _not_empty(value.decode("utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise UserError(f"{where} has captions that are not UTF-8 ({first_line(error)})") from error
    if not captions:
        raise UserError(f"{where} has an empty caption file")
    return captions


def _not_empty(captions: Sequence[str]) -> list[str]:
    return [caption.strip() for caption in captions if caption.strip()]


def _row(value: bytes, where: str) -> list[int]:
    """One number per class, 1 if the image shows the class."""
    try:
        row = np.lib.format.read_array(io.BytesIO(value), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{where} has an .npy member that is not an array ({first_line(error)})") from error
    if row.ndim != 1 or row.dtype.kind not in "biuf" or not np.isin(row, (0, 1)).all():
        raise UserError(
            f"{where} has an .npy member of shape {list(row.shape)} and type {row.dtype}: expected 0s and 1s"
        )
    return row.astype(int).tolist()


PARSE: dict[Target, Callable[[bytes, str], Any]] = {"cls": label_in, "npy": _row, "txt": _captions}


# ---- labelled images ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledSamples:
    """The samples of a `LabelledSet`, in its order; the only target is "cls"."""

    data: LabelledSet

    def __call__(self, targets: Sequence[Target]) -> Iterator[Record]:
        for target in targets:
            if target != "cls":
                raise UserError(f"{self.data.name} has labels and no captions: it is a set for eval/zero_shot.py")
        for index, label in enumerate(self.data.labels.tolist()):
            image = self.data.images(index)
            yield Record(image.where, image.read, {"cls": label} if targets else {})


# ---- ImageNet's family and ObjectNet as folders of classes -------------------------------------------------------


def imagenet_classes(name: str) -> dict[str, str]:
    """Classes of a set of ImageNet's family, in the order of the labels: {WordNet id: open_clip's class name}.

    Source: `datasets/builder.py` of CLIP_benchmark 1.6.2; timm ships the same ids as files, except imagenet-o's.
    """
    ids = _wordnet_ids("imagenet")
    name_of = dict(zip(ids, IMAGENET_CLASSNAMES, strict=True))
    if name == "imagenet-o":
        return {ids[label]: name_of[ids[label]] for label in IMAGENET_O}
    if name in IMAGENET_SUBSETS:
        return {wordnet_id: name_of[wordnet_id] for wordnet_id in _wordnet_ids(name.replace("-", "_"))}
    return name_of


def _wordnet_ids(stem: str) -> list[str]:
    import timm.data  # takes seconds, and only these sets need it

    return (Path(timm.data.__file__).parent / "_info" / f"{stem}_synsets.txt").read_text(encoding="utf-8").split()


def imagenet_folders(name: str, folder: Path, split: str) -> LabelledSet:
    """Opens a set of ImageNet's family from class folders: n01440764/*.JPEG, for imagenetv2 0/ to 999/.

    Looks for them in SPLIT/ and, for splits other than "train", also in val/, in the published archive's folder, and in
    `folder`. A missing class folder shifts no label.

    Raises: UserError if there are no class folders, or one is not a class of the set.
    """
    classes = imagenet_classes(name)
    numbered = name == "imagenetv2"
    label_of = {str(label) if numbered else wordnet_id: label for label, wordnet_id in enumerate(classes)}
    parents = [folder / split]
    if split != "train":
        parents += [folder / "val", *(folder / sub for sub in (name, *UNPACKED.get(name, ()))), folder]
    for parent in parents:
        if existing := _class_folders(parent, r"\d+" if numbered else r"n\d{8}"):
            if unknown := [class_folder for class_folder in existing if class_folder not in label_of]:
                raise UserError(f"{name}: {parent / unknown[0]} is none of its {len(label_of)} classes: remove it")
            labels = {class_folder: label_of[class_folder] for class_folder in existing}
            return class_folders(name, str(parent), labels, list(classes.values()))
    example = "0/, 1/, ..." if numbered else f"{next(iter(label_of))}/, ..."
    raise UserError(f"{name}: no class folders ({example}) in {' or '.join(str(parent) for parent in parents)}")


def _class_folders(folder: Path, pattern: str) -> list[str]:
    if not folder.is_dir():
        return []
    names = subfolders(folder)
    classes = [name for name in names if re.fullmatch(pattern, name)]
    if classes and len(classes) < len(names):
        others = [name for name in names if name not in classes]
        notice(f"{folder} has folders that are no classes and are not read: {len(others)}, as {others[0]}")
    return classes


def objectnet_mappings(folder: Path) -> Path | None:
    """The folder with the JSON files of ObjectNet's release; None if there is none."""
    candidates = (folder, folder / "mappings", folder / "objectnet-1.0" / "mappings")
    return next((path for path in candidates if (path / "folder_to_objectnet_label.json").is_file()), None)


def objectnet_folders(folder: Path, mappings: Path) -> LabelledSet:
    """Opens ObjectNet's 113 classes shared with ImageNet, from images/CLASS/*.png; labels follow the sorted folders.

    Class names are the release's, in lower case. The red border of one pixel around its images is kept.

    Source: CLIP_benchmark 1.6.2, `datasets/objectnet.py`, after wise-ft.

    Raises: UserError for a missing or malformed file.
    """
    name_of = read_json(mappings / "folder_to_objectnet_label.json", dict)
    shared = read_json(mappings / "objectnet_to_imagenet_1k.json", dict)
    classes = {class_folder: name.lower() for class_folder, name in sorted(name_of.items()) if name in shared}
    candidates = (folder / "objectnet-1.0" / "images", folder / "images")
    images = next((path for path in candidates if path.is_dir()), None)
    if images is None:
        raise UserError(f"objectnet: no folder {' or '.join(str(path) for path in candidates)}")
    label_of = {class_folder: label for label, class_folder in enumerate(classes)}
    existing = [class_folder for class_folder in _class_folders(images, ".*") if class_folder in label_of]
    labels = {class_folder: label_of[class_folder] for class_folder in existing}
    return class_folders("objectnet", str(images), labels, list(classes.values()))


# ---- images with captions ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionedFiles:
    """Image files with captions; the only target is "txt"."""

    name: str
    folder: Path
    paths: tuple[str, ...]
    captions: tuple[list[str], ...]

    def __call__(self, targets: Sequence[Target]) -> Iterator[Record]:
        for target in targets:
            if target != "txt":
                raise UserError(f"{self.name} has captions and no labels: it is a set for eval/retrieval.py")
        for path, captions in zip(self.paths, self.captions, strict=True):
            file = str(self.folder / path)
            yield Record(f"{self.name}: {file}", partial(read_file, file), {"txt": captions} if targets else {})


def captions_file(name: str, folder: Path, split: str) -> Path | None:
    """The annotation file in a folder: of the set `name` if it is a known set, else of any known set; None if none.

    Raises: UserError if `name` is a known set and its file is missing.
    """
    names = (
        CAPTION_FILES[name] if name in CAPTION_FILES else [file for files in CAPTION_FILES.values() for file in files]
    )
    files = [folder / file.replace("{split}", split) for file in names]
    existing = next((file for file in files if file.is_file()), None)
    if existing is None and name in CAPTION_FILES:
        raise UserError(f"{name}: neither {files[0]} nor {files[1]} exists: download one, and its images next to it")
    return existing


def captioned_files(name: str, file: Path, split: str) -> CaptionedFiles:
    """Reads all images and all their captions from the annotations `file` and the image files next to it.

    Formats: COCO's JSON of one split (`images`, `annotations`; images in val2014/ or train2014/), CLIP_benchmark's
    text of one split (a header, then lines `x.jpg,caption`, not quoted), and Karpathy's JSON of all splits
    (`images` with `split`, `filename`, perhaps `filepath`, and `sentences` with `raw`).

    A few of COCO's images have six or seven captions. All are kept, as in CLIP_benchmark: 25,010 for the 5,000 test
    images; many papers use the first five.

    Raises: UserError for another format, a missing split, an image without a caption or without its file.
    """
    if file.suffix == ".txt":
        captions, subfolders = _captions_in_text(file), FLICKR_FOLDERS
    elif file.name.startswith("dataset_"):
        captions, subfolders = _captions_of_karpathy(file, split), FLICKR_FOLDERS
    else:
        captions, subfolders = _captions_of_coco(file), ("train2014" if split == "train" else "val2014", ".")
    return _captioned(name, file, captions, subfolders)


def _captioned(name: str, file: Path, captions: dict[Any, list[Any]], subfolders: Sequence[str]) -> CaptionedFiles:
    """Builds the set of {path below one of `subfolders`: captions}; `subfolders` are relative to `file`'s folder."""
    if not captions:
        raise UserError(f"{name}: {file} names no images")
    for path, of_image in captions.items():
        _require_texts(file, path, [path, *of_image])
    cleaned = {path: _not_empty(of_image) for path, of_image in captions.items()}
    if uncaptioned := [path for path, of_image in cleaned.items() if not of_image]:
        raise UserError(f"{name}: {file} has no caption for {len(uncaptioned)} images, the first is {uncaptioned[0]!r}")
    folders = [file.parent / subfolder for subfolder in subfolders]
    folder = next((folder for folder in folders if (folder / next(iter(captions))).is_file()), folders[0])
    require_images(str(file), str(folder), list(cleaned))
    return CaptionedFiles(name, folder, tuple(cleaned), tuple(cleaned.values()))


def _require_texts(file: Path, image: Any, texts: Sequence[Any]) -> None:
    """Raises: UserError for a path or caption that is no text."""
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"{str(file)!r}: image {image!r} has {wrong[0]!r} where a text is expected: correct it")


def _captions_of_coco(file: Path) -> dict[Any, list[Any]]:
    """In pycocotools' order: images by id, captions in the order of the file."""
    content = read_json(file, dict)
    try:
        path_of = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[Any, list[Any]] = {path_of[image_id]: [] for image_id in sorted(path_of)}
        for annotation in content["annotations"]:
            captions[path_of[annotation["image_id"]]].append(annotation["caption"])
        for field in ("id", "file_name"):
            _require_each_once(file, [str(image[field]) for image in content["images"]])
    except (KeyError, TypeError, AttributeError) as error:
        raise _malformed(file, "COCO's", "images and annotations", error) from error
    return captions


def _require_each_once(file: Path, paths: Sequence[str]) -> None:
    """Raises: UserError for an image that is named twice: its captions would be those of two images."""
    path, count = Counter(paths).most_common(1)[0] if paths else ("", 0)
    if count > 1:
        raise UserError(f"{str(file)!r} names the image {path!r} {count} times: give each image one entry")


def _captions_of_karpathy(file: Path, split: str) -> dict[Any, list[Any]]:
    content = read_json(file, dict)
    captions: dict[Any, list[Any]] = {}
    splits, paths = set(), []
    try:
        for image in content["images"]:
            splits.add(image["split"])
            if image["split"] == split:
                paths.append(str(Path(image.get("filepath", "")) / image["filename"]))
                captions[paths[-1]] = [sentence["raw"] for sentence in image["sentences"]]
        _require_each_once(file, paths)
    except (KeyError, TypeError, AttributeError) as error:
        raise _malformed(file, "Karpathy's", "images with split, filename and sentences", error) from error
    if split not in splits:
        raise UserError(
            f"{str(file)!r} has no split {split!r}, splits there: {', '.join(sorted(map(str, splits))) or 'none'}"
        )
    return captions


def _captions_in_text(file: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    lines = read_text(file).splitlines()
    if lines and ".jpg," in lines[0]:  # the first line is skipped, as in CLIP_benchmark
        raise UserError(f"{str(file)!r} line 1 is {lines[0]!r}: write a header before it, as image,caption")
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        stem, separator, caption = line.strip().partition(".jpg,")
        if not separator:
            raise UserError(f"{str(file)!r} line {number} is {line.strip()!r}: expected IMAGE.jpg,CAPTION")
        captions.setdefault(f"{stem}.jpg", []).append(caption)
    return captions


def sugar_crepe(task: str, folder: Path) -> CaptionedFiles:
    """Reads one of SugarCrepe's tasks: TASK.json, {"0": {filename, caption, negative_caption}}, and COCO's val2017/.

    The captions of an image are the correct one and the wrong one. An image can occur more than once.

    Source: Hsieh et al. 2023, arXiv 2306.14610, `data/*.json` of its repository.

    Raises: UserError for an unknown task, a missing or malformed file, a missing image.
    """
    name = f"sugar_crepe/{task}"
    if task not in SUGAR_CREPE:
        raise UserError(f"{name} is unknown: tasks are {', '.join(SUGAR_CREPE)}")
    file = folder / f"{task}.json"
    content = read_json(file, dict)
    try:
        rows = [(row["filename"], [row["caption"], row["negative_caption"]]) for row in content.values()]
    except (KeyError, TypeError, AttributeError) as error:
        raise _malformed(file, "SugarCrepe's", "filename, caption and negative_caption", error) from error
    if not rows:
        raise UserError(f"{name}: {file} names no images")
    for path, texts in rows:
        _require_texts(file, path, [path, *texts])
        if not all(map(str.strip, texts)):
            raise UserError(f"{str(file)!r}: image {path!r} has an empty caption: correct it")
    paths, captions = zip(*rows, strict=True)
    require_images(str(file), str(folder / "val2017"), paths)
    return CaptionedFiles(name, folder / "val2017", paths, captions)


def _malformed(file: Path, whose: str, expected: str, error: Exception) -> UserError:
    return UserError(
        f"{str(file)!r} is not in {whose} format: expected {expected} ({type(error).__name__}: {first_line(error)})"
    )
