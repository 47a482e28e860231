"""Image-text pairs for training: from web shards, Hub datasets, parquet, CSV, or the bundled emoji, to batches.

Where a teacher says what is in them, images alone will do: `open_images`.

A source yields one epoch of undecoded pairs for one part of many (a part = one worker of one rank). Everything random
follows from (seed, epoch, key), so that a stream can be taken up again at any pair, bit for bit, without decoding what
was already used. The loader shards by rank and worker itself: do not hand it to `accelerator.prepare`.
"""

import csv
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import v2
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from gkl_vl.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
SHUFFLE_BUFFER = 2000
BROKEN_WINDOW, BROKEN_SHARE = 1000, 0.05
BUNDLED = Path(__file__).parents[1] / "assets" / "emoji"


@dataclass(frozen=True, slots=True)
class RawPair:
    """One image with its captions, not decoded yet."""

    key: str
    image: Any  # encoded bytes, a path, or a PIL image
    captions: tuple[str, ...]
    row: int = -1  # position in a set that fits in memory, for stored teacher embeddings


@dataclass(frozen=True)
class Source:
    """Where pairs come from."""

    name: str
    num_pairs: int | None
    """Pairs in one epoch; None where the shards do not say."""
    num_parts: int | None
    """The most parts it can be split into; None = any number."""
    epoch: Callable[[int, int, int, int], Iterator[RawPair]]
    """(seed, epoch, part, parts) -> the pairs of that part, shuffled, none of them in another part."""
    captioned: bool = True
    """False = captions are not asked for, and batches have no text."""
    classnames: tuple[str, ...] | None = None
    """Of the classes that images without captions are sorted into; None where the source knows of none."""

    @property
    def things(self) -> str:
        """What it holds, for messages."""
        return "pairs" if self.captioned else "images"


# ---- sources -----------------------------------------------------------------------------------------------------


def open_source(train_data: str | None, *, columns: tuple[str, str] | None = None) -> Source:
    """The source that `--train-data` names.

    None = the bundled emoji. `a-{000..9}.tar::b.tar` = web shards. `x.csv`, `x.tsv` = a table with columns `filepath`
    and `title`. `x.parquet`, a folder of parquet files, or a Hub dataset id (`org/name` or `org/name:split`) = a table
    with columns `image` and `caption`. `columns` renames the two.

    Raises: UserError for what cannot be found.
    """
    if train_data is None:
        pairs = bundled_pairs()
        return memory_source("emoji", pairs)
    if ".tar" in train_data:
        return shard_source(train_data)
    if train_data.endswith((".csv", ".tsv")):
        return memory_source(train_data, read_csv(train_data, *(columns or ("filepath", "title"))))
    image_column, caption_column = columns or ("image", "caption")
    return table_source(train_data, read_table(train_data, asked="--train-data"), image_column, caption_column)


def open_images(data: str, *, columns: tuple[str, str] | None = None) -> Source:
    """The images that `--unlabelled` names. Captions and labels beside them are not read.

    `bundled` = the training drawings of the bundled emoji. Shards, tables and Hub datasets are named as for
    `open_source`; the image column is `filepath` in CSV, elsewhere `img` or `image`, or the first of `columns`. A
    folder without parquet = the images in it at any depth.

    The class names are those of a table's ClassLabel or of the folders where all images lie in FOLDER/CLASS/, with
    spaces for "_".

    Raises: UserError for what cannot be found.
    """
    if data == "bundled":
        names = tuple((BUNDLED / "classnames.txt").read_text(encoding="utf-8").splitlines())
        return _uncaptioned(memory_source("emoji", bundled_pairs()), names)
    if ".tar" in data:
        return _uncaptioned(shard_source(data), None)
    if data.endswith((".csv", ".tsv")):
        return _uncaptioned(memory_source(data, read_csv(data, columns[0] if columns else "filepath", None)), None)
    if Path(data).is_dir() and not any(Path(data).rglob("*.parquet")):
        pairs = image_files(data)
        return _uncaptioned(memory_source(data, pairs), _class_folders(pairs))
    table = read_table(data, asked="--unlabelled")
    column = columns[0] if columns else usual_column(IMAGE_COLUMNS, table.column_names)
    return _uncaptioned(table_source(data, table, column, None), _class_labels(table))


def _uncaptioned(source: Source, classnames: tuple[str, ...] | None) -> Source:
    return replace(source, captioned=False, classnames=classnames)


def image_files(folder: str) -> list[RawPair]:
    """The images of a folder at any depth, in order of their paths. Raises: UserError where there is none."""
    files = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.suffix[1:].lower() in IMAGE_SUFFIXES)
    pairs = [RawPair(file.as_posix(), str(Path(folder) / file), ()) for file in sorted(files)]
    if not pairs:
        raise UserError(
            f"{folder!r} holds no image ({', '.join(IMAGE_SUFFIXES)}) and no parquet file (shards are written as "
            f"{folder}/{{0000..9999}}.tar)"
        )
    return pairs


def _class_folders(pairs: Sequence[RawPair]) -> tuple[str, ...] | None:
    """One folder, or folders of folders, are a place for images and no classes."""
    folders = sorted({pair.key.rpartition("/")[0] for pair in pairs})
    if len(folders) < 2 or not all(folder and "/" not in folder for folder in folders):
        return None
    return tuple(folder.replace("_", " ") for folder in folders)


def _class_labels(table: Any) -> tuple[str, ...] | None:
    """Of a `datasets.Dataset`."""
    import datasets

    labels = {name: of for name, of in table.features.items() if isinstance(of, datasets.ClassLabel)}
    column = next((name for name in (*LABEL_COLUMNS, *labels) if name in labels), None)
    return None if column is None else tuple(name.replace("_", " ") for name in labels[column].names)


def bundled_pairs() -> list[RawPair]:
    """The training split of the bundled emoji, in memory (7 MB encoded)."""
    pairs = [pair for shard in sorted((BUNDLED / "train").glob("*.tar")) for pair in read_shard(str(shard))]
    return [RawPair(p.key, p.image, p.captions, row) for row, p in enumerate(pairs)]


def memory_source(name: str, pairs: Sequence[RawPair]) -> Source:
    """Pairs in a list: every epoch a new permutation, each part takes every parts-th of it."""

    def epoch(seed: int, number: int, part: int, parts: int) -> Iterator[RawPair]:
        order = list(range(len(pairs)))
        random.Random(f"{seed}/{number}").shuffle(order)
        return (pairs[index] for index in order[part::parts])

    return Source(name, len(pairs), None, epoch)


def read_csv(path: str, image_column: str, caption_column: str | None) -> list[RawPair]:
    """A CSV or TSV file with a header; image paths are absolute or relative to the file."""
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


def read_table(name: str, *, asked: str) -> Any:
    """A parquet file, a folder of them, or a dataset on the Hub, memory-mapped: a `datasets.Dataset`.

    Raises: UserError where there is none; `asked` is the flag that names it.
    """
    import datasets

    path, _, split = name.partition(":")
    if path.endswith(".parquet") or Path(path).is_dir():
        files = sorted(str(f) for f in ([Path(path)] if path.endswith(".parquet") else Path(path).rglob("*.parquet")))
        if not files or not Path(files[0]).is_file():
            raise UserError(f"{asked} {path!r} holds no parquet file (shards are written as {path}/{{0000..9999}}.tar)")
        return datasets.load_dataset("parquet", data_files=files, split="train")
    hint = "shards end in .tar, tables in .csv, .tsv or .parquet"
    return hub_table(path, split or "train", asked=f"{asked} {name!r}", hint=hint)


def table_source(name: str, table: Any, image_column: str, caption_column: str | None) -> Source:
    """The pairs of a `datasets.Dataset`, or without a caption column its images."""
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


def hub_table(path: str, split: str, *, asked: str, hint: str) -> Any:
    """A split of a dataset on the Hub, a `datasets.Dataset`.

    Raises: UserError where it cannot be had, a line that `asked` begins and `hint` ends.
    """
    import datasets

    try:
        return datasets.load_dataset(path, split=split)
    except Exception as error:  # the client's errors for offline, unknown, private: the remedy is the same
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{asked} is no file here and could not be had from the Hub ({reason}): check the name "
            f"and the connection; {hint}"
        ) from error


def undecoded(table: Any, image_column: str) -> Any:
    """The `datasets.Dataset` whose images stay encoded until `encoded_image` and `decode` are asked."""
    import datasets

    if isinstance(table.features[image_column], datasets.Image):
        return table.cast_column(image_column, datasets.Image(decode=False))
    return table


def encoded_image(cell: Any) -> Any:
    """What `RawPair.image` takes, from a cell of a table: the Hub's images are {"bytes": ..., "path": ...}."""
    return (cell["bytes"] or cell["path"]) if isinstance(cell, dict) else cell


def usual_column(usual: Sequence[str], there: Sequence[str]) -> str:
    """The first of the usual names that is there; the last of them where none is, for `need_columns` to name."""
    return next((name for name in usual if name in there), usual[-1])


def need_columns(name: str, columns: list[str], image_column: str, other_column: str | None) -> None:
    for column in (image_column, other_column):
        if column is not None and column not in columns:
            raise UserError(f"{name!r} has no column {column!r}, only {', '.join(columns)}: name them with --columns")


def shard_source(spec: str) -> Source:
    """WebDataset shards, `::` between sources, braces expanded. A part reads its own shards, shuffled in a buffer."""
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


def is_local(url: str) -> bool:
    return "://" not in url and not url.startswith("pipe:")


def _num_pairs_in(urls: list[str]) -> int | None:
    """What `sizes.json` or `__len__` beside the shards says; None if any folder says nothing."""
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
    """The pairs of one tar file: members KEY.jpg|png|webp with KEY.txt (a caption a line) or KEY.json (`caption`)."""
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
                assert body is not None  # isfile() said so
                members[suffix.lower()] = body.read()
            if current is not None and (pair := _pair_of(current, members)):
                yield pair
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"shard {url!r} cannot be read to its end ({error}): fetch it again or leave it out") from error


def _pair_of(key: str, members: dict[str, bytes]) -> RawPair | None:
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if image is None and "txt" not in members and "json" not in members:
        return None  # something else lies in the tar
    return RawPair(key, image, _captions_of(members))


def _captions_of(members: dict[str, bytes]) -> tuple[str, ...]:
    try:
        if "txt" in members:
            return tuple(members["txt"].decode("utf-8").splitlines())
        caption = json.loads(members.get("json", b"{}")).get("caption") or ""
        return (caption,) if isinstance(caption, str) else tuple(caption)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return ()  # counted as a broken pair further on


def _shuffled(pairs: Iterator[RawPair], rng: random.Random) -> Iterator[RawPair]:
    buffer: list[RawPair] = []
    for pair in pairs:
        buffer.append(pair)
        if len(buffer) >= SHUFFLE_BUFFER:
            index = rng.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


# ---- one pair ----------------------------------------------------------------------------------------------------


class BrokenPair(Exception):
    """This pair cannot be used: its image does not decode or it has no caption."""


def usable_captions(pair: RawPair) -> list[str]:
    """The captions that are not empty. Raises BrokenPair when none is left."""
    captions = [caption.strip() for caption in pair.captions if caption and caption.strip()]
    if not captions:
        raise BrokenPair("no caption")
    return captions


def decode(pair: RawPair) -> Image.Image:
    """The image as RGB. Raises BrokenPair."""
    try:
        image = pair.image
        if image is None or image == b"":
            raise ValueError("no image")
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        # with: PIL itself leaves the file of an image open whose pixels end early
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return opened.convert("RGB")
    except Exception as error:  # PIL raises nearly anything on broken files, and all of it means the same
        raise BrokenPair(f"image: {error}") from error


def light_augmentation(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """open_clip's default: a random crop of 90 to 100 % of the area, resized. PIL -> uint8 [3, size, size]."""
    crop = v2.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.PILToTensor()])


def drawing_augmentation(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """To learn the bundled emoji from scratch, as their teacher did. PIL -> uint8 [3, size, size]."""
    return _drawing_views(
        size, turn=15.0, shift=0.08, zoom=(0.75, 1.15), shear=10.0, crop=(0.6, 1.0), ratio=(0.8, 1.25),
        colour=(0.5, 0.5, 0.6, 0.08), colour_p=0.8, grey_p=0.2, erase_p=0.3,
    )  # fmt: skip


def mild_drawing_augmentation(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """To distil them: a small student in a short run, whose targets are the teacher's word on each view.

    Over `drawing_augmentation` it won 6 points of top-1 (recipes/README.md). PIL -> uint8 [3, size, size].
    """
    return _drawing_views(
        size, turn=8.0, shift=0.05, zoom=(0.85, 1.1), shear=5.0, crop=(0.8, 1.0), ratio=(0.9, 1.11),
        colour=(0.4, 0.4, 0.5, 0.06), colour_p=0.7, grey_p=0.1, erase_p=0.1,
    )  # fmt: skip


def _drawing_views(
    size: int,
    *,
    turn: float,
    shift: float,
    zoom: tuple[float, float],
    shear: float,
    crop: tuple[float, float],
    ratio: tuple[float, float],
    colour: tuple[float, float, float, float],
    colour_p: float,
    grey_p: float,
    erase_p: float,
) -> Callable[[Image.Image], torch.Tensor]:
    """What may change between two drawings of one thing, and no mirror: it swaps meanings."""
    bilinear = v2.InterpolationMode.BILINEAR
    return v2.Compose(
        [
            v2.RandomAffine(
                [-turn, turn], translate=(shift, shift), scale=zoom, shear=shear, fill=255, interpolation=bilinear
            ),
            v2.RandomResizedCrop(size, scale=crop, ratio=ratio, interpolation=bilinear),
            v2.RandomApply([v2.ColorJitter(*colour)], p=colour_p),
            v2.RandomGrayscale(grey_p),
            v2.PILToTensor(),
            v2.RandomErasing(p=erase_p, scale=(0.02, 0.2), value=255),
        ]
    )


def apply_seeded(augment: Callable[[Image.Image], torch.Tensor], image: Image.Image, seed: int) -> torch.Tensor:
    """The augmentation drawn by `seed`, whatever the process's own generator holds, which stays untouched.

    Only the CPU's generator: torch.manual_seed and fork_rng look after every device, at a quarter of a millisecond.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        return augment(image)
    finally:
        torch.default_generator.set_state(before)


# ---- batches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """How far one worker has come."""

    epoch: int = 0
    used: int = 0
    """Pairs of this epoch that are behind, usable or not; an earlier epoch need not be read again."""
    seen: int = 0
    """Pairs of all epochs."""
    skipped: int = 0
    """Broken ones among them."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a rank's stream has come: batches taken, and the place of each worker. JSON keeps it as lists."""

    batches: int
    places: tuple[Place, ...]

    @staticmethod
    def of(stored: dict[str, Any]) -> "Position":
        """The position that `PairLoader.position()` gave, also after a way through JSON."""
        return Position(stored["batches"], tuple(Place(*place) for place in stored["places"]))


class PairStream(IterableDataset):
    """Endless batches of one rank: {"image": uint8 [n, 3, r, r], "keys", "text", "text_ids", ...} as dicts.

    `tokenizers` maps the key that a batch gets to a tokenizer: {"text": student's, "teacher_text": teacher's}. Of a
    source without captions there are images and keys alone.
    With `stored_views`, uint8 [pairs, views, 3, r, r], an image is one of its stored views, a new one each epoch, in
    place of a fresh augmentation; a batch then also has `view_rows` and `caption_rows` = (row in the set, number of the
    view or caption), by which stored teacher embeddings are found.
    """

    def __init__(
        self,
        source: Source,
        *,
        augment: Callable[[Image.Image], torch.Tensor],
        tokenizers: dict[str, Callable[[list[str]], torch.Tensor]],
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        num_workers: int,
        stored_views: torch.Tensor | None = None,
        start: Position | None = None,
    ):
        self.source, self.augment, self.tokenizers = source, augment, tokenizers
        self.batch_size, self.seed, self.stored_views = batch_size, seed, stored_views
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        parts = max(num_workers, 1)
        self.start = start or Position(0, (Place(),) * parts)
        if len(self.start.places) != parts:
            raise UserError(
                f"--workers {num_workers} gives {parts} streams, the checkpoint has {len(self.start.places)}: "
                f"resume with the same --workers"
            )
        num_parts = world_size * parts
        if source.num_parts is not None and source.num_parts < num_parts:
            raise UserError(
                f"{source.num_parts} shards cannot be split over {world_size} processes x {parts} workers = "
                f"{num_parts}: lower --workers or --num_processes, or write more and smaller shards"
            )
        if source.num_pairs is not None and source.num_pairs < num_parts:
            raise UserError(f"{source.name!r} has {source.num_pairs} {source.things}, fewer than {num_parts} workers")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._batches()
        except UserError as error:  # as data: a worker's exception would arrive with its traceback in the message
            yield {"error": str(error)}

    def _batches(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        parts = max(self.num_workers, 1)
        # The loader asks its workers in turn, from 0: after k batches it is the turn of worker k mod parts.
        worker = ((info.id if info else 0) + self.start.batches) % parts
        part, num_parts = self.rank * parts + worker, self.world_size * parts
        start = self.start.places[worker]
        seen, skipped = start.seen, start.skipped
        named: list[str] = []
        samples: list[dict[str, Any]] = []
        for epoch, used, pair in self._pairs(part, num_parts, start):
            seen += 1
            try:
                samples.append(self._sample(pair, epoch))
            except BrokenPair as error:
                skipped += 1
                named = [*named, f"{pair.key} ({error})"][:3]
                if skipped > BROKEN_SHARE * BROKEN_WINDOW and seen <= BROKEN_WINDOW:
                    raise UserError(
                        f"{skipped} of the first {seen} {self.source.things} of {self.source.name!r} are broken, "
                        f"among them {'; '.join(named)}: mend the data"
                    ) from error
            if len(samples) == self.batch_size:
                yield self._collate(samples) | {"worker": worker, "place": Place(epoch, used, seen, skipped)}
                samples = []

    def _pairs(self, part: int, num_parts: int, start: Place) -> Iterator[tuple[int, int, RawPair]]:
        """(epoch, how many of the epoch are used with this one, pair) from `start` on, without end."""
        for epoch in count(start.epoch):
            behind = start.used if epoch == start.epoch else 0
            used = behind
            pairs = self.source.epoch(self.seed, epoch, part, num_parts)
            for used, pair in enumerate(islice(pairs, behind, None), behind + 1):
                yield epoch, used, pair
            if not used:
                kind = "image-text pair" if self.source.captioned else "image"
                raise UserError(f"{self.source.name!r} holds no {kind} for worker {part} of {num_parts}")

    def _sample(self, pair: RawPair, epoch: int) -> dict[str, Any]:
        rng = random.Random(f"{self.seed}/{epoch}/{pair.key}")
        sample: dict[str, Any] = {"key": pair.key}
        if self.source.captioned:
            captions = usable_captions(pair)
            caption = rng.randrange(len(captions))
            sample |= {"caption": captions[caption], "caption_row": (pair.row, caption)}
        if self.stored_views is None:
            view, image = 0, apply_seeded(self.augment, decode(pair), rng.getrandbits(63))
        else:
            view = epoch % self.stored_views.shape[1]
            image = self.stored_views[pair.row, view]
        return sample | {"image": image, "view_row": (pair.row, view)}

    def _collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "image": torch.stack([sample["image"] for sample in samples]),
            "keys": [sample["key"] for sample in samples],
        }
        if self.stored_views is not None:
            batch["view_rows"] = torch.tensor([sample["view_row"] for sample in samples])
        if not self.source.captioned:
            return batch
        captions = [sample["caption"] for sample in samples]
        batch["text_ids"] = torch.tensor([number_of(caption) for caption in captions])
        if self.stored_views is not None:
            batch["caption_rows"] = torch.tensor([sample["caption_row"] for sample in samples])
        return batch | {name: tokenize(captions) for name, tokenize in self.tokenizers.items()}


def number_of(text: str) -> int:
    """A number that stands for the text, the same in every process and run; 63 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class PairLoader:
    """Batches of a `PairStream` through worker processes, with the position after each: the loop's view of the data."""

    def __init__(self, stream: PairStream, *, pin_memory: bool = False):
        self.stream = stream
        self._rewind()
        self.loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=stream.num_workers,
            pin_memory=pin_memory,
            prefetch_factor=4 if stream.num_workers else None,
            persistent_workers=stream.num_workers > 0,
            # It draws a seed when it starts: from its own generator, or a resumed run would be one draw ahead.
            generator=torch.Generator(),
        )

    def _rewind(self) -> None:
        self._places = list(self.stream.start.places)
        self._taken = self.stream.start.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._rewind()  # the stream starts over as well
        for batch in self.loader:
            if "error" in batch:
                raise UserError(batch["error"])
            self._taken += 1
            self._places[batch.pop("worker")] = batch.pop("place")
            yield batch

    def position(self) -> dict[str, Any]:
        """Where the stream stands after the last batch taken; `Position.of` starts another one there."""
        return {"batches": self._taken, "places": [astuple(place) for place in self._places]}

    def num_skipped(self) -> int:
        """Broken pairs passed over by this rank so far."""
        return sum(place.skipped for place in self._places)
