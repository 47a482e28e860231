"""Batches of image-text pairs from a `Source`, with a position from which a run resumes exactly.

Random draws for a pair depend only on (seed, epoch, key), so that a stream resumes at any pair, bit for bit, without
decoding the earlier ones. The loader shards by rank and worker itself: do not hand it to `accelerator.prepare`.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from itertools import count, islice
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gkl_vl.data.augment import apply_seeded
from gkl_vl.data.files import stable_hash
from gkl_vl.data.images import BrokenSample, decode
from gkl_vl.data.pairs import RawPair, Source
from gkl_vl.errors import UserError

BROKEN_WINDOW, BROKEN_SHARE = 1000, 0.05
"""A worker stops if more than BROKEN_SHARE * BROKEN_WINDOW of its first BROKEN_WINDOW pairs are broken."""


def usable_captions(pair: RawPair) -> list[str]:
    """The captions that are not empty. Raises: BrokenSample if there are none."""
    captions = [caption.strip() for caption in pair.captions if caption and caption.strip()]
    if not captions:
        raise BrokenSample("no caption")
    return captions


@dataclass(frozen=True, slots=True)
class Place:
    """Progress of one worker."""

    epoch: int = 0
    used: int = 0
    """Pairs of this epoch that were consumed, usable or not; earlier epochs need not be read again."""
    seen: int = 0
    """Pairs of all epochs that were consumed."""
    skipped: int = 0
    """Broken pairs among `seen`."""


@dataclass(frozen=True, slots=True)
class Position:
    """Progress of a rank's stream: batches taken, and the place of each worker. JSON stores places as lists."""

    batches: int
    places: tuple[Place, ...]

    @staticmethod
    def of(stored: dict[str, Any]) -> "Position":
        """The position that `PairLoader.position()` returned, also after a round trip through JSON."""
        return Position(stored["batches"], tuple(Place(*place) for place in stored["places"]))


class PairStream(IterableDataset):
    """Endless batches of one rank as dicts: {"image": uint8 [n, 3, r, r], "keys", "text", "text_ids", ...}.

    `tokenizers` maps keys of the batch to tokenizers: {"text": student's, "teacher_text": teacher's}. Batches of a
    source without captions have only images and keys.
    With `stored_views`, uint8 [pairs, views, 3, r, r], an image is one of its stored views, a different one each epoch,
    instead of a new augmentation; a batch then also has `view_rows` and `caption_rows` = (row in the set, number of the
    view or caption), the indices of stored teacher embeddings.
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
        except UserError as error:  # as data: a worker's exception would be raised with its traceback in the message
            yield {"error": str(error)}

    def _batches(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        parts = max(self.num_workers, 1)
        # The DataLoader takes batches from its workers in turn, from 0: after k batches worker k mod parts is next.
        worker = ((info.id if info else 0) + self.start.batches) % parts
        part, num_parts = self.rank * parts + worker, self.world_size * parts
        start = self.start.places[worker]
        seen, skipped = start.seen, start.skipped
        examples: list[str] = []
        samples: list[dict[str, Any]] = []
        for epoch, used, pair in self._pairs(part, num_parts, start):
            seen += 1
            try:
                samples.append(self._sample(pair, epoch))
            except BrokenSample as error:
                skipped += 1
                examples = [*examples, f"{pair.key} ({error})"][:3]
                if skipped > BROKEN_SHARE * BROKEN_WINDOW and seen <= BROKEN_WINDOW:
                    raise UserError(
                        f"{skipped} of the first {seen} {self.source.things} of {self.source.name!r} are broken, "
                        f"among them {'; '.join(examples)}: repair the data"
                    ) from error
            if len(samples) == self.batch_size:
                yield self._collate(samples) | {"worker": worker, "place": Place(epoch, used, seen, skipped)}
                samples = []

    def _pairs(self, part: int, num_parts: int, start: Place) -> Iterator[tuple[int, int, RawPair]]:
        """Yields (epoch, pairs of it used up to and including this one, pair) from `start` on, endlessly."""
        for epoch in count(start.epoch):
            offset = start.used if epoch == start.epoch else 0
            used = offset
            pairs = self.source.epoch(self.seed, epoch, part, num_parts)
            for used, pair in enumerate(islice(pairs, offset, None), offset + 1):
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
            view, image = 0, apply_seeded(self.augment, decode(pair.image), rng.getrandbits(63))
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
        batch["text_ids"] = torch.tensor([stable_hash(caption) for caption in captions])
        if self.stored_views is not None:
            batch["caption_rows"] = torch.tensor([sample["caption_row"] for sample in samples])
        return batch | {name: tokenize(captions) for name, tokenize in self.tokenizers.items()}


class PairLoader:
    """Batches of a `PairStream` from worker processes, with the position after each: the training loop's `Loader`."""

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
            # DataLoader draws a seed when it starts; from the global generator, a resumed run would be one draw ahead.
            generator=torch.Generator(),
        )

    def _rewind(self) -> None:
        self._places = list(self.stream.start.places)
        self._taken = self.stream.start.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._rewind()  # the stream restarts as well
        for batch in self.loader:
            if "error" in batch:
                raise UserError(batch["error"])
            self._taken += 1
            self._places[batch.pop("worker")] = batch.pop("place")
            yield batch

    def position(self) -> dict[str, Any]:
        """The position after the last batch taken, from which another stream starts (`Position.of`)."""
        return {"batches": self._taken, "places": [astuple(place) for place in self._places]}

    def num_skipped(self) -> int:
        """Broken pairs that this rank has skipped so far."""
        return sum(place.skipped for place in self._places)
