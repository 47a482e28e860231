"""Loads evaluation sets by CLIP_benchmark's names: bundled, from the Hub, or from a folder in a layout that it reads.

CLIP_benchmark's WebDataset layout, which the bundled sets and the Hub's clip-benchmark/wds_* use:

    ROOT/{classnames.txt, zeroshot_classification_templates.txt, dataset_type.txt}
    ROOT/SPLIT/{nshards.txt, 0.tar, 1.tar, ...}     members KEY.{webp,png,jpg,jpeg}, KEY.cls, KEY.npy and/or KEY.txt

The layout of a folder without shards is detected from its files: captions (COCO, Flickr), SugarCrepe, ObjectNet,
ImageNet's class folders, CIFAR's own files, parquet, or an image folder.

A benchmark score covers the whole set. Training skips and counts samples that cannot be read; here a sample without
image or target, or a truncated shard, is an error. Only images that do not decode may be left out, up to
`Embedder.max_broken`.
"""

import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from gkl_vl.data.classes import are_numbers, keys_of, match_classes, named_by_key, named_by_list
from gkl_vl.data.identity import add_image
from gkl_vl.data.images import DECODE_RULES
from gkl_vl.data.labelled import LabelledSet, open_cifar, open_labelled
from gkl_vl.data.prompts import CIFAR_TEMPLATES, IMAGENET_TEMPLATES, TEMPLATES_FILE, Templates, is_texts, require_places
from gkl_vl.errors import UserError, first_line, refuse_full_disk
from gkl_vl.evaluation.set_collections import COLLECTIONS
from gkl_vl.evaluation.sources import (
    IMAGENET,
    LabelledSamples,
    Record,
    Samples,
    Target,
    WebShards,
    captioned_files,
    captions_file,
    imagenet_classes,
    imagenet_folders,
    objectnet_folders,
    objectnet_mappings,
    sugar_crepe,
)
from gkl_vl.reading import read_json, read_lines, read_text

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = ("emoji", "emoji_unseen")
HUB_ROOT = "https://huggingface.co/datasets/clip-benchmark/wds_{dataset_cleaned}/tree/main"
HUB_DATASET = "hf-hub:"

Kind = Literal["classification", "multilabel", "retrieval", "choice"]
TARGET_OF: dict[Kind, Target] = {"classification": "cls", "multilabel": "npy", "retrieval": "txt", "choice": "txt"}

RELEASES = {
    **{"imagenet1k": 50_000, "imagenetv2": 10_000, "imagenet_sketch": 50_889, "objectnet": 18_574},
    **{"imagenet-a": 7500, "imagenet-r": 30_000, "imagenet-o": 2000, "cifar10": 10_000, "cifar100": 10_000},
    **{"mscoco_captions": 5000, "flickr30k": 1000, "flickr8k": 1000},
}
"""Images of published test sets; a result on another number says so. Sets whose layout their name determines."""
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


@dataclass(frozen=True)
class BenchmarkSet:
    """One split of an evaluation set. Iterating yields (RGB image, label, 0/1 row or captions) in the set's order."""

    name: str
    kind: Kind
    classnames: list[str] | None
    """Names by label; None for captions, or if the set has no names."""
    templates: Templates | None
    """Prompts with {c} for the class name, or {class name: [prompts]} as in CuPL; None if the set has none."""
    samples: Samples
    classes: tuple[str, ...] | None = None
    """The classes as the data name them, by label: folders, or those of a table; they may be numbers. Sets are matched
    by these (`in_order_of`). None = `classnames`."""
    release: int | None = None
    """Number of images in the published release of the set; None if unknown."""

    def __iter__(self) -> Iterator[tuple[Image.Image, int | list[int] | list[str]]]:
        target = TARGET_OF[self.kind]
        for record in self.records(target):
            yield record.decode(), record.targets[target]

    def records(self, *targets: Target) -> Iterator[Record]:
        """Yields the samples with their label ("cls"), 0/1 row ("npy") or captions ("txt"); images are read lazily.

        A classification set may have captions too (the bundled ones do), so the caller names the targets. The captions
        of a "choice" are the correct one, then the wrong ones.

        Raises:
            UserError: a shard that cannot be read to its end, a sample without image or target, an empty
                caption, a label that is no index of `classnames`, a row of another length, an empty set.
        """
        for record in self.samples(targets):
            self._check_classes(record)
            yield record

    @property
    def class_names(self) -> Sequence[str] | None:
        """A name for each class, for tables: `classnames`, else `classes`."""
        return self.classnames or self.classes

    def in_order_of(self, other: "BenchmarkSet") -> "BenchmarkSet":
        """This set with the labels of another: its classes are matched by name, and it may lack some.

        Labels stay as they are where neither set, or only one of them, has names.

        Raises: UserError for a class that the other lacks, and for several labels by image in another order.
        """
        own, reference = (dataset.classes or dataset.classnames for dataset in (self, other))
        if not own or not reference:
            return self
        places = match_classes(own, reference, whose=self.name, others=f"the other split ({other.name})")
        if places == list(range(len(reference))):
            return self
        if self.kind == "multilabel":
            raise UserError(f"{self.name}: the classes of its rows are not those of {other.name} in their order")
        samples = _Relabelled(self.samples, tuple(places))
        return replace(self, samples=samples, classnames=other.classnames, classes=other.classes)

    def identity(self, *targets: Target) -> str:
        """A hash of everything that decides a result on this set: kind, class names and their order, templates, the
        targets of all samples, and the images (`data/identity.py`), for the keys of stored results.

        Raises: UserError as `records`.
        """
        settings = (self.kind, self.classnames, self.classes, self.templates)
        digest = hashlib.sha256(f"{DECODE_RULES} {settings}".encode())
        for record in self.records(*targets):
            digest.update(repr(record.targets).encode())
            add_image(digest, record.read)
        return digest.hexdigest()

    def _check_classes(self, record: Record) -> None:
        if self.classnames is None:
            return
        classes = len(self.classnames)
        if "cls" in record.targets and record.targets["cls"] >= classes:
            label = record.targets["cls"]
            raise UserError(f"{record.where} has the label {label}: {classes} class names cover 0 to {classes - 1}")
        if "npy" in record.targets and len(record.targets["npy"]) != classes:
            numbers = len(record.targets["npy"])
            raise UserError(f"{record.where} has {numbers} numbers in its .npy member for {classes} class names")


@dataclass(frozen=True)
class _Relabelled:
    """Samples with other labels."""

    samples: Samples
    labels: tuple[int, ...]
    """The new label by the old one."""

    def __call__(self, targets: Sequence[Target]) -> Iterator[Record]:
        for record in self.samples(targets):
            if "cls" in record.targets:
                record = replace(record, targets=record.targets | {"cls": self.labels[record.targets["cls"]]})
            yield record


@dataclass(frozen=True)
class _EveryOther:
    """Every other sample, from position 0 or 1."""

    samples: Samples
    first: int

    def __call__(self, targets: Sequence[Target]) -> Iterator[Record]:
        return islice(self.samples(targets), self.first, None, 2)


def half_of(dataset: BenchmarkSet, half: int) -> BenchmarkSet:
    """Every other sample of a set, from position 0 or 1, with all its classes."""
    name = f"{dataset.name}, {('even', 'odd')[half]}"
    return replace(dataset, name=name, samples=_EveryOther(dataset.samples, half), release=None)


def load_benchmark_set(
    name: str,
    *,
    root: str | None = None,
    split: str = "test",
    classname_file: str | None = None,
    template_file: str | None = None,
) -> BenchmarkSet:
    """Locates an evaluation set and reads its class names and templates. Samples are read on iteration.

    Args:
        name: without `root`: a bundled name ("emoji", "emoji_unseen"), a folder, or NAME or wds/NAME for the Hub's
            clip-benchmark/wds_NAME, with "/" in NAME replaced by "-". "hf-hub:ORG/NAME" names the images and labels
            of any other dataset on the Hub and ignores `root`.
        root: CLIP_benchmark's --dataset_root: the folder of the set, or
            https://huggingface.co/datasets/ORG/REPO/tree/BRANCH. {dataset} is replaced by NAME, {dataset_cleaned}
            by NAME with "/" replaced by "-". The last part of NAME selects the layout where files alone are ambiguous:
            imagenet1k, imagenetv2, imagenet_sketch, imagenet-a, imagenet-r, imagenet-o, cifar10, cifar100,
            mscoco_captions, flickr30k, flickr8k; and sugar_crepe/TASK.
        split: name of the split in the folder or on the Hub.
        classname_file: CLIP_benchmark's JSON of {set: [class names]}, which replace the set's own: `named_by_list` in
            data/classes.py says which class gets which name. Or {set: {class: name}}, by the set's own names, its
            folders, or WordNet ids.
        template_file: JSON of {set: [prompts with {c}]} or {set: {class: [prompts]}}; the key "imagenet1k" applies to
            sets without a key. Of {class: [prompts]} the set's classes are used, others ignored.

    Default class names: open_clip's for ImageNet's family. Class names of folders and of the Hub have "_" replaced by a
    space; if they are numbers, the set has no names. Default templates: CIFAR's 18 for CIFAR, ImageNet's 80 for all
    others except shards, whose folder should hold them. Sets on the Hub are downloaded once into its cache and read
    from there without a connection (HF_HUB_OFFLINE=1).

    Raises:
        UserError: unknown name, no connection, no such split, a missing shard or image, malformed annotations, names
            or templates; a wrong number of class names.
    """
    bare = name.removeprefix("wds/")
    if bare.startswith(HUB_DATASET):
        layout = _labelled_layout(open_labelled(bare.removeprefix(HUB_DATASET), split))
    else:
        layout = _detect_layout(bare, _find_folder(bare, root, split), split)
    if layout.kind in ("retrieval", "choice"):
        release = RELEASES.get(Path(bare).name) if split == "test" else None
        return BenchmarkSet(bare, layout.kind, None, None, layout.samples, release=release)
    classnames = _own_classnames(bare, layout)
    if classname_file is not None:
        classnames = _custom_classnames(name, classname_file, layout.classes or tuple(classnames or ()))
    elif classnames and all(re.fullmatch(r"n\d{8}", classname) for classname in classnames):
        raise UserError(
            f"dataset {bare!r}: its class names are WordNet ids ({classnames[0]}, ...): for ImageNet's class names "
            "call it imagenet1k, imagenet-a, ..., and give its folder as --dataset_root"
        )
    templates = _own_templates(bare, layout) if template_file is None else _custom_templates(name, template_file)
    release = RELEASES.get(Path(bare).name) if split == "test" else None
    return BenchmarkSet(bare, layout.kind, classnames, templates, layout.samples, layout.classes, release)


def load_benchmark_sets(
    names: Sequence[str],
    *,
    root: str | None,
    split: str,
    classname_file: str | None = None,
    template_file: str | None = None,
) -> list[BenchmarkSet]:
    """`load_benchmark_set` for several names.

    Raises:
        UserError: as `load_benchmark_set`; several names for a root without a placeholder, unless one folder can hold
            all of them (CIFAR's own files, SugarCrepe's tasks).
    """
    if root is not None and len(names) > 1 and "{dataset" not in root and not _one_folder_holds(names, root):
        raise UserError(f"--dataset_root {root} is one folder for {len(names)} sets: write {{dataset}} in it")
    return [
        load_benchmark_set(name, root=root, split=split, classname_file=classname_file, template_file=template_file)
        for name in names
    ]


def _one_folder_holds(names: Sequence[str], root: str) -> bool:
    bare = [name.removeprefix("wds/") for name in names]
    distinct_files = all(name in CIFAR_FOLDERS or name.startswith("sugar_crepe/") for name in bare)
    return distinct_files and not any(Path(root).glob("*/nshards.txt"))


# ---- layouts of folders ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """What the files of a set contain: kind, samples, and class names and templates if present."""

    kind: Kind
    samples: Samples
    classnames: list[str] | None = None
    templates: list[str] | None = None
    classes: tuple[str, ...] | None = None
    """As of `BenchmarkSet`."""


def _detect_layout(bare: str, folder: Path, split: str) -> _Layout:
    short = Path(bare).name
    if any(folder.glob("*/nshards.txt")) or any((folder / split).glob("*.tar")):
        return _shard_layout(bare, folder, split)
    if bare.startswith("sugar_crepe/"):
        return _Layout("choice", sugar_crepe(short, folder))
    if file := captions_file(short, folder, split):
        return _Layout("retrieval", captioned_files(bare, file, split))
    if mappings := objectnet_mappings(folder):
        return _labelled_layout(objectnet_folders(folder, mappings))
    if short in CIFAR_FOLDERS and any((folder / files).is_dir() for files in CIFAR_FOLDERS.values()):
        return _labelled_layout(open_cifar(str(folder), split, CIFAR_FOLDERS[short]))
    if short in IMAGENET and not any(folder.glob("*.parquet")) and not any(folder.glob("*/*.parquet")):
        return _labelled_layout(imagenet_folders(short, folder, split))
    if not any(folder.glob("*/*")) and not any(folder.glob("*.parquet")):
        layouts = f"shards ({split}/nshards.txt), an image folder ({split}/CLASS/*.jpg), parquet, or CIFAR's own files"
        raise UserError(f"dataset {bare!r}: {folder} holds none of {layouts}")
    return _labelled_layout(open_labelled(str(folder), split))


def _labelled_layout(data: LabelledSet) -> _Layout:
    names = None
    if data.classnames is not None and not are_numbers(data.classnames):
        names = [name.replace("_", " ") for name in data.classnames]
    return _Layout("classification", LabelledSamples(data), names, classes=data.classnames)


def _shard_layout(bare: str, folder: Path, split: str) -> _Layout:
    dataset_type = (_read(folder / "dataset_type.txt") or "classification").strip().lower()
    kind: Kind | None = next(
        (known for known in ("classification", "multilabel", "retrieval") if known == dataset_type), None
    )
    if kind is None:
        expected = "classification, multilabel and retrieval are supported"
        raise UserError(f"{bare}: dataset_type.txt contains {dataset_type!r}: {expected}")
    samples = WebShards(bare, _shards(bare, folder, split))
    classnames, templates = folder / "classnames.txt", folder / TEMPLATES_FILE
    return _Layout(
        kind,
        samples,
        read_lines(classnames) if classnames.is_file() else None,
        read_lines(templates) if templates.is_file() else None,
    )


# ---- class names and templates -----------------------------------------------------------------------------------


def _own_classnames(bare: str, layout: _Layout) -> list[str] | None:
    short = Path(bare).name
    if layout.classnames is None and short in IMAGENET:
        return list(imagenet_classes(short).values())
    return layout.classnames


def _own_templates(bare: str, layout: _Layout) -> Templates | None:
    short = Path(bare).name
    if layout.templates is not None:
        return layout.templates
    if short in CIFAR_FOLDERS:
        return list(CIFAR_TEMPLATES)
    if short.startswith("imagenet") or not isinstance(layout.samples, WebShards):
        return list(IMAGENET_TEMPLATES)
    return None


def _custom_classnames(name: str, file: str, own: tuple[str, ...]) -> list[str]:
    """The names of a file for the classes `own`, () if the set has no names of its own."""
    names_of = read_json(Path(file), dict)
    key = next((key for key in _keys(name) if key in names_of), None)
    if key is None:
        raise UserError(f"{file!r} has no class names for {name!r}: sets in it are {', '.join(names_of) or 'none'}")
    names: Any = names_of[key]
    if not is_texts(list(names.values()) if isinstance(names, dict) else names):
        raise UserError(f"{file!r}: the class names of {key!r} must be a list of strings, or {{class: name}}")
    if isinstance(names, dict):
        return _named_by_key(Path(name).name, own, names, where=f"{file!r}, {key!r},")
    return named_by_list(own, names, where=repr(file), whose=repr(key)) if own else names


def _named_by_key(short: str, own: tuple[str, ...], names: dict[str, str], *, where: str) -> list[str]:
    if not own:  # shards without names: the labels are the classes
        own = tuple(map(str, range(len(names))))
    if short in IMAGENET:
        ids = tuple(imagenet_classes(short))
        if len(ids) == len(own) and None not in keys_of(ids, names):
            own = ids
    return named_by_key(own, names, where=where)


def _custom_templates(name: str, file: str) -> Templates:
    templates_of = read_json(Path(file), dict)
    key = next((key for key in (*_keys(name), "imagenet1k") if key in templates_of), None)
    if key is None:
        sets = ", ".join(templates_of)
        raise UserError(f"{file!r} has no templates for {name!r} or imagenet1k: sets in it are {sets}")
    templates = templates_of[key]
    if isinstance(templates, dict) and all(is_texts(prompts) for prompts in templates.values()):
        return templates
    if not is_texts(templates):
        raise UserError(f"{file!r}: the templates of {key!r} must be a list of strings, or one for each class name")
    require_places(f"{file!r}, {key!r}", list(templates))
    return templates


def _keys(name: str) -> list[str]:
    """Keys of a set in these files: for `wds/vtab/pets` also CLIP_benchmark's own name `pets`."""
    bare = name.removeprefix("wds/")
    return [name, bare, bare.removeprefix("vtab/")]


# ---- folders and downloads ---------------------------------------------------------------------------------------


def _find_folder(bare: str, root: str | None, split: str) -> Path:
    if root is None and bare in BUNDLED:
        return ASSETS / bare
    if root is None and Path(bare).is_dir():
        return Path(bare)
    if root is None and bare.startswith("sugar_crepe/"):
        task = bare.removeprefix("sugar_crepe/")
        raise UserError(f"{bare}: give the folder of {task}.json and COCO's val2017/ as --dataset_root")
    # replace(), not format(): other braces in a path are literal
    path = (root or HUB_ROOT).replace("{dataset_cleaned}", bare.replace("/", "-")).replace("{dataset}", bare)
    if path.startswith("https://"):
        return _download(bare, path, split)
    folder = Path(path)
    if not folder.is_dir() and bare.startswith("sugar_crepe/") and folder.parent.is_dir():
        folder = folder.parent  # ROOT/{dataset}: all tasks share one folder
    if not folder.is_dir():
        raise UserError(f"dataset {bare!r}: the folder {path} of --dataset_root does not exist")
    return folder


def _download(bare: str, url: str, split: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    parts = url.removeprefix("https://").split("/")
    if parts[:2] != ["huggingface.co", "datasets"] or len(parts) != 6 or parts[4] != "tree":
        expected = "https://huggingface.co/datasets/ORG/REPO/tree/BRANCH"
        raise UserError(f"--dataset_root {url}: expected a folder or {expected}")
    repo, branch = f"{parts[2]}/{parts[3]}", parts[5]
    try:
        patterns = ["*.txt", f"{split}/*"]
        return Path(snapshot_download(repo, repo_type="dataset", revision=branch, allow_patterns=patterns))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        reason, cause = f"the Hub has no {repo} (branch {branch}), or you have no access", error
    except Exception as error:  # unrelated types, from httpx or requests depending on the Hub library's version
        refuse_full_disk(error)
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else first_line(error)
        reason, cause = f"{repo} is not in the Hub's local cache and cannot be fetched ({why})", error
    bundled = f"bundled are {' and '.join(BUNDLED)}; for a folder use --dataset_root"
    raise UserError(f"dataset {bare!r}: {reason}{_nearest(bare)}; {bundled}") from cause


def _nearest(bare: str) -> str:
    known = {entry.dataset for entries in COLLECTIONS.values() for entry in entries}
    near = [] if bare in known else difflib.get_close_matches(bare, sorted(known), n=3)
    return f"; similar names are {', '.join(near)}" if near else ""


def _shards(name: str, folder: Path, split: str) -> list[Path]:
    count_file = folder / split / "nshards.txt"
    count = _read(count_file)
    if count is None:
        splits = sorted(path.parent.name for path in folder.glob("*/nshards.txt"))
        raise UserError(f"{name}: {count_file} does not exist; splits there: {', '.join(splits) or 'none'}")
    if not count.strip().isdecimal():
        raise UserError(f"{name}: {count_file} contains {count.strip()!r}: expected a number of shards")
    shards = [folder / split / f"{index}.tar" for index in range(int(count))]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{name}: the shard {shard} is missing ({count_file} counts {len(shards)})")
    if (following := folder / split / f"{len(shards)}.tar").is_file():
        raise UserError(f"{name}: {count_file} counts {len(shards)} shards, but {following} exists: correct one")
    return shards


def _read(path: Path) -> str | None:
    return read_text(path) if path.is_file() else None
