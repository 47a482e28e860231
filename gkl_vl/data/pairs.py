"""Sources of image-text pairs for training: web shards, Hub datasets, parquet, CSV, or the bundled emoji.

`open_images` opens images without captions, for training on a teacher's outputs.

A source yields one epoch of undecoded pairs for one part of many (a part = one worker of one rank). Their order is a
pure function of (seed, epoch, part, parts), so that `pair_stream.py` can resume at any pair without decoding the
earlier ones.
"""

import csv
import json
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from gkl_vl.data.classes import are_numbers
from gkl_vl.data.files import (
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    LABEL_COLUMNS,
    encoded_image,
    hub_table,
    is_local,
    need_columns,
    undecoded,
    usual_column,
)
from gkl_vl.errors import UserError

SHUFFLE_BUFFER = 2000
"""Size of the buffer in which the pairs of shards are shuffled."""
BUNDLED = Path(__file__).parents[1] / "assets" / "emoji"
"""Folder of the bundled emoji."""


@dataclass(frozen=True, slots=True)
class RawPair:
    """One image with its captions, not decoded."""

    key: str
    image: Any  # encoded bytes, a path, or a PIL image
    captions: tuple[str, ...]
    row: int = -1  # index in a set that is kept in memory, for stored teacher embeddings


@dataclass(frozen=True)
class Source:
    """Pairs, read epoch by epoch in disjoint parts."""

    name: str
    num_pairs: int | None
    """Pairs in one epoch; None if unknown, for shards without sizes."""
    num_parts: int | None
    """Largest number of parts it can be split into; None = no limit."""
    epoch: Callable[[int, int, int, int], Iterator[RawPair]]
    """(seed, epoch, part, parts) -> the pairs of that part, shuffled; parts are disjoint."""
    captioned: bool = True
    """False = captions are not read, and batches have no text."""
    classnames: tuple[str, ...] | None = None
    """Names of the classes that images without captions are sorted into; None if the source has none."""

    @property
    def things(self) -> str:
        """Noun for the elements, for messages."""
        return "pairs" if self.captioned else "images"


def open_source(train_data: str | None, *, columns: tuple[str, str] | None = None) -> Source:
    """Opens the source that `--train-data` names.

    None = the bundled emoji. `a-{000..9}.tar::b.tar` = web shards. `x.csv`, `x.tsv` = a table with columns `filepath`
    and `title`. `x.parquet`, a folder of parquet files, or a Hub dataset id (`org/name` or `org/name:split`) = a table
    with columns `image` and `caption`. `columns` replaces these two names.

    Raises: UserError for a source that does not exist.
    """
    if train_data is None:
        pairs = bundled_pairs()
        return memory_source("emoji", pairs)
    if ".tar" in train_data:
        return shard_source(train_data)
    if train_data.endswith((".csv", ".tsv")):
        return memory_source(train_data, read_csv(train_data, *(columns or ("filepath", "title"))))
    image_column, caption_column = columns or ("image", "caption")
    return table_source(train_data, read_table(train_data, flag="--train-data"), image_column, caption_column)


def open_images(data: str | None, *, column: str | None = None) -> Source:
    """Opens the images that `--train-data` names. Their captions and labels are not read.

    None = the training drawings of the bundled emoji. Shards, tables and Hub datasets are named as for
    `open_source`; the image column is `filepath` in CSV, elsewhere `img` or `image`; `column` is another. A folder
    without parquet = the images in it at any depth.

    Class names come from a table's ClassLabel, or from the folders if all images are in FOLDER/CLASS/; "_" becomes a
    space.

    Raises: UserError for a source that does not exist.
    """
    if data is None:
        names = tuple((BUNDLED / "classnames.txt").read_text(encoding="utf-8").splitlines())
        return _uncaptioned(memory_source("emoji", bundled_pairs()), names)
    if ".tar" in data:
        return _uncaptioned(shard_source(data), None)
    if data.endswith((".csv", ".tsv")):
        return _uncaptioned(memory_source(data, read_csv(data, column or "filepath", None)), None)
    if Path(data).is_dir() and not any(Path(data).rglob("*.parquet")):
        pairs = image_files(data)
        return _uncaptioned(memory_source(data, pairs), _class_folders(pairs))
    table = read_table(data, flag="--train-data")
    column = column or usual_column(IMAGE_COLUMNS, table.column_names)
    return _uncaptioned(table_source(data, table, column, None), _class_labels(table))


def _uncaptioned(source: Source, classnames: tuple[str, ...] | None) -> Source:
    return replace(source, captioned=False, classnames=classnames)


def image_files(folder: str) -> list[RawPair]:
    """The images of a folder at any depth, sorted by path. Raises: UserError if it has none."""
    files = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.suffix[1:].lower() in IMAGE_SUFFIXES)
    pairs = [RawPair(file.as_posix(), str(Path(folder) / file), ()) for file in sorted(files)]
    if not pairs:
        raise UserError(
            f"{folder!r} holds no image ({', '.join(IMAGE_SUFFIXES)}) and no parquet file (shards are written as "
            f"{folder}/{{0000..9999}}.tar)"
        )
    return pairs


def _class_folders(pairs: Sequence[RawPair]) -> tuple[str, ...] | None:
    """Class names by folder; None where the folders are no classes (a single one, or images at another depth), or are
    numbers, which name nothing."""
    folders = sorted({pair.key.rpartition("/")[0] for pair in pairs})
    if len(folders) < 2 or not all(folder and "/" not in folder for folder in folders) or are_numbers(folders):
        return None
    return tuple(folder.replace("_", " ") for folder in folders)


def _class_labels(table: Any) -> tuple[str, ...] | None:
    """Class names of a `datasets.Dataset`; None if it has no ClassLabel, or one of numbers."""
    import datasets

    labels = {name: feature for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)}
    column = next((name for name in (*LABEL_COLUMNS, *labels) if name in labels), None)
    if column is None or are_numbers(labels[column].names):
        return None
    return tuple(name.replace("_", " ") for name in labels[column].names)


def bundled_pairs() -> list[RawPair]:
    """The training split of the bundled emoji, in memory (7 MB encoded)."""
    pairs = [pair for shard in sorted((BUNDLED / "train").glob("*.tar")) for pair in read_shard(str(shard))]
    return [RawPair(p.key, p.image, p.captions, row) for row, p in enumerate(pairs)]


def memory_source(name: str, pairs: Sequence[RawPair]) -> Source:
    """Pairs in a list: each epoch is a new permutation, of which each part takes every parts-th pair."""

    def epoch(seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        order = list(range(len(pairs)))
        random.Random(f"{seed}/{number}").shuffle(order)
        return (pairs[index] for index in order[part::parts])

    return Source(name, len(pairs), None, epoch)


def read_csv(path: str, image_column: str, caption_column: str | None) -> list[RawPair]:
    """Reads a CSV or TSV file with a header; image paths are absolute or relative to the file."""
    if not Path(path).is_file():
        raise UserError(f"the table {path!r} does not exist")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ",")
        header = reader.fieldnames or []
        # open_clip writes tab-separated .csv files: one column whose name holds tabs.
        if len(header) == 1 and "\t" in header[0]:
            file.seek(0)
            reader = csv.DictReader(file, delimiter="\t")
            header = reader.fieldnames or []
        need_columns(path, list(header), image_column, caption_column)
        rows = list(reader)
    root = Path(path).parent
    return [
        RawPair(r[image_column], str(root / r[image_column]), (r[caption_column] or "",) if caption_column else ())
        for r in rows
    ]


def read_table(name: str, *, flag: str) -> Any:
    """Opens a parquet file, a folder of them, or a dataset on the Hub, memory-mapped: a `datasets.Dataset`.

    Raises: UserError if it does not exist; the message names the command-line `flag`.
    """
    import datasets

    path, _, split = name.partition(":")
    if path.endswith(".parquet") or Path(path).is_dir():
        files = sorted(str(f) for f in ([Path(path)] if path.endswith(".parquet") else Path(path).rglob("*.parquet")))
        if not files or not Path(files[0]).is_file():
            raise UserError(f"{flag} {path!r} holds no parquet file (shards are written as {path}/{{0000..9999}}.tar)")
        return datasets.load_dataset("parquet", data_files=files, split="train")
    hint = "shards end in .tar, tables in .csv, .tsv or .parquet"
    return hub_table(path, split or "train", subject=f"{flag} {name!r}", hint=hint)


def table_source(name: str, table: Any, image_column: str, caption_column: str | None) -> Source:
    """The pairs of a `datasets.Dataset`; without a caption column, its images."""
    need_columns(name, table.column_names, image_column, caption_column)
    table = table.select_columns([image_column] + ([caption_column] if caption_column else []))
    table = undecoded(table, image_column)

    def pair(index: int) -> RawPair:
        row = table[index]
        image, captions = row[image_column], row[caption_column] if caption_column else ()
        captions = (captions,) if isinstance(captions, str) else tuple(captions or ())
        return RawPair(f"{name}:{index}", encoded_image(image), captions)

    def epoch(seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        order = list(range(len(table)))
        random.Random(f"{seed}/{number}").shuffle(order)
        return (pair(index) for index in order[part::parts])

    return Source(name, len(table), None, epoch)


def shard_source(spec: str) -> Source:
    """WebDataset shards: `::` separates sources, braces expand. A part reads its own shards, shuffled in a buffer."""
    urls = [url for part in spec.split("::") for url in expand_urls(part)]
    missing = [url for url in urls if is_local(url) and not Path(url).is_file()]
    if missing:
        raise UserError(f"shard {missing[0]!r} does not exist ({len(missing)} of {len(urls)} are missing)")

    def epoch(seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        rng = random.Random(f"{seed}/{number}")
        shards = list(urls)
        rng.shuffle(shards)
        pairs = (pair for url in shards[part::parts] for pair in read_shard(url))
        return _shuffled(pairs, random.Random(f"{seed}/{number}/{part}"))

    return Source(spec, _num_pairs_in(urls), len(urls), epoch)


def _num_pairs_in(urls: list[str]) -> int | None:
    """Total from `sizes.json` or `__len__` beside the shards; None if a shard is not counted in either."""
    total = 0
    for folder in dict.fromkeys(str(Path(url).parent) for url in urls):
        names = [Path(url).name for url in urls if str(Path(url).parent) == folder]
        sizes, length = Path(folder) / "sizes.json", Path(folder) / "__len__"
        if sizes.is_file():
            table = json.loads(sizes.read_text())
            if any(name not in table for name in names):
                return None
            total += sum(int(table[name]) for name in names)
        elif length.is_file():
            total += int(length.read_text())
        else:
            return None
    return total


def read_shard(url: str) -> Iterator[RawPair]:
    """Reads the pairs of one tar file.

    Members are KEY.<one of IMAGE_SUFFIXES> and KEY.txt (one caption per line) or KEY.json (`caption`).

    Raises: UserError for a file that cannot be read to its end.
    """
    try:
        stream: Any = gopen(url)  # a file or webdataset's Pipe
        with stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            members: dict[str, bytes] = {}
            current = None
            for info in tar:
                if not info.isfile():
                    continue
                folder, _, base = info.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key != current:
                    if current is not None and (pair := _pair_of(current, members)):
                        yield pair
                    current, members = key, {}
                body = tar.extractfile(info)
                assert body is not None  # isfile() holds
                members[suffix.lower()] = body.read()
            if current is not None and (pair := _pair_of(current, members)):
                yield pair
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"shard {url!r} cannot be read to its end ({error}): fetch it again or leave it out") from error


def _pair_of(key: str, members: dict[str, bytes]) -> RawPair | None:
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if image is None and "txt" not in members and "json" not in members:
        return None  # another kind of file, not a sample
    return RawPair(key, image, _captions_of(members))


def _captions_of(members: dict[str, bytes]) -> tuple[str, ...]:
    try:
        if "txt" in members:
            return tuple(members["txt"].decode("utf-8").splitlines())
        caption = json.loads(members.get("json", b"{}")).get("caption") or ""
        return (caption,) if isinstance(caption, str) else tuple(caption)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return ()  # `PairStream` counts the pair as broken


def _shuffled(pairs: Iterator[RawPair], rng: random.Random) -> Iterator[RawPair]:
    """Yields the pairs in an order that is random within a buffer of SHUFFLE_BUFFER pairs."""
    buffer: list[RawPair] = []
    for pair in pairs:
        buffer.append(pair)
        if len(buffer) >= SHUFFLE_BUFFER:
            index = rng.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer
