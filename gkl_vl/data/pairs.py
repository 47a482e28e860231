"""Sources of image-text pairs for training: web shards, tables, folders, Hub datasets, or the bundled emoji.

`open_images` opens images without captions, for training on a teacher's outputs. What happens to odd inputs is one set
of rules for all sources: docs/data.md.

A source yields one epoch of undecoded pairs for one part of many (a part = one worker of one rank). Their order is a
pure function of (seed, epoch, part, parts), so that `pair_stream.py` can resume at any pair without decoding the
earlier ones. A source can be pickled, for worker processes.
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from gkl_vl.data.captions import CaptionRule, captions_in
from gkl_vl.data.classes import are_numbers
from gkl_vl.data.files import (
    IMAGE_SUFFIXES,
    endings_text,
    image_paths,
    is_local,
    note_others,
    subfolders,
    training_split,
)
from gkl_vl.data.images import BrokenSample
from gkl_vl.data.shards import (
    Sample,
    checked_shards,
    is_shards,
    list_shards,
    read_samples,
    shard_sizes,
    shards_below,
    total_size,
)
from gkl_vl.data.shards import split_of as shard_split
from gkl_vl.data.tables import (
    IMAGE_COLUMNS,
    ParquetRows,
    Rows,
    class_labels,
    files_of_split,
    hub_rows,
    image_of,
    parquet_files,
    require_image_column,
    require_text_column,
    split_of,
    usual_column,
)
from gkl_vl.data.text_tables import ENDINGS as TEXT_TABLES
from gkl_vl.data.text_tables import Row, read_csv, read_jsonl
from gkl_vl.errors import UserError

SHUFFLE_BUFFER = 2000
"""Size of the buffer in which the pairs of shards and of parquet are shuffled."""
BUNDLED = Path(__file__).parents[1] / "assets" / "emoji"
"""Folder of the bundled emoji."""
EVEN = 1.05
"""Largest ratio of the sizes of two parts that is not reported."""


@dataclass(frozen=True, slots=True)
class RawPair:
    """One image with its captions, not decoded."""

    key: str
    image: Any  # encoded bytes, a path, or a PIL image
    captions: tuple[str, ...]
    row: int = -1  # index in a set that is kept in memory, for stored teacher embeddings
    problem: str = ""
    """Why the pair is broken, found while reading it; "" = not known to be."""


Epoch = Callable[[int, int, int, int], Iterator[RawPair]]
"""(seed, epoch, part, parts) -> the pairs of that part, shuffled; parts are disjoint."""


@dataclass(frozen=True)
class Source:
    """Pairs, read epoch by epoch in disjoint parts."""

    name: str
    num_pairs: int | None
    """Pairs in one epoch; None if unknown, for shards without sizes."""
    num_parts: int | None
    """Largest number of parts it can be split into; None = no limit."""
    epoch: Epoch
    captioned: bool = True
    """False = captions are not read, and batches have no text."""
    classnames: tuple[str, ...] | None = None
    """Names of the classes that images without captions are sorted into; None if the source has none."""
    note: Callable[[int], str | None] = lambda parts: None
    """What a user should know about a split into so many parts; None = nothing. Not sent to workers."""

    @property
    def things(self) -> str:
        """Noun for the elements, for messages."""
        return "pairs" if self.captioned else "images"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"note": None}


def open_source(
    train_data: str | None,
    *,
    columns: tuple[str, str] | None = None,
    caption_lines: bool = False,
    quoted: bool | None = None,
) -> Source:
    """Opens the pairs that `--train-data` names. None = the bundled emoji.

        a-{000..9}.tar::b.tar, 'a-*.tar'    web shards, members KEY.jpg and KEY.txt or KEY.json (`caption`)
        x.csv, x.tsv                        a table with columns `filepath` and `title`
        x.jsonl, x.parquet, 'x-*.parquet'   tables with fields `image` and `caption`
        FOLDER, FOLDER:SPLIT                its shards, else its parquet, else images x.jpg with x.txt or x.json
        org/name, org/name:SPLIT            a dataset on the Hub

    Args:
        columns: image and caption. In tables, two columns; in shards and folders, the ending of the image, and the
            ending or JSON field of the captions. `a.b` = field b of the struct, or of each struct of the list, in a.
        caption_lines: a text file holds one caption per line; False = it is one caption.
        quoted: of CSV and TSV, see `read_csv`.

    Raises: UserError for a source that does not exist or cannot be read.
    """
    if train_data is None:
        return memory_source("emoji", bundled_pairs())
    image, caption = columns or (None, None)
    return _open(train_data, image, CaptionRule(caption, lines=caption_lines), quoted=quoted)


def open_images(data: str | None, *, column: str | None = None, quoted: bool | None = None) -> Source:
    """Opens the images that `--train-data` names, as for `open_source`. Their captions and labels are not read.

    None = the training drawings of the bundled emoji. The image column is `filepath` in CSV, elsewhere `img` or
    `image`; `column` is another, or of shards an ending. A folder may hold images alone, at any depth.

    Class names come from a table's ClassLabel, or from the folders if all images are in FOLDER/CLASS/; "_" becomes a
    space. Folders whose names are all numbers are no class names.

    Raises: UserError for a source that does not exist or cannot be read.
    """
    if data is None:
        names = tuple((BUNDLED / "classnames.txt").read_text(encoding="utf-8").splitlines())
        return replace(memory_source("emoji", bundled_pairs()), captioned=False, classnames=names)
    return replace(_open(data, column, None, quoted=quoted), captioned=False)


# ---- what a name means -------------------------------------------------------------------------------------------


def _open(name: str, image: str | None, rule: CaptionRule | None, *, quoted: bool | None) -> Source:
    """`rule` None = captions are not read."""
    path, split = _located(name)
    if Path(path).is_dir():
        return _open_folder(name, Path(path), split, image, rule)
    if is_shards(name) or not is_local(name):
        return shard_source(name, list_shards(name), image, rule)
    if split is not None:
        raise UserError(f"{path!r} is one file and has no split {split!r}: leave out ':{split}'")
    ending = Path(name).suffix.lower()
    if ending == ".parquet":
        return _open_parquet(name, [Path(file) for file in sorted(glob(name)) or [name]], image, rule)
    if ending in TEXT_TABLES:
        return _open_text_table(name, image, rule, quoted=quoted)
    if Path(name).exists():
        raise UserError(
            f"{name!r} is a file of an unknown kind: expected shards (.tar, .tgz), a table (.csv, .tsv, .jsonl, "
            ".parquet), a folder or a Hub dataset"
        )
    path, _, split = name.partition(":")
    hint = "shards end in .tar, tables in .csv, .tsv, .jsonl or .parquet"
    rows = hub_rows(path, split or "train", subject=f"--train-data {name!r}", hint=hint)
    return table_source(name, rows, image, rule)


def _located(name: str) -> tuple[str, str | None]:
    """An existing path, and the split named behind it: FOLDER:SPLIT."""
    path, colon, split = name.rpartition(":")
    if colon and not Path(name).exists() and Path(path).exists():
        return path, split
    return name, None


def _open_folder(name: str, folder: Path, split: str | None, image: str | None, rule: CaptionRule | None) -> Source:
    """The shards in a folder, else its parquet (img2dataset writes both), else its images; of one split."""
    if shards := shards_below(folder):
        chosen = training_split(set(map(shard_split, shards)), split=split, source=str(folder), classes=False)
        shards = [shard for shard in shards if chosen is None or shard_split(shard) == chosen]
        return shard_source(name, checked_shards(shards), image, rule)
    if files := parquet_files(folder):
        splits = {split_of(file, folder) for file in files} - {""}
        chosen = training_split(splits, split=split, source=str(folder), classes=False)
        return _open_parquet(
            name, files if chosen is None else files_of_split(files, folder, chosen, str(folder)), image, rule
        )
    chosen = training_split(subfolders(folder), split=split, source=str(folder))
    below = folder if chosen is None else folder / chosen
    if shards := shards_below(below):
        return shard_source(name, checked_shards(shards), image, rule)
    return folder_source(name, below, image, rule)


def _open_parquet(name: str, files: Sequence[Path], image: str | None, rule: CaptionRule | None) -> Source:
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"the table {str(missing[0])!r} does not exist")
    return table_source(name, ParquetRows(files), image, rule)


def _open_text_table(name: str, image: str | None, rule: CaptionRule | None, *, quoted: bool | None) -> Source:
    if not Path(name).is_file():
        raise UserError(f"the table {name!r} does not exist")
    if name.lower().endswith(".jsonl"):
        rows = read_jsonl(name, image or "image", rule)
    else:
        caption = None if rule is None else rule.field or "title"
        rows = read_csv(name, image or "filepath", caption, quoted=quoted)
    if not rows:
        raise UserError(f"the table {name!r} holds no rows")
    return memory_source(name, [_pair_of_row(row, Path(name).parent) for row in rows])


def _pair_of_row(row: Row, folder: Path) -> RawPair:
    path, captions, problem = row
    if not path and not problem:
        problem = "a row without an image path"
    if "://" in path:
        problem = "its image is a URL: fetch the images first, for example with img2dataset"
    return RawPair(_printable(path), str(folder / path), captions, problem=problem)


# ---- in memory ---------------------------------------------------------------------------------------------------


def bundled_pairs() -> list[RawPair]:
    """The training split of the bundled emoji, in memory (7 MB encoded)."""
    rule = CaptionRule(lines=True)
    pairs = [pair for shard in sorted((BUNDLED / "train").glob("*.tar")) for pair in read_shard(str(shard), rule=rule)]
    return [replace(pair, row=row) for row, pair in enumerate(pairs)]


@dataclass(frozen=True)
class _MemoryEpoch:
    """Each epoch is a new permutation, of which each part takes every parts-th pair."""

    pairs: Sequence[RawPair]

    def __call__(self, seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        return (self.pairs[index] for index in _permutation(len(self.pairs), seed, number)[part::parts])


def memory_source(name: str, pairs: Sequence[RawPair]) -> Source:
    """Pairs in a list."""
    return Source(name, len(pairs), None, _MemoryEpoch(pairs))


# ---- tables ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TableEpoch:
    """A new permutation of the rows; of rows that are read in blocks, of the blocks, and within a buffer."""

    name: str
    rows: Rows
    image: str
    caption: str | None

    def __call__(self, seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        sizes = self.rows.block_sizes
        if sizes is None:
            return map(self._pair, _permutation(len(self.rows), seed, number)[part::parts])
        starts = [0, *accumulate(sizes)]
        indices = (
            starts[block] + row
            for block, start, stop in block_slices(sizes, seed, number, part, parts)
            for row in range(start, stop)
        )
        return _shuffled(map(self._pair, indices), random.Random(f"{seed}/{number}/{part}"))

    def _pair(self, index: int) -> RawPair:
        row = self.rows.row(index)
        key, image = f"{self.name}:{index}", image_of(row[self.image], self.rows.folder(index))
        try:
            return RawPair(key, image, () if self.caption is None else captions_in(row, self.caption))
        except BrokenSample as error:
            return RawPair(key, image, (), problem=str(error))


def table_source(name: str, rows: Rows, image: str | None, rule: CaptionRule | None) -> Source:
    """The pairs of a table; with `rule` None, its images. Raises: UserError for columns that do not fit."""
    if image is None:
        image = usual_column(IMAGE_COLUMNS, rows.schema.names)
    require_image_column(name, rows.schema, image)
    caption = None if rule is None else rule.field or "caption"
    columns = [image] + ([] if caption is None else [require_text_column(name, rows.schema, caption)])
    if not len(rows):
        raise UserError(f"the table {name!r} holds no rows")
    labels = class_labels(rows.schema)
    names = None
    if labels is not None and not are_numbers(labels[1]):  # numbers identify classes and do not name them
        names = tuple(label.replace("_", " ") for label in labels[1])
    epoch = _TableEpoch(name, rows.select(list(dict.fromkeys(columns))), image, caption)
    return Source(name, len(rows), None, epoch, classnames=names)


# ---- folders -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FolderEpoch:
    """Images of a folder; the captions are read from the files beside them."""

    folder: str
    images: Sequence[str]
    rule: CaptionRule | None
    repeated: frozenset[str]
    """Paths without ending of which there are several images, so that a caption has more than one."""

    def __call__(self, seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        order = _permutation(len(self.images), seed, number)
        return (self._pair(self.images[index]) for index in order[part::parts])

    def _pair(self, image: str) -> RawPair:
        key, path = _printable(image), os.path.join(self.folder, image)
        try:
            return RawPair(key, path, () if self.rule is None else self._captions(image, path, self.rule))
        except BrokenSample as error:
            return RawPair(key, path, (), problem=str(error))

    def _captions(self, image: str, path: str, rule: CaptionRule) -> tuple[str, ...]:
        if image.rpartition(".")[0] in self.repeated:
            raise BrokenSample("two images with one caption: keep one")
        return rule.in_members(_beside(path, rule))


def folder_source(name: str, folder: Path, ending: str | None, rule: CaptionRule | None) -> Source:
    """The images of a folder at any depth, with captions in the files beside them unless `rule` is None.

    Raises: UserError if it has no image, or captions are needed and its first images have none.
    """
    images, others = image_paths(folder)
    if ending is not None:
        images = [image for image in images if image.lower().endswith(f".{ending.lower()}")]
    if not images:
        raise UserError(
            f"{str(folder)!r} holds no shard, no parquet file and no image ({ending or ', '.join(IMAGE_SUFFIXES)}), it "
            f"has {endings_text(others)}"
        )
    read = {"txt", "json", "csv", "jsonl"} | ({rule.field} if rule and rule.field else set())
    note_others(str(folder), {ending: count for ending, count in others.items() if ending not in read})
    stems = Counter(image.rpartition(".")[0] for image in images)
    epoch = _FolderEpoch(str(folder), images, rule, frozenset(stem for stem, count in stems.items() if count > 1))
    if rule is None:
        return Source(name, len(images), None, epoch, classnames=_class_folders(images))
    if not any(_beside(os.path.join(folder, image), rule) for image in images):
        metadata = next((file for file in ("metadata.jsonl", "metadata.csv") if (folder / file).is_file()), None)
        remedy = "put the caption of x.jpg into x.txt, or train without captions by recipes/clip_unlabelled.py"
        if metadata:
            remedy = f"name {folder / metadata} with --columns file_name text, or the columns it has"
        raise UserError(f"the images in {str(folder)!r} have no captions beside them: {remedy}")
    return Source(name, len(images), None, epoch)


def _beside(image: str, rule: CaptionRule) -> dict[str, bytes]:
    """Content of the files beside an image that may hold its captions, by ending."""
    stem = image.rpartition(".")[0]
    contents = {}
    for ending in dict.fromkeys(["txt" if rule.field is None else rule.field, "json"]):
        for spelt in (ending, ending.upper()):
            try:
                contents[ending.lower()] = Path(f"{stem}.{spelt}").read_bytes()
                break
            except OSError:
                continue  # without any the pair has no caption, and is counted as broken
    return contents


def _printable(key: str) -> str:
    """A name that is no Unicode text with its odd characters escaped, since a key is printed and hashed as text."""
    return key.encode("utf-8", errors="backslashreplace").decode()


def _class_folders(images: Sequence[str]) -> tuple[str, ...] | None:
    """Class names by folder.

    None for a single folder, images at another depth, and numbers: those folders are not classes, or have no names.
    """
    folders = sorted({image.rpartition("/")[0] for image in images})
    if len(folders) < 2 or not all(folder and "/" not in folder for folder in folders) or are_numbers(folders):
        return None
    return tuple(folder.replace("_", " ") for folder in folders)


# ---- shards ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ShardEpoch:
    """Shards in a new order; a part takes an equal share of the pairs if sizes are known, else whole shards."""

    urls: Sequence[str]
    sizes: Sequence[int] | None
    image: str | None
    rule: CaptionRule | None

    def __call__(self, seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        return _shuffled(self._pairs(seed, number, part, parts), random.Random(f"{seed}/{number}/{part}"))

    def _pairs(self, seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        if self.sizes is None:
            for shard in _permutation(len(self.urls), seed, number)[part::parts]:
                yield from read_shard(self.urls[shard], self.image, self.rule)
            return
        for shard, start, stop in block_slices(self.sizes, seed, number, part, parts):
            yield from self._slice(shard, start, stop)

    def _slice(self, shard: int, start: int, stop: int) -> Iterator[RawPair]:
        assert self.sizes is not None
        url, size = self.urls[shard], self.sizes[shard]
        pairs, count = read_shard(url, self.image, self.rule), 0
        for pair in pairs if stop == size else islice(pairs, stop):  # the last slice reads on, to count
            count += 1
            if start < count <= stop:
                yield pair
        if count != stop:
            raise UserError(
                f"the shard {url!r} holds {count} pairs, and the file with sizes beside it says {size}: correct it, or "
                "remove it and give --steps"
            )


def shard_source(name: str, urls: Sequence[str], image: str | None, rule: CaptionRule | None) -> Source:
    """Web shards.

    Args:
        urls: from `shards.list_shards`.
        image: ending of the image; None = any image.
        rule: None = captions are not read.

    Raises: UserError for malformed sizes.
    """
    sizes = shard_sizes(urls)
    known = [size for size in sizes if size is not None]
    if len(known) == len(urls):
        return Source(name, sum(known), None, _ShardEpoch(urls, known, image, rule))
    epoch = _ShardEpoch(urls, None, image, rule)
    return Source(name, total_size(urls, sizes), len(urls), epoch, note=partial(_uneven, urls))


def read_shard(url: str, image: str | None = None, rule: CaptionRule | None = None) -> Iterator[RawPair]:
    """Yields the pairs of one tar file. A sample without a usable image or caption is a pair with a `problem`.

    Raises: UserError for a file that cannot be read to its end.
    """
    endings = {"txt" if rule.field is None else rule.field.lower(), "json"} if rule else set()
    image = None if image is None else image.lower()  # as read_samples gives the endings

    def wanted(ending: str) -> bool:
        return ending in endings or (ending in IMAGE_SUFFIXES if image is None else ending == image)

    for sample in read_samples(url, wanted=wanted, stream=True):
        yield _pair_of(sample, image, rule)


def _pair_of(sample: Sample, image: str | None, rule: CaptionRule | None) -> RawPair:
    try:
        content = sample.contents[sample.image(image)]
        captions = () if rule is None else rule.in_members(sample.contents)
    except BrokenSample as error:
        return RawPair(_printable(sample.key), None, (), problem=str(error))
    return RawPair(_printable(sample.key), content, captions)


def _uneven(urls: Sequence[str], parts: int) -> str | None:
    """A note if whole shards make parts of unequal sizes, by bytes where all are local."""
    sizes = [Path(url).stat().st_size for url in urls] if all(map(is_local, urls)) else [1] * len(urls)
    shares = [sum(sizes[part::parts]) / max(sum(sizes), 1) for part in range(parts)]
    if max(shares) <= EVEN * min(shares):
        return None
    return (
        f"{len(urls)} shards are read by {parts} streams whose shares of the data are {100 * min(shares):.1f} to "
        f"{100 * max(shares):.1f} %, so that in an epoch some pairs are seen more often than others, or not at all. "
        'For equal shares write sizes.json, {"NAME.tar": number of pairs}, beside the shards'
    )


# ---- order -------------------------------------------------------------------------------------------------------


def _permutation(count: int, seed: int, number: int) -> list[int]:
    """The order of `count` elements in an epoch."""
    order = list(range(count))
    random.Random(f"{seed}/{number}").shuffle(order)
    return order


def block_slices(sizes: Sequence[int], seed: int, number: int, part: int, parts: int) -> Iterator[tuple[int, int, int]]:
    """Yields (block, start, stop) for one part of an epoch over blocks of known sizes.

    The blocks are permuted by (seed, number), and the sequence of their elements is cut into parts whose lengths differ
    by one at most: a part reads few blocks, and each block by few parts.
    """
    total = sum(sizes)
    first, last = part * total // parts, (part + 1) * total // parts
    position = 0
    for block in _permutation(len(sizes), seed, number):
        start, stop = max(first - position, 0), min(last - position, sizes[block])
        if start < stop:
            yield block, start, stop
        position += sizes[block]


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
