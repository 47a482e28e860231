"""Stored teacher embeddings with the augmentations that made them.

A frozen teacher says the same of the same view every time. Where the training set is small enough to give each image a
fixed number of views (`pairs.Views`), the teacher embeds every view and every caption once, before training, and a step
costs the student alone. The embeddings are kept on disk under a hash of everything they depend on.

Axis letters: p = pairs in the set, v = views of each, c = captions of each at most, e = the teacher's embedding.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from gkl_vl.data.pairs import RawPair, Views, apply_seeded, decode
from gkl_vl.objectives import Teacher, teacher_scales
from gkl_vl.towers import Clip

BATCH = 128


@dataclass(frozen=True)
class StoredEmbeddings:
    """What the teacher said: L2-normalised, fp32."""

    image: Float[Tensor, "p v e"]
    text: Float[Tensor, "p c e"]


def stored_teacher(clip: Clip, stored: StoredEmbeddings, device: torch.device) -> Teacher:
    """A teacher that looks its embeddings up by the batch's `view_rows` and `caption_rows`."""
    image, text, scales = stored.image.to(device), stored.text.to(device), teacher_scales(clip)

    def teacher(batch: dict[str, Any]) -> dict[str, Tensor]:
        views, captions = batch["view_rows"], batch["caption_rows"]
        return {
            "teacher_image": image[views[:, 0], views[:, 1]],
            "teacher_text": text[captions[:, 0], captions[:, 1]],
        } | scales

    return teacher


def embed_views(
    *,
    clip: Clip,
    pairs: Sequence[RawPair],
    views: Views,
    augment: Callable[..., Tensor],
    num_workers: int,
    folder: Path | None = None,
) -> StoredEmbeddings:
    """Embed every view and caption of `pairs`, or load what an earlier run stored for exactly the same.

    Args:
        clip: the frozen teacher, on the device where it is to run.
        augment: PIL image -> uint8 view, as the training stream uses it.
        folder: where to keep the embeddings; None = `cache_folder()`.
    """
    path = (folder or cache_folder()) / f"{_key(clip, pairs, views, augment)}.safetensors"
    if not path.is_file():
        tensors = {
            "image": _embed_images(clip, _ViewSet(pairs, views, augment), num_workers).view(len(pairs), views.num, -1),
            "text": _embed_texts(clip, pairs),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.writing")
        save_file(tensors, aside)
        aside.replace(path)
    return StoredEmbeddings(**load_file(path))


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/gkl_vl/teacher`, by default `~/.cache/gkl_vl/teacher`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gkl_vl" / "teacher"


def _key(clip: Clip, pairs: Sequence[RawPair], views: Views, augment: Callable[..., Tensor]) -> str:
    digest = hashlib.sha256(f"{clip.preprocess} {views} {augment}".encode())
    for name, tensor in clip.towers.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for pair in pairs:
        digest.update(repr((pair.key, pair.captions)).encode())
        digest.update(pair.image)
    return digest.hexdigest()[:32]


class _ViewSet(Dataset):
    """View v of pair p at p * num_views + v."""

    def __init__(self, pairs: Sequence[RawPair], views: Views, augment: Callable[..., Tensor]):
        self.pairs, self.views, self.augment = pairs, views, augment

    def __len__(self) -> int:
        return len(self.pairs) * self.views.num

    def __getitem__(self, index: int) -> Tensor:
        row, view = divmod(index, self.views.num)
        image, _ = decode(self.pairs[row])
        return apply_seeded(self.augment, image, self.views.seed(row, view))


@torch.inference_mode()
def _embed_images(clip: Clip, images: _ViewSet, num_workers: int) -> Float[Tensor, "m e"]:
    device = next(clip.towers.parameters()).device
    loader = DataLoader(images, batch_size=BATCH, num_workers=num_workers)
    bar = tqdm(loader, desc=f"teacher embeds {len(images):,} views, once", disable=not sys.stderr.isatty())
    return torch.cat([clip.towers.encode_image(clip.prepare(batch.to(device))).float().cpu() for batch in bar])


@torch.inference_mode()
def _embed_texts(clip: Clip, pairs: Sequence[RawPair]) -> Float[Tensor, "p c e"]:
    device = next(clip.towers.parameters()).device
    captions = [decode(pair)[1] for pair in pairs]
    distinct = list(dict.fromkeys(caption for row in captions for caption in row))
    batches = [distinct[start : start + BATCH] for start in range(0, len(distinct), BATCH)]
    embeddings = torch.cat([clip.towers.encode_text(clip.tokenize(b).to(device)).float().cpu() for b in batches])
    number = {caption: index for index, caption in enumerate(distinct)}
    table = torch.zeros(len(pairs), max(map(len, captions)), embeddings.shape[1])
    for row, row_captions in enumerate(captions):
        table[row, : len(row_captions)] = embeddings[[number[caption] for caption in row_captions]]
    return table
