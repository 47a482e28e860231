"""Image-text pairs of a training set: an epoch at a time in disjoint parts, or block by block in their stored order.

A source yields one epoch of undecoded pairs for one part of many (a part = one worker of one rank). Their order is a
pure function of (seed, epoch, part, parts), so that `pair_stream.py` can resume at any pair without decoding the
earlier ones. A block is a shard, or `BLOCK_ROWS` rows of anything else: the unit in which a teacher's outputs are
stored. A source can be pickled, for worker processes.
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

from gkl_vl.addresses import is_local
from gkl_vl.data.captions import CaptionRule, Captions, captions_in, joined
from gkl_vl.data.classes import are_numbers
from gkl_vl.data.files import IMAGE_SUFFIXES, endings_text, image_paths, note_others
from gkl_vl.data.images import BrokenSample
from gkl_vl.data.shards import Sample, read_samples, shard_sizes, total_size
from gkl_vl.data.tables import (
    IMAGE_COLUMNS,
    Rows,
    class_labels,
    image_of,
    require_image_column,
    require_text_column,
    usual_column,
)
from gkl_vl.errors import UserError

SHUFFLE_BUFFER = 2000
"""Size of the buffer in which the pairs of shards and of parquet are shuffled."""
BLOCK_ROWS = 10_000
"""Rows of a block of a table, a folder or a list."""
EVEN = 1.05
"""Largest ratio of the sizes of two parts that is not reported."""


@dataclass(frozen=True, slots=True)
class RawPair:
    """One image with its captions, not decoded."""

    key: str
    image: Any  # encoded bytes, a path, or a PIL image
    captions: tuple[str, ...]
    columns: tuple[int, ...] = ()
    """Number of the caption column of each caption, where there are several."""
    row: int = 0
    """Its number in its block. Sources set it."""
    block: int = 0
    problem: str = ""
    """Why the pair is broken, found while reading it; "" = not known to be."""
    members: Mapping[str, bytes] = field(default_factory=dict)
    """Content of further members of a shard's sample, by ending, as far as it has them (`with_members`)."""


@runtime_checkable
class Pairs(Protocol):
    """Pairs that are read in either order; picklable."""

    @property
    def blocks(self) -> Sequence[str]:
        """A name of each block: the shard, or the first row."""
        ...

    def read(self, block: int, /) -> Iterator[RawPair]:
        """The pairs of a block in their stored order, broken ones included."""
        ...

    def epoch(self, seed: int, number: int, part: int, parts: int, /) -> Iterator[RawPair]:
        """The pairs of one of several disjoint parts of an epoch, shuffled."""
        ...


@dataclass(frozen=True)
class Source:
    """A training set."""

    name: str
    num_pairs: int | None
    """Pairs in one epoch; None if unknown, for shards without sizes."""
    num_parts: int | None
    """Largest number of parts it can be split into; None = no limit."""
    pairs: Pairs
    captioned: bool = True
    """False = captions are not read, and batches have no text."""
    classnames: tuple[str, ...] | None = None
    """Names of the classes that images without captions are sorted into; None if the source has none."""
    note: Callable[[int], str | None] = lambda parts: None
    """What a user should know about a split into so many parts; None = nothing. Not sent to workers."""

    @property
    def scattered(self) -> bool:
        """Whether an epoch jumps between its blocks, as in all but shards."""
        return isinstance(self.pairs, IndexedPairs)

    @property
    def things(self) -> str:
        """Noun for the elements, for messages."""
        return "pairs" if self.captioned else "images"

    def epoch(self, seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        """The pairs of one of several disjoint parts of an epoch, shuffled."""
        return self.pairs.epoch(seed, number, part, parts)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"note": None}


# ---- rows --------------------------------------------------------------------------------------------------------


@runtime_checkable
class PairRows(Protocol):
    """Pairs by index; `row` and `block` are not set."""

    def __len__(self) -> int: ...

    def pair(self, index: int, /) -> RawPair: ...


@dataclass(frozen=True)
class IndexedPairs:
    """Pairs of rows. Each epoch is a new permutation, of which each part takes every parts-th pair; of rows that are
    read in groups it is a permutation of the groups, and within a buffer."""

    rows: PairRows
    groups: Sequence[int] | None = None
    """Rows of each consecutive part that is read at once; None = rows in any order cost the same."""

    @property
    def blocks(self) -> list[str]:
        return [f"row {start}" for start in range(0, len(self.rows), BLOCK_ROWS)]

    def read(self, block: int) -> Iterator[RawPair]:
        start = block * BLOCK_ROWS
        return map(self._pair, range(start, min(start + BLOCK_ROWS, len(self.rows))))

    def epoch(self, seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        if self.groups is None:
            return map(self._pair, _permutation(len(self.rows), seed, number)[part::parts])
        starts = [0, *accumulate(self.groups)]
        indices = (
            starts[group] + row
            for group, start, stop in block_slices(self.groups, seed, number, part, parts)
            for row in range(start, stop)
        )
        return _shuffled(map(self._pair, indices), random.Random(f"{seed}/{number}/{part}"))

    def _pair(self, index: int) -> RawPair:
        block, row = divmod(index, BLOCK_ROWS)
        return replace(self.rows.pair(index), block=block, row=row)


@dataclass(frozen=True)
class _ListedRows:
    pairs: Sequence[RawPair]

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, index: int) -> RawPair:
        return self.pairs[index]


def memory_source(name: str, pairs: Sequence[RawPair]) -> Source:
    """Pairs in a list."""
    return Source(name, len(pairs), None, IndexedPairs(_ListedRows(pairs)))


@dataclass(frozen=True)
class _TableRows:
    name: str
    rows: Rows
    image: str
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, index: int) -> RawPair:
        row = self.rows.row(index)
        # Without the folder: the key seeds the pair's draws, and the table may be named in several ways.
        key, image = f"{PurePath(self.name).name}:{index}", image_of(row[self.image], self.rows.folder(index))
        try:
            captions = joined([captions_in(row, caption) for caption in self.captions])
            return RawPair(key, image, captions.texts, captions.columns)
        except BrokenSample as error:
            return RawPair(key, image, (), problem=str(error))


def table_source(name: str, rows: Rows, image: str | None, rule: CaptionRule | None) -> Source:
    """The pairs of a table; with `rule` None, its images. Raises: UserError for columns that do not fit."""
    if image is None:
        image = usual_column(IMAGE_COLUMNS, rows.schema.names)
    require_image_column(name, rows.schema, image)
    captions = () if rule is None else rule.fields or ("caption",)
    columns = [image, *(require_text_column(name, rows.schema, caption) for caption in captions)]
    if not len(rows):
        raise UserError(f"the table {name!r} holds no rows")
    labels = class_labels(rows.schema)
    names = None
    if labels is not None and not are_numbers(labels[1]):  # numbers identify classes and do not name them
        names = tuple(label.replace("_", " ") for label in labels[1])
    selected = rows.select(list(dict.fromkeys(columns)))
    pairs = IndexedPairs(_TableRows(name, selected, image, captions), groups=rows.block_sizes)
    return Source(name, len(rows), None, pairs, classnames=names)


@dataclass(frozen=True)
class _FolderRows:
    """Images of a folder; the captions are read from the files beside them."""

    folder: str
    images: Sequence[str]
    rule: CaptionRule | None
    repeated: frozenset[str]
    """Paths without ending of which there are several images, so that a caption has more than one."""

    def __len__(self) -> int:
        return len(self.images)

    def pair(self, index: int) -> RawPair:
        image = self.images[index]
        key, path = printable(image), os.path.join(self.folder, image)
        try:
            captions = Captions() if self.rule is None else self._captions(image, path, self.rule)
            return RawPair(key, path, captions.texts, captions.columns)
        except BrokenSample as error:
            return RawPair(key, path, (), problem=str(error))

    def _captions(self, image: str, path: str, rule: CaptionRule) -> Captions:
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
    read = {"txt", "json", "csv", "jsonl"} | (rule.endings() if rule else set())
    note_others(str(folder), {ending: count for ending, count in others.items() if ending not in read})
    stems = Counter(image.rpartition(".")[0] for image in images)
    repeated = frozenset(stem for stem, count in stems.items() if count > 1)
    pairs = IndexedPairs(_FolderRows(str(folder), images, rule, repeated))
    if rule is None:
        return Source(name, len(images), None, pairs, classnames=_class_folders(images))
    if not any(_beside(os.path.join(folder, image), rule) for image in images):
        metadata = next((file for file in ("metadata.jsonl", "metadata.csv") if (folder / file).is_file()), None)
        remedy = "put the caption of x.jpg into x.txt, or train without captions by recipes/clip_unlabelled.py"
        if metadata:
            remedy = f"name {folder / metadata} with --columns file_name text, or the columns it has"
        raise UserError(f"the images in {str(folder)!r} have no captions beside them: {remedy}")
    return Source(name, len(images), None, pairs)


def _beside(image: str, rule: CaptionRule) -> dict[str, bytes]:
    """Content of the files beside an image that may hold its captions, by ending."""
    stem = image.rpartition(".")[0]
    contents = {}
    # As the field is spelt, in lower case and in upper case.
    for ending in dict.fromkeys([*rule.fields, *sorted(rule.endings())]):
        for spelt in (ending, ending.upper()):
            try:
                contents[ending.lower()] = Path(f"{stem}.{spelt}").read_bytes()
                break
            except OSError:
                continue  # without any the pair has no caption, and is counted as broken
    return contents


def printable(key: str) -> str:
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
class _ShardPairs:
    """A block is a shard. An epoch reads the shards in a new order; a part takes an equal share of the pairs if sizes
    are known, else whole shards."""

    urls: Sequence[str]
    sizes: Sequence[int] | None
    image: str | None
    rule: CaptionRule | None
    members: frozenset[str] = frozenset()

    @property
    def blocks(self) -> Sequence[str]:
        return self.urls

    def read(self, block: int) -> Iterator[RawPair]:
        return read_shard(self.urls[block], self.image, self.rule, members=self.members, block=block)

    def epoch(self, seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        return _shuffled(self._pairs(seed, number, part, parts), random.Random(f"{seed}/{number}/{part}"))

    def _pairs(self, seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        if self.sizes is None:
            for shard in _permutation(len(self.urls), seed, number)[part::parts]:
                yield from self.read(shard)
            return
        for shard, start, stop in block_slices(self.sizes, seed, number, part, parts):
            yield from self._slice(shard, start, stop)

    def _slice(self, shard: int, start: int, stop: int) -> Iterator[RawPair]:
        assert self.sizes is not None
        url, size = self.urls[shard], self.sizes[shard]
        pairs, count = self.read(shard), 0
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
        return Source(name, sum(known), None, _ShardPairs(urls, known, image, rule))
    pairs = _ShardPairs(urls, None, image, rule)
    return Source(name, total_size(urls, sizes), len(urls), pairs, note=partial(_uneven, urls))


def with_members(source: Source, endings: Collection[str]) -> Source:
    """The source with the content of further members, by ending, in its pairs. Raises: UserError for no shards."""
    if not isinstance(source.pairs, _ShardPairs):
        wanted = ", ".join(f".{ending}" for ending in endings)
        raise UserError(f"{source.name!r} is not of shards, whose samples may have {wanted}: pack it into shards")
    return replace(source, pairs=replace(source.pairs, members=frozenset(endings)))


def read_shard(
    url: str,
    image: str | None = None,
    rule: CaptionRule | None = None,
    *,
    members: Collection[str] = (),
    block: int = 0,
) -> Iterator[RawPair]:
    """Yields the pairs of one tar file. A sample without a usable image or caption is a pair with a `problem`.

    Args:
        members: endings of further members whose content the pairs have.

    Raises: UserError for a file that cannot be read to its end.
    """
    endings = rule.endings() if rule else set()
    image = None if image is None else image.lower()  # as read_samples gives the endings

    def wanted(ending: str) -> bool:
        return (
            ending in endings or ending in members or (ending in IMAGE_SUFFIXES if image is None else ending == image)
        )

    for row, sample in enumerate(read_samples(url, wanted=wanted, stream=True)):
        content, captions, problem = _members(sample, image, rule)
        further = {ending: value for ending, value in sample.contents.items() if ending in members}
        yield RawPair(
            printable(sample.key),
            content,
            captions.texts,
            captions.columns,
            row=row,
            block=block,
            problem=problem,
            members=further,
        )


def _members(sample: Sample, image: str | None, rule: CaptionRule | None) -> tuple[bytes | None, Captions, str]:
    """Image, captions and problem of a pair."""
    try:
        content = sample.contents[sample.image(image)]
        return content, Captions() if rule is None else rule.in_members(sample.contents), ""
    except BrokenSample as error:
        return None, Captions(), str(error)


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
