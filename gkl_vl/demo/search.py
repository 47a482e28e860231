"""Search in a folder of images, by words or by an image.

Each model embeds each distinct image once. The embeddings are cached on disk under a hash of the model and, for each
image, of its bytes: a changed folder costs its new images alone. Thumbnails are cached under the hash of the image.

Axis letters: n = images of the folder, d = embedding.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from gkl_vl import disk_cache
from gkl_vl.atomic import replacing
from gkl_vl.data.images import DECODE_RULES
from gkl_vl.demo.folder import LARGE_PIXELS, THUMBNAIL_PIXELS, ImageFolder, as_jpeg, decode_named
from gkl_vl.demo.models import DemoModel, embed_images, timed
from gkl_vl.errors import UserError, first_line, notice
from gkl_vl.evaluation.embed import embed_texts

_BATCH = 16
_SAVE_EVERY = 1024
"""New embeddings between two writes of the cache, so that an interrupted start is not lost."""
_READERS = 4
"""Threads that read and decode; PIL releases the interpreter's lock."""
_KEY_BYTES = 32


@dataclass(kw_only=True)
class Index:
    """Embeddings of a folder's images by each model. `build` fills it; it can be searched before it is full."""

    folder: ImageFolder
    models: tuple[DemoModel, ...]
    rows: tuple[Tensor, ...]
    """Of each model, [n, d]."""
    ready: Bool[Tensor, " n"]
    """Images that have their rows."""
    keys: list[bytes | None]
    """Hash of the bytes of each image; None for one that is not read yet, or is broken."""
    cache: Path
    """Folder of cached embeddings and thumbnails."""
    seen: int = 0
    """Number of images that were read, broken ones included."""
    broken: list[str] = field(default_factory=list)
    """Why images could not be read or decoded, a line for each."""
    problem: str = ""
    """Why `build` ended early, in one line."""

    @property
    def has_ended(self) -> bool:
        """Whether `build` has ended."""
        return bool(self.problem) or self.seen == len(self.folder.names)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The images of an index by similarity to a query under one model."""

    order: list[int]
    """Numbers of the images, the most similar first."""
    similarities: list[float]
    """Cosines, in that order."""
    query_ms: float
    """Of the query's embedding and the order."""


# ---- building ----------------------------------------------------------------------------------------------------


def empty_index(folder: ImageFolder, models: Sequence[DemoModel]) -> Index:
    """An index without embeddings. Makes the cache, `$XDG_CACHE_HOME/gkl_vl/demo`.

    Raises: OSError where it cannot be made.
    """
    cache = disk_cache.cache_folder("demo")
    (cache / "thumbnails").mkdir(mode=0o700, parents=True, exist_ok=True)
    count = len(folder.names)
    return Index(
        folder=folder,
        models=tuple(models),
        rows=tuple(torch.zeros(count, model.embedder.clip.embed_dim) for model in models),
        ready=torch.zeros(count, dtype=torch.bool),
        keys=[None] * count,
        cache=cache,
    )


def build(index: Index, stop: Event) -> None:
    """Embeds the images of the folder, until `stop` is set, and writes the cache.

    Raises nothing, as it runs in a thread: an error becomes `index.problem`.
    """
    try:
        _build(index, stop)
    except Exception as error:
        index.problem = first_line(error)
        notice(f"images are embedded up to {index.seen} of {len(index.folder.names)}: {index.problem}")


def _build(index: Index, stop: Event) -> None:
    stores = [_open_store(index, model) for model in index.models]
    count = len(index.folder.names)
    with ThreadPoolExecutor(_READERS) as readers:
        for start in range(0, count, _BATCH):
            if stop.is_set():
                break
            batch = range(start, min(start + _BATCH, count))
            images = [image for image in readers.map(lambda number: _read(index, number, stores), batch) if image]
            for model, rows, store in zip(index.models, index.rows, stores, strict=True):
                decoded = [(image.key, image.pixels) for image in images if image.pixels is not None]
                new = {key: pixels for key, pixels in decoded if key not in store.rows}
                if new:
                    store.add(new, embed_images(model, list(new.values())))
                for image in images:
                    rows[image.number] = store.rows[image.key]
            index.ready[[image.number for image in images]] = True
            index.seen = batch.stop
    for store in stores:
        # Embeddings of images that are gone are dropped, but for a folder that was not read to its end.
        store.write([key for key in index.keys if key is not None] if index.has_ended else store.rows)


@dataclass(frozen=True, kw_only=True)
class _ReadImage:
    number: int
    key: bytes
    pixels: Image.Image | None
    """None where every model has its embedding and a thumbnail exists."""


def _read(index: Index, number: int, stores: Sequence["_Store"]) -> _ReadImage | None:
    """Reads an image, and where that is needed decodes it and writes its thumbnail. None for a broken one."""
    try:
        content = index.folder.read(number)
        key = hashlib.sha256(f"rules {DECODE_RULES} ".encode() + content).digest()
        thumbnail, pixels = _thumbnail_path(index, key), None
        if not thumbnail.is_file() or any(key not in store.rows for store in stores):
            pixels = decode_named(content, index.folder.names[number])
            with replacing(thumbnail) as scratch:
                scratch.write_bytes(as_jpeg(pixels, THUMBNAIL_PIXELS))
    except UserError as error:
        index.broken.append(str(error))
        return None
    index.keys[number] = key
    return _ReadImage(number=number, key=key, pixels=pixels)


def _thumbnail_path(index: Index, key: bytes) -> Path:
    return index.cache / "thumbnails" / f"{key.hex()}.jpg"


@dataclass(kw_only=True)
class _Store:
    """The cached embeddings of one model and folder."""

    path: Path
    rows: dict[bytes, Tensor]
    unwritten: int = 0

    def add(self, images: Iterable[bytes], rows: Float[Tensor, "n d"]) -> None:
        """Adds embeddings by key. Writes them from time to time."""
        added = dict(zip(images, rows, strict=True))
        self.rows |= added
        self.unwritten += len(added)
        if self.unwritten >= _SAVE_EVERY:
            self.write(self.rows)

    def write(self, keys: Iterable[bytes]) -> None:
        """Replaces the file by the embeddings with these keys, if that changes it."""
        kept = {key: self.rows[key] for key in keys}
        if kept and (self.unwritten or len(kept) < len(self.rows)):
            table = torch.frombuffer(bytearray(b"".join(kept)), dtype=torch.uint8).view(-1, _KEY_BYTES)
            disk_cache.write(self.path, {"keys": table, "rows": torch.stack(list(kept.values()))})
            self.unwritten = 0


def _open_store(index: Index, model: DemoModel) -> _Store:
    digest = hashlib.sha256(model.embedder.fingerprint + os.fsencode(index.folder.root))
    path = index.cache / f"images_{digest.hexdigest()[:32]}.safetensors"
    stored = disk_cache.read(path)
    if stored is None:
        return _Store(path=path, rows={})
    keys = [bytes(key) for key in stored["keys"].numpy()]
    return _Store(path=path, rows=dict(zip(keys, stored["rows"], strict=True)))


# ---- searching ---------------------------------------------------------------------------------------------------


def search_words(index: Index, words: str) -> list[Ranking]:
    """Ranks the images by their similarity to a text, for each model of the index.

    Raises: UserError for an empty text, or as long as no image is embedded.
    """
    if not words.strip():
        raise UserError("Type what to look for, or drop an image.")
    return _search(index, lambda model: embed_texts(model.embedder, [words.strip()])[0])


def search_image(index: Index, image: Image.Image) -> list[Ranking]:
    """Ranks the images by their similarity to a decoded image, for each model of the index.

    Raises: UserError as long as no image is embedded.
    """
    return _search(index, lambda model: embed_images(model, [image])[0])


def _search(index: Index, embed: Callable[[DemoModel], Tensor]) -> list[Ranking]:
    numbers = index.ready.nonzero()[:, 0]
    if not len(numbers) and index.has_ended:
        raise UserError(f"No image of the folder is embedded: {index.problem if index.problem else index.broken[0]}")
    if not len(numbers):
        raise UserError("No image is embedded yet: try again in a moment.")
    rankings = []
    for model, rows in zip(index.models, index.rows, strict=True):
        (order, similarities), ms = timed(lambda model=model, rows=rows: _ranked(rows[numbers], embed(model)))
        rankings.append(Ranking(order=numbers[order].tolist(), similarities=similarities.tolist(), query_ms=ms))
    return rankings


def _ranked(rows: Float[Tensor, "n d"], query: Float[Tensor, " d"]) -> tuple[Tensor, Tensor]:
    similarities = rows @ query
    order = similarities.argsort(descending=True, stable=True)
    return order, similarities[order]


def shared_first(rankings: Sequence[Ranking], count: int) -> list[int]:
    """Numbers of the images that are among the first `count` of every ranking."""
    first = [set(ranking.order[:count]) for ranking in rankings]
    return sorted(set.intersection(*first))


# ---- images for the page -----------------------------------------------------------------------------------------


def thumbnail(index: Index, number: int) -> bytes:
    """A JPEG of at most `THUMBNAIL_PIXELS`. Raises: UserError for an image that cannot be read or decoded."""
    key = index.keys[number]
    if key is not None and (path := _thumbnail_path(index, key)).is_file():
        return path.read_bytes()
    return as_jpeg(decode_named(index.folder.read(number), index.folder.names[number]), THUMBNAIL_PIXELS)


def large(index: Index, number: int) -> bytes:
    """A JPEG of at most `LARGE_PIXELS`. Raises: UserError as `thumbnail`."""
    return as_jpeg(decode_named(index.folder.read(number), index.folder.names[number]), LARGE_PIXELS)
