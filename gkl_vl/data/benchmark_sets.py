"""Evaluation sets in CLIP_benchmark's WebDataset layout: bundled, in a folder, or on the Hub.

    ROOT/{classnames.txt, zeroshot_classification_templates.txt, dataset_type.txt}
    ROOT/SPLIT/{nshards.txt, 0.tar, 1.tar, ...}     members KEY.{webp,png,jpg,jpeg}, KEY.cls and/or KEY.txt

Source of the layout: CLIP_benchmark 1.6.2, `datasets/builder.py::build_wds_dataset`.

A benchmark number is about all images of a set. Training skips a broken image and counts it; here a sample
that cannot be read, or a shard that ends early, is an error.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image

from gkl_vl.errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = ("emoji", "emoji_unseen")
HUB_ROOT = "https://huggingface.co/datasets/clip-benchmark/wds_{dataset_cleaned}/tree/main"
IMAGE_ENDINGS = ("webp", "png", "jpg", "jpeg")
# Sets whose labels number all 1000 classes; imagenet-a, -r and -o number their own 200.
IMAGENET_1000 = ("imagenet1k", "imagenetv2", "imagenet_sketch")

Target = Literal["cls", "txt"]


@dataclass(frozen=True)
class Record:
    """One sample as it lies in its shard: the image still encoded, so that skipping it costs nothing."""

    where: str
    """Shard and key, for messages."""
    image: bytes
    targets: dict[Target, Any]
    """What was asked for: "cls" an integer, "txt" a list of captions."""

    def decode(self) -> Image.Image:
        """The image as RGB, the first frame of an animated one."""
        try:
            return Image.open(io.BytesIO(self.image)).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.where}: the image cannot be decoded ({first_line(error)})") from error


@dataclass(frozen=True)
class BenchmarkSet:
    """One split of an evaluation set; iterating gives (RGB image, label or captions) in the shards' order."""

    name: str
    kind: Literal["classification", "retrieval"]
    classnames: list[str] | None
    """Names by label; None for a retrieval set, or where the folder has none."""
    templates: list[str] | dict[str, list[str]] | None
    """Prompts with {c} for the class name, or CuPL's form {class name: [prompts]}."""
    shards: list[Path]

    def __iter__(self) -> Iterator[tuple[Image.Image, int | list[str]]]:
        target: Target = "cls" if self.kind == "classification" else "txt"
        for record in self.records(target):
            yield record.decode(), record.targets[target]

    def records(self, *targets: Target) -> Iterator[Record]:
        """Undecoded samples with their label ("cls"), their captions ("txt"), or both.

        A classification set may carry captions too (the bundled ones do), so the caller says which.

        Raises:
            UserError: a shard that cannot be read to its end, a sample without image or target, an empty
                caption, a label that is no index of `classnames`, no sample at all.
        """
        found = False
        for shard in self.shards:
            for key, members in _samples(shard):
                found = True
                where = f"{self.name}: {shard} sample {key!r}"
                image = next((members[ending] for ending in IMAGE_ENDINGS if ending in members), None)
                if image is None:
                    raise UserError(f"{where} has no image: expected one of .{', .'.join(IMAGE_ENDINGS)}")
                for target in targets:
                    if target not in members:
                        other = "eval/zero_shot.py" if target == "txt" else "eval/retrieval.py"
                        raise UserError(f"{where} has no .{target} member, this set may be one for {other}")
                yield Record(where, image, {name: self._parse(members[name], name, where) for name in targets})
        if not found:
            raise UserError(f"{self.name}: no samples in its {len(self.shards)} shards")

    def _parse(self, value: bytes, target: Target, where: str) -> int | list[str]:
        text = value.decode("utf-8", errors="replace")
        if target == "txt":
            captions = [line.strip() for line in text.splitlines() if line.strip()]
            if not captions:
                raise UserError(f"{where} has an empty caption file")
            return captions
        if not text.strip().isdecimal():
            raise UserError(f"{where} has the label {text.strip()!r}: expected an integer from 0")
        label = int(text)
        if self.classnames is not None and label >= len(self.classnames):
            classes = len(self.classnames)
            raise UserError(f"{where} has the label {label}: {classes} class names cover 0 to {classes - 1}")
        return label


def load_benchmark_set(name: str, *, root: str | None = None, split: str = "test") -> BenchmarkSet:
    """Find an evaluation set and read everything but its samples.

    Args:
        name: without `root`: a bundled name ("emoji", "emoji_unseen"), a folder in CLIP_benchmark's layout,
            or NAME or wds/NAME for the Hub's clip-benchmark/wds_NAME, "/" in NAME read as "-".
        root: CLIP_benchmark's --dataset_root: the folder of the set, or
            https://huggingface.co/datasets/ORG/REPO/tree/BRANCH. {dataset} stands for NAME, {dataset_cleaned}
            for NAME with "/" replaced by "-".
        split: folder of the shards.

    ImageNet's class names and templates come from open_clip where the set has none. Sets on the Hub are
    downloaded once into its cache and found there without a connection (HF_HUB_OFFLINE=1).

    Raises:
        UserError: unknown name, no connection, no such split, a missing shard, a multilabel set.
    """
    bare = name.removeprefix("wds/")
    folder = _find_folder(bare, root, split)
    kind = (_read(folder / "dataset_type.txt") or "classification").strip().lower()
    if kind not in ("classification", "retrieval"):
        raise UserError(f"{name}: dataset_type.txt says {kind!r}: classification and retrieval are supported")
    classnames = templates = None
    if kind == "classification":
        classnames = _lines(folder / "classnames.txt")
        templates = _lines(folder / "zeroshot_classification_templates.txt")
        if classnames is None and bare in IMAGENET_1000:
            classnames = list(IMAGENET_CLASSNAMES)
        if templates is None and bare.startswith("imagenet"):
            templates = [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
    return BenchmarkSet(bare, kind, classnames, templates, _shards(name, folder, split))


def load_benchmark_sets(names: Sequence[str], *, root: str | None, split: str) -> list[BenchmarkSet]:
    """`load_benchmark_set` for several names.

    Raises:
        UserError: as there; or several names for a root that is one and the same folder for all of them.
    """
    if root is not None and len(names) > 1 and "{dataset" not in root:
        raise UserError(f"--dataset_root {root} is one folder for {len(names)} sets: write {{dataset}} in it")
    return [load_benchmark_set(name, root=root, split=split) for name in names]


def _find_folder(bare: str, root: str | None, split: str) -> Path:
    if root is None and bare in BUNDLED:
        return ASSETS / bare
    if root is None and Path(bare).is_dir():
        return Path(bare)
    # replace(), not format(): other braces in a path mean themselves
    place = (root or HUB_ROOT).replace("{dataset_cleaned}", bare.replace("/", "-")).replace("{dataset}", bare)
    if place.startswith("https://"):
        return _download(bare, place, split)
    if not Path(place).is_dir():
        raise UserError(f"dataset {bare!r}: the folder {place} of --dataset_root does not exist")
    return Path(place)


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
    except Exception as error:  # a handful of unrelated types, of httpx or requests by the Hub's version
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else first_line(error)
        reason, cause = f"{repo} is not in the Hub's local cache and cannot be fetched ({why})", error
    raise UserError(
        f"dataset {bare!r}: {reason}; bundled are {' and '.join(BUNDLED)}, a folder goes to --dataset_root"
    ) from cause


def _shards(name: str, folder: Path, split: str) -> list[Path]:
    count_file = folder / split / "nshards.txt"
    count = _read(count_file)
    if count is None:
        splits = sorted(path.parent.name for path in folder.glob("*/nshards.txt"))
        raise UserError(f"{name}: {count_file} does not exist; splits there: {', '.join(splits) or 'none'}")
    if not count.strip().isdecimal():
        raise UserError(f"{name}: {count_file} says {count.strip()!r}: expected a number of shards")
    shards = [folder / split / f"{index}.tar" for index in range(int(count))]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{name}: the shard {shard} is missing ({count_file} counts {len(shards)})")
    return shards


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members (by lower-case ending) of each sample: neighbours equal up to the first dot."""
    key, members = "", {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                directory, slash, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                # As in webdataset: hidden files, files without an ending and __meta__ ones are no samples.
                if not (member.isfile() and stem and ending) or stem.startswith("__"):
                    continue
                if directory + slash + stem != key:
                    if members:
                        yield key, members
                    key, members = directory + slash + stem, {}
                content = tar.extractfile(member)
                assert content is not None  # it is a file
                members[ending.lower()] = content.read()
            require_end(shard, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"the shard {shard} ends early or is damaged ({first_line(error)})") from error
    if members:
        yield key, members


def require_end(shard: Path, offset: int) -> None:
    # tarfile takes the end of the file, or garbage, for the end of the archive, which is a block of zeros.
    with shard.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no end-of-archive mark at byte {offset}")


def _lines(path: Path) -> list[str] | None:
    text = _read(path)
    return None if text is None else [line.strip() for line in text.splitlines()]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
