"""Builds a store of teacher embeddings (`teachers/embeddings.py`) of every pair of a source.

Worker processes read, decode and augment; this process embeds, and writes a file for each block when it is complete. A
block that has a file is not built again, so that a killed build goes on where it stopped.
Axis letters: m = whole pairs of a batch, v = views of each, c = captions of a batch, e = the teacher's embedding,
p = pairs of a block.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from gkl_vl import disk_cache
from gkl_vl.atomic import write_json
from gkl_vl.data.augment import Augmentation, apply_seeded, draws, settings_of, view_seed
from gkl_vl.data.captions import usable_captions
from gkl_vl.data.images import DECODE_RULES, BrokenSample, decode
from gkl_vl.data.pair_stream import BROKEN_SHARE, BROKEN_WINDOW
from gkl_vl.data.sources import RawPair, Source
from gkl_vl.data.workers import end_with_parent, worker_batches
from gkl_vl.errors import UserError, first_line
from gkl_vl.models.clip import BUNDLED_TEACHER, Clip, resize
from gkl_vl.models.fingerprint import add_clip
from gkl_vl.teachers.embeddings import (
    BROKEN,
    FORMAT,
    MANIFEST,
    Manifest,
    StoredTeacher,
    StoreDtype,
    block_file,
    block_names,
    identity_of,
    packed,
    pair_digest,
)
from gkl_vl.teachers.online import teacher_scales

BATCH = 256
"""Views that are embedded at a time."""


# ---- the store ---------------------------------------------------------------------------------------------------


def describe_store(
    teachers: Sequence[Clip],
    source: Source,
    augmentation: Augmentation,
    *,
    views: int,
    dtype: StoreDtype,
    precision: str = "no",
    kept_size: int | None = None,
) -> Manifest:
    """The manifest of a store that is not built yet. `kept_size`: side of the views to keep; None = none."""
    return Manifest(
        format=FORMAT,
        teachers=[_described(teacher) for teacher in teachers],
        views=views,
        dtype=dtype,
        precision=precision,
        captioned=source.captioned,
        blocks=block_names(source),
        kept_size=kept_size,
        augmentation=settings_of(augmentation),
        draws=draws(augmentation),
        decode_rules=DECODE_RULES,
    )


def _described(teacher: Clip) -> StoredTeacher:
    digest = hashlib.sha256()
    add_clip(digest, teacher)
    scales = {name: value.item() for name, value in teacher_scales(teacher).items()}
    return StoredTeacher(
        name="bundled" if teacher.name == BUNDLED_TEACHER else teacher.name,
        digest=digest.hexdigest(),
        embed_dim=teacher.embed_dim,
        logit_scale=scales["teacher_logit_scale"],
        logit_bias=scales.get("teacher_logit_bias"),
    )


def missing_blocks(folder: Path, manifest: Manifest) -> list[int]:
    """The blocks without a file. Raises: UserError for a file of another store, and for a damaged one."""
    missing, identity = [], identity_of(manifest)
    for block in range(len(manifest.blocks)):
        path = folder / block_file(block)
        if not path.is_file():
            missing.append(block)
        elif not torch.equal(_tensor(path, "identity"), identity):
            raise UserError(
                f"{path} is of a store with other teachers, views, data, precision or versions: name another --out, or "
                "remove it"
            )
    return missing


def finish_store(folder: Path, manifest: Manifest) -> Manifest:
    """Counts the pairs of all files and writes the manifest, without which a store cannot be used."""
    digests = [_tensor(folder / block_file(block), "digest") for block in range(len(manifest.blocks))]
    pairs, broken = sum(map(len, digests)), sum(int((digest == BROKEN).sum()) for digest in digests)
    finished = replace(manifest, pairs=pairs, broken=broken)
    write_json(folder / MANIFEST, asdict(finished), indent=1)
    return finished


def _tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): remove it and build it again") from error


# ---- building ----------------------------------------------------------------------------------------------------


def build_blocks(
    folder: Path,
    manifest: Manifest,
    blocks: Sequence[int],
    teachers: Sequence[Clip],
    source: Source,
    augmentation: Augmentation,
    *,
    num_workers: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    quiet: bool = False,
) -> None:
    """Embeds the pairs of some blocks and writes their files.

    Args:
        teachers: frozen, on their device.
        autocast: entered around the teachers' forward passes.

    A block is in memory until its file is written: its embeddings take `(views + captions) * e * 2` bytes a pair.

    Raises: UserError for a source that cannot be read, for a block with more broken pairs than training accepts, and
        for embeddings that are not finite.
    """
    stream = _ViewStream(
        source=source,
        blocks=blocks,
        augment=augmentation(max(clip.image_size for clip in teachers)),
        views=manifest.views,
        tokenizers=[clip.tokenize for clip in teachers] if manifest.captioned else [],
        num_workers=num_workers,
    )
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),  # it draws a seed, which must not advance the process's generator
    )
    contents = {block: _Block(open_streams=stream.streams_of_a_block) for block in blocks}
    with tqdm(desc="teacher embeds", unit=" pairs", disable=quiet or not sys.stderr.isatty()) as bar:
        for item in worker_batches(loader):
            if isinstance(item, str):
                raise UserError(item)
            number, batch = item
            block = contents[number]
            if batch is not None:
                block.add(batch, _embedded(batch, teachers, manifest, autocast))
                bar.update(len(batch.rows) + len(batch.broken))
                continue
            block.open_streams -= 1
            if not block.open_streams:
                block.refuse_broken(manifest.blocks[number])
                disk_cache.write(folder / block_file(number), block.tensors() | {"identity": identity_of(manifest)})
                del contents[number]


@torch.inference_mode()
def _embedded(
    batch: "_Batch", teachers: Sequence[Clip], manifest: Manifest, autocast: Callable[[], AbstractContextManager]
) -> dict[str, Tensor]:
    """image.t [m, v, e], text.t [c, e] of each teacher and kept views, as they are stored. {} without whole pairs."""
    tensors: dict[str, Tensor] = {}
    if not batch.rows:
        return tensors
    if manifest.kept_size is not None:
        kept = (resize(batch.views, manifest.kept_size) * 255).round().byte()
        tensors["pixels"] = kept.unflatten(0, (len(batch.rows), -1))
    for number, clip in enumerate(teachers):
        device = clip.towers.log_scale().device
        with autocast():
            image = clip.towers.encode_image(clip.prepare(batch.views.to(device))).float().cpu()
            embedded = {f"image.{number}": image.unflatten(0, (len(batch.rows), -1))}
            if batch.tokens:
                text = clip.towers.encode_text_by_length(batch.tokens[number].to(device))
                embedded[f"text.{number}"] = text.float().cpu()
        for name, rows in embedded.items():
            if not bool(rows.isfinite().all()):
                raise UserError(f"embeddings of {clip.name} are not finite: give --precision fp32")
            tensors |= packed(name, rows, manifest.dtype)
    return tensors


@dataclass(kw_only=True)
class _Block:
    """What is known of a block that is not complete."""

    open_streams: int
    """Workers that have more of it."""
    rows: list[int] = field(default_factory=list)
    """Of the whole pairs, in the order in which they came; the next two as well."""
    digests: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)
    """Row of each broken pair, and what is wrong with it."""
    parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, batch: "_Batch", tensors: dict[str, Tensor]) -> None:
        """Adds a batch and its embeddings."""
        self.rows += batch.rows
        self.digests += batch.digests
        self.counts += batch.counts
        self.broken |= batch.broken
        for name, tensor in tensors.items():
            self.parts.setdefault(name, []).append(tensor)

    def refuse_broken(self, name: str) -> None:
        """Raises: UserError where training would stop: no file is written."""
        pairs = len(self.rows) + len(self.broken)
        if self.broken and (not self.rows or len(self.broken) > BROKEN_SHARE * max(pairs, BROKEN_WINDOW)):
            examples = "; ".join(list(self.broken.values())[:3])
            raise UserError(
                f"{len(self.broken)} of {pairs} pairs of {name!r} are broken, among them {examples}: repair the data"
            )

    def tensors(self) -> dict[str, Tensor]:
        """The content of its file, in the order of the rows."""
        num_pairs = len(self.rows) + len(self.broken)
        order = sorted(range(len(self.rows)), key=self.rows.__getitem__)
        rows = torch.tensor([self.rows[i] for i in order], dtype=torch.long)
        digest = torch.full((num_pairs,), BROKEN, dtype=torch.long)
        digest[rows] = torch.tensor([self.digests[i] for i in order], dtype=torch.long)
        counts = torch.zeros(num_pairs + 1, dtype=torch.int32)
        counts[rows + 1] = torch.tensor([self.counts[i] for i in order], dtype=torch.int32)
        tensors = {"digest": digest, "captions": counts.cumsum(0, dtype=torch.int32)}
        starts = torch.tensor([0, *self.counts]).cumsum(0).tolist()
        texts = [row for i in order for row in range(starts[i], starts[i + 1])]
        for name, parts in self.parts.items():
            joined = torch.cat(parts)
            if name.startswith("text"):
                tensors[name] = joined[texts]
            else:
                tensors[name] = joined.new_zeros(num_pairs, *joined.shape[1:])
                tensors[name][rows] = joined[order]
        return tensors


# ---- in the workers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Pairs of one block; digests, counts and tensors have the whole pairs alone."""

    rows: list[int]
    digests: list[int]
    counts: list[int]
    """Captions of each pair."""
    broken: dict[int, str]
    """Row of each pair that cannot be read, and why."""
    views: UInt8[Tensor, "mv 3 r r"]
    tokens: list[Int[Tensor, "c length"]]
    """Of each teacher."""


@dataclass(frozen=True, kw_only=True)
class _ViewStream(IterableDataset):
    """(block, batch) of views and tokens, then (block, None) at the end of the block.

    A worker reads whole blocks, or, where there are fewer blocks than workers, every num_workers-th pair of each. A
    source that cannot be read ends in its message, a str.
    """

    source: Source
    blocks: Sequence[int]
    augment: Callable[[Image.Image], Tensor]
    views: int
    tokenizers: Sequence[Callable[[list[str]], Tensor]]
    num_workers: int

    @property
    def streams_of_a_block(self) -> int:
        """Workers that read the same block."""
        return self.num_workers if len(self.blocks) < self.num_workers else 1

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker = info.id if info else 0
        shared = self.streams_of_a_block > 1
        try:
            for block in self.blocks if shared else self.blocks[worker :: max(self.num_workers, 1)]:
                pairs = self.source.pairs.read(block)
                if shared:
                    pairs = islice(pairs, worker, None, self.num_workers)
                while some := list(islice(pairs, max(BATCH // self.views, 1))):
                    yield block, self._batch(some)
                yield block, None
        except UserError as error:  # as data: a worker's exception would be raised with its traceback in the message
            yield str(error)

    def _batch(self, pairs: list[RawPair]) -> _Batch:
        rows, digests, counts, broken, captions, views = [], [], [], {}, [], []
        for pair in pairs:
            try:
                texts, drawn = self._captions_and_views(pair)
            except BrokenSample as error:
                broken[pair.row] = f"{pair.key} ({error})"
                continue
            rows.append(pair.row)
            digests.append(pair_digest(pair, texts))
            counts.append(len(texts))
            captions += texts
            views += drawn
        return _Batch(
            rows=rows,
            digests=digests,
            counts=counts,
            broken=broken,
            views=torch.stack(views) if views else torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
            tokens=[tokenize(captions) for tokenize in self.tokenizers] if captions else [],
        )

    def _captions_and_views(self, pair: RawPair) -> tuple[list[str], list[Tensor]]:
        """Raises: BrokenSample."""
        if pair.problem:
            raise BrokenSample(pair.problem)
        texts = usable_captions(pair.captions) if self.source.captioned else []
        image = decode(pair.image)
        return texts, [apply_seeded(self.augment, image, view_seed(pair.key, view)) for view in range(self.views)]
