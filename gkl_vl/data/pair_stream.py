"""Batches of image-text pairs from a `Source`, with a position from which a run resumes exactly.

Random draws for a pair depend only on (seed, epoch, key), so that a stream resumes at any pair, bit for bit, without
decoding the earlier ones. The loader shards by rank and worker itself: do not hand it to `accelerator.prepare`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import count, cycle, islice
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gkl_vl.data.augment import apply_seeded, view_seed
from gkl_vl.data.captions import draw_captions, usable_captions
from gkl_vl.data.files import stable_hash
from gkl_vl.data.images import BrokenSample, decode
from gkl_vl.data.sources import RawPair, Source
from gkl_vl.data.workers import end_with_parent, worker_batches
from gkl_vl.errors import UserError, notice

BROKEN_WINDOW, BROKEN_SHARE = 1000, 0.05
"""A worker stops if more than BROKEN_SHARE * BROKEN_WINDOW of its last BROKEN_WINDOW pairs are broken."""
CACHED_CAPTIONS = 2**14
"""Captions whose tokens a worker keeps: 20 MB with CLIP's 77 tokens."""


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
    recent: tuple[int, ...] = ()
    """Numbers, among `seen`, of the broken pairs of the last BROKEN_WINDOW."""


@dataclass(frozen=True, slots=True)
class Position:
    """Progress of a rank's stream: batches taken, and the place of each worker. JSON stores places as lists."""

    batches: int
    places: tuple[Place, ...]

    @staticmethod
    def of(stored: dict[str, Any]) -> "Position":
        """The position that `PairLoader.position()` returned, also after a round trip through JSON.

        Raises: UserError for another content.
        """
        try:
            places = [Place(*counts, recent=tuple(recent)) for *counts, recent in stored["places"]]
            return Position(stored["batches"], tuple(places))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint's position {stored!r} is damaged: resume from another one") from error


@runtime_checkable
class StoredOutputs(Protocol):
    """A teacher's outputs for numbered views of every pair of a source; picklable."""

    @property
    def views(self) -> int:
        """Views of each image."""
        ...

    def of_pair(self, pair: RawPair, view: int, captions: Sequence[int], /) -> dict[str, torch.Tensor]:
        """Outputs for a view, and for usable captions by number, to be stacked in a batch; "image" is a kept view.

        Raises: BrokenSample for a pair without outputs.
        """
        ...


class PairStream(IterableDataset):
    """Endless batches of one rank as dicts: {"image": uint8 [n, 3, r, r], "keys", "text", "text_ids", ...}.

    `tokenizers` maps keys of the batch to tokenizers: {"text": student's, "teacher_text": teacher's}. Tokens are int
    [n, length] and `text_ids` [n], or [n, c, length] and [n, c] with c = `captions_per_image` > 1: different captions
    where the pair has as many, else some twice, and of several columns as `draw_captions` does. Batches of a source
    without captions have only images and keys.
    With `stored`, an image is one of its numbered views, a different one each epoch, drawn again at this size unless
    the views are kept, and a batch has the teacher's outputs.
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
        captions_per_image: int = 1,
        caption_weights: Sequence[float] | None = None,
        stored: StoredOutputs | None = None,
        start: Position | None = None,
    ):
        self.source, self.augment = source, augment
        self.tokenizers = {name: _CachedTokens(tokenize) for name, tokenize in tokenizers.items()}
        self.batch_size, self.seed, self.stored = batch_size, seed, stored
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.captions_per_image, self.caption_weights = captions_per_image, caption_weights
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
        if rank == 0 and (note := source.note(num_parts)):
            notice(note)

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
        broken = _Broken(self.source, start)
        samples: list[dict[str, Any]] = []
        for epoch in count(start.epoch):
            offset = start.used if epoch == start.epoch else 0
            used, usable = offset, offset  # what a run used before a resume may be usable
            pairs = self.source.epoch(self.seed, epoch, part, num_parts)
            for used, pair in enumerate(islice(pairs, offset, None), offset + 1):
                broken.seen += 1
                try:
                    samples.append(self._sample(pair, epoch))
                    usable += 1
                except BrokenSample as error:
                    broken.add(pair.key, error)
                if len(samples) == self.batch_size:
                    yield self._collate(samples) | {"worker": worker, "place": broken.place(epoch, used)}
                    samples = []
            if not usable:
                raise UserError(
                    f"{self.source.name!r} has no usable {self.source.things} for worker {part} of {num_parts}: {used} "
                    f"read{broken.examples_text()}: repair the data"
                )

    def _sample(self, pair: RawPair, epoch: int) -> dict[str, Any]:
        rng = random.Random(f"{self.seed}/{epoch}/{pair.key}")
        if pair.problem:
            raise BrokenSample(pair.problem)
        captions = usable_captions(pair.captions) if self.source.captioned else ()
        # The number of captions changes neither the first one nor the view.
        drawn = [rng.randrange(len(captions))] if captions else []
        if self.stored is None:
            image, outputs = apply_seeded(self.augment, decode(pair.image), rng.getrandbits(63)), {}
            drawn = self._captions(rng, pair, captions, drawn)
        else:
            drawn = self._captions(rng, pair, captions, drawn)
            image, outputs = self._stored(self.stored, pair, epoch, drawn)
        return {"key": pair.key, "image": image, "captions": [captions[i] for i in drawn], "outputs": outputs}

    def _captions(self, rng: random.Random, pair: RawPair, captions: Sequence[str], drawn: list[int]) -> list[int]:
        """Numbers of the captions of a sample; of a single column the first one is drawn already."""
        if len(set(pair.columns)) > 1:
            columns = [column for text, column in zip(pair.captions, pair.columns, strict=True) if text.strip()]
            return draw_captions(rng, columns, self.caption_weights, self.captions_per_image)
        others = [i for i in range(len(captions)) if i not in drawn]
        drawn = drawn + rng.sample(others, min(self.captions_per_image - 1, len(others)))
        return list(islice(cycle(drawn), self.captions_per_image))

    def _stored(
        self, stored: StoredOutputs, pair: RawPair, epoch: int, captions: list[int]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The view of this epoch, kept or drawn again, and the teacher's outputs."""
        view = epoch % stored.views
        outputs = stored.of_pair(pair, view, captions)
        kept = outputs.pop("image", None)
        if kept is not None:
            return kept, outputs
        return apply_seeded(self.augment, decode(pair.image), view_seed(pair.key, view)), outputs

    def _collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "image": torch.stack([sample["image"] for sample in samples]),
            "keys": [sample["key"] for sample in samples],
        }
        for name in samples[0]["outputs"]:
            batch[name] = torch.stack([sample["outputs"][name] for sample in samples])
        if not self.source.captioned:
            return batch
        if self.captions_per_image == 1:
            batch |= {name: batch[name].squeeze(1) for name in batch if name.startswith("teacher_text")}
        captions = [caption for sample in samples for caption in sample["captions"]]
        of_texts = {name: tokenize(captions) for name, tokenize in self.tokenizers.items()}
        of_texts["text_ids"] = torch.tensor([stable_hash(caption) for caption in captions])
        if self.captions_per_image > 1:
            of_texts = {name: rows.unflatten(0, (len(samples), -1)) for name, rows in of_texts.items()}
        return batch | of_texts


class _CachedTokens:
    """A tokenizer that keeps the rows of the captions it saw last: small sets repeat theirs every epoch.

    Cleaning and tokenising are 3/4 of a worker's time where views are stored.
    """

    def __init__(self, tokenize: Callable[[list[str]], torch.Tensor]):
        self.tokenize = tokenize
        self.rows: dict[str, torch.Tensor] = {}

    def __call__(self, captions: list[str]) -> torch.Tensor:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.rows]
        if len(self.rows) + len(new) > CACHED_CAPTIONS:
            self.rows, new = {}, list(dict.fromkeys(captions))
        if new:
            # Copies: a row that is a view would keep the tokens of its whole batch alive.
            self.rows |= {caption: row.clone() for caption, row in zip(new, self.tokenize(new), strict=True)}
        return torch.stack([self.rows[caption] for caption in captions])


class _Broken:
    """Counts of one worker's broken pairs. Stops the run when they are frequent among the last BROKEN_WINDOW."""

    def __init__(self, source: Source, start: Place):
        self.source = source
        self.seen, self.skipped, self.recent = start.seen, start.skipped, list(start.recent)
        self.examples: list[str] = []

    def add(self, key: str, error: BrokenSample) -> None:
        """Counts the pair seen last as broken. Raises: UserError if too many of the last ones are."""
        self.skipped += 1
        self.recent = [*self._of_window(), self.seen]
        self.examples = [*self.examples, f"{key} ({error})"][-3:]
        if len(self.recent) > BROKEN_SHARE * BROKEN_WINDOW:
            raise UserError(
                f"{len(self.recent)} of the last {min(self.seen, BROKEN_WINDOW)} {self.source.things} of "
                f"{self.source.name!r} are broken{self.examples_text()}: repair the data"
            ) from error

    def place(self, epoch: int, used: int) -> Place:
        return Place(epoch, used, self.seen, self.skipped, tuple(self._of_window()))

    def examples_text(self) -> str:
        return f", among them {'; '.join(self.examples)}" if self.examples else ""

    def _of_window(self) -> list[int]:
        return [number for number in self.recent if number > self.seen - BROKEN_WINDOW]


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
            worker_init_fn=end_with_parent,
            # DataLoader draws a seed when it starts; from the global generator, a resumed run would be one draw ahead.
            generator=torch.Generator(),
        )

    def _rewind(self) -> None:
        self._places = list(self.stream.start.places)
        self._taken = self.stream.start.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._rewind()  # the stream restarts as well
        for batch in worker_batches(self.loader):
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
