"""Teachers that read stored outputs: augmented views of a small set, with a CLIP's embeddings or a classifier's logits.

A frozen teacher has the same output for the same view every time. With a fixed number of augmented views per image,
the views are made once, the teacher is evaluated on them once, and a training step costs the student alone. Results
are kept on disk under a hash of everything that they depend on.

Axis letters: p = pairs in the set, v = views of each, c = most captions of a pair, e = the teacher's embedding,
s = side of the student's image; for classifiers N = images, C = classes, k = stored logits.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float16, Int, Int16, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from gkl_vl import disk_cache
from gkl_vl.data.augment import apply_seeded, describe
from gkl_vl.data.captions import usable_captions
from gkl_vl.data.files import stable_hash
from gkl_vl.data.images import DECODE_RULES, decode
from gkl_vl.data.sources import RawPair
from gkl_vl.data.views import Views
from gkl_vl.data.workers import end_with_parent, worker_batches
from gkl_vl.evaluation.embed import predict
from gkl_vl.models.classifiers import Classifier
from gkl_vl.models.clip import Clip, resize
from gkl_vl.models.fingerprint import add_clip, add_model
from gkl_vl.teachers.online import LabelTeacher, Teacher, teacher_scales

BATCH = 128


@dataclass(frozen=True)
class StoredViews:
    """Views at the student's size, and the teacher's L2-normalised embeddings in fp32."""

    pixels: UInt8[Tensor, "p v 3 s s"]
    image: Float[Tensor, "p v e"]
    text: Float[Tensor, "p c e"]


def stored_teacher(clip: Clip, stored: StoredViews, device: torch.device) -> Teacher:
    """A teacher that looks embeddings up by the batch's `view_rows` and, if it has captions, `caption_rows`."""
    image, text, scales = stored.image.to(device), stored.text.to(device), teacher_scales(clip)

    def teacher(batch: dict[str, Any]) -> dict[str, Tensor]:
        views = batch["view_rows"]
        outputs = {"teacher_image": image[views[:, 0], views[:, 1]]} | scales
        if "caption_rows" in batch:
            captions = batch["caption_rows"]
            outputs["teacher_text"] = text[captions[..., 0], captions[..., 1]]
        return outputs

    return teacher


def store_views(
    *,
    clip: Clip,
    pairs: Sequence[RawPair],
    num_views: int,
    augment: Callable[..., Tensor],
    size: int,
    num_workers: int,
    folder: Path | None = None,
) -> StoredViews:
    """Makes `num_views` views of every image and embeds them and every caption, or loads the result of an earlier run.

    View v of pair p is drawn by (p, v) alone, so it is the same in every run. Both models get the same view, each at
    its own size.

    Args:
        clip: the frozen teacher, on its device.
        augment: PIL image -> uint8 view.
        size: side of the student's image, in pixels.
        folder: where to store the result; None = the user's cache (`disk_cache.cache_folder`).
    """
    path = (folder or cache_folder()) / f"{_key(clip, pairs, num_views, augment, size)}.safetensors"
    tensors = disk_cache.read(path)
    if tensors is None:
        pixels, image = _embed_images(clip, _ViewSet(pairs, num_views, augment), size, num_workers)
        tensors = {
            "pixels": pixels.view(len(pairs), num_views, *pixels.shape[1:]),
            "image": image.view(len(pairs), num_views, -1),
            "text": _embed_texts(clip, pairs),
        }
        disk_cache.write(path, tensors)
    return StoredViews(**tensors)


def cache_folder() -> Path:
    """Default folder of stored teacher outputs."""
    return disk_cache.cache_folder("teacher")


def _key(clip: Clip, pairs: Sequence[RawPair], num_views: int, augment: Callable[..., Tensor], size: int) -> str:
    """Hash of everything that decides the stored tensors: number, size and augmentation of the views, the teacher
    (`add_clip`, which has the versions) and its device type, pairs in their order, their tokens, rules of decoding."""
    device = next(clip.towers.parameters()).device.type
    digest = hashlib.sha256(f"{num_views} {size} {describe(augment)} {device} rules {DECODE_RULES}".encode())
    add_clip(digest, clip)
    for pair in pairs:
        digest.update(repr((pair.key, pair.captions, len(pair.image))).encode())
        digest.update(pair.image)
    tokens = clip.tokenize(_distinct_captions(pairs))
    digest.update(f"{tokens.dtype} {tuple(tokens.shape)}".encode() + tokens.numpy().tobytes())
    return digest.hexdigest()[:32]


def _distinct_captions(pairs: Sequence[RawPair]) -> list[str]:
    return list(dict.fromkeys(caption for pair in pairs for caption in usable_captions(pair.captions)))


class _ViewSet(Dataset):
    """View v of pair p at index p * num_views + v."""

    def __init__(self, pairs: Sequence[RawPair], num_views: int, augment: Callable[..., Tensor]):
        self.pairs, self.num_views, self.augment = pairs, num_views, augment

    def __len__(self) -> int:
        return len(self.pairs) * self.num_views

    def __getitem__(self, index: int) -> Tensor:
        row, view = divmod(index, self.num_views)
        return apply_seeded(self.augment, decode(self.pairs[row].image), stable_hash(f"view {view} of {row}"))


@torch.inference_mode()
def _embed_images(
    clip: Clip, images: _ViewSet, size: int, num_workers: int
) -> tuple[UInt8[Tensor, "m 3 s s"], Float[Tensor, "m e"]]:
    device = next(clip.towers.parameters()).device
    generator = torch.Generator()  # a DataLoader draws a seed, which must not advance the training's generator
    loader = DataLoader(
        images, batch_size=BATCH, num_workers=num_workers, worker_init_fn=end_with_parent, generator=generator
    )
    pixels, embeddings = [], []
    bar = {"desc": f"teacher embeds {len(images):,} views, once", "total": len(loader)}
    for views in tqdm(worker_batches(loader), **bar, disable=not sys.stderr.isatty()):
        embeddings.append(clip.towers.encode_image(clip.prepare(views.to(device))).float().cpu())
        pixels.append((resize(views, size) * 255).round().byte())
    return torch.cat(pixels), torch.cat(embeddings)


@torch.inference_mode()
def _embed_texts(clip: Clip, pairs: Sequence[RawPair]) -> Float[Tensor, "p c e"]:
    device = next(clip.towers.parameters()).device
    captions = [usable_captions(pair.captions) for pair in pairs]
    distinct = _distinct_captions(pairs)
    batches = [distinct[start : start + BATCH] for start in range(0, len(distinct), BATCH)]
    embeddings = torch.cat([clip.towers.encode_text(clip.tokenize(b).to(device)).float().cpu() for b in batches])
    number = {caption: index for index, caption in enumerate(distinct)}
    table = torch.zeros(len(pairs), max(map(len, captions)), embeddings.shape[1])
    for row, row_captions in enumerate(captions):
        table[row, : len(row_captions)] = embeddings[[number[caption] for caption in row_captions]]
    return table


@dataclass(frozen=True)
class StoredLogits:
    """A classifier's logits of each view of each image in fp16: all of them, or the k largest."""

    values: Float16[Tensor, "v N k"]
    classes: Int16[Tensor, "v N k"]
    """Classes of the values, largest value first; in class order where all are stored."""
    rest: Float16[Tensor, "v N"]
    """Logit of each class that is not stored, chosen so that their total probability is unchanged."""


def stored_label_teacher(stored: StoredLogits, num_classes: int) -> LabelTeacher:
    """A teacher that looks logits up by the batch's `view` and `index`; the store stays in main memory."""

    def teacher(batch: dict[str, Any]) -> Float[Tensor, "n C"]:
        view, index = batch["view"], batch["index"].cpu()
        logits = stored.rest[view, index].float()[:, None].repeat(1, num_classes)
        logits.scatter_(1, stored.classes[view, index].long(), stored.values[view, index].float())
        return logits.to(batch["image"].device)

    return teacher


def store_logits(
    *,
    classifier: Classifier,
    views: Views,
    labels: Int[Tensor, " N"],
    contents: str,
    num_views: int,
    top_k: int | None,
    device: torch.device,
    folder: Path | None = None,
) -> StoredLogits:
    """Computes the logits of views 0 to num_views - 1 of every image, or loads the result of an earlier run.

    Args:
        classifier: the frozen teacher, in evaluation mode, on `device`.
        contents: identity of the set of images, a hash (`data.identity.images_identity`).
        top_k: number of logits stored of each view; None = all.
        folder: where to store the result; None = the user's cache.

    The key holds the classifier (`add_model`, which has the versions), its normalisation and device type, number and
    settings of the views, the rules of decoding, and labels and images in their order.
    """
    digest = hashlib.sha256(f"{classifier.mean} {classifier.std} {num_views} {top_k} {device.type}".encode())
    digest.update(f"rules {DECODE_RULES} {contents} {views.description()}".encode() + labels.numpy().tobytes())
    add_model(digest, classifier.model)
    path = (folder or cache_folder()) / f"logits_{digest.hexdigest()[:32]}.safetensors"
    tensors = disk_cache.read(path)
    if tensors is None:
        parts = [
            _compress(logits, top_k)
            for view in tqdm(
                range(num_views), desc="teacher logits of each view, once", disable=not sys.stderr.isatty()
            )
            for logits in [predict(classifier=classifier, views=views, view=view, count=len(labels), device=device)]
        ]
        names = ("values", "classes", "rest")
        tensors = {name: torch.stack([part[i] for part in parts]) for i, name in enumerate(names)}
        disk_cache.write(path, tensors)
    return StoredLogits(**tensors)


def _compress(logits: Float[Tensor, "N C"], top_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """`values`, `classes` and `rest` of `StoredLogits`."""
    num_classes = logits.shape[1]
    if top_k is None or top_k >= num_classes:
        classes = torch.arange(num_classes, dtype=torch.int16).expand(len(logits), num_classes)
        return logits.half(), classes.contiguous(), torch.zeros(len(logits), dtype=torch.float16)
    order = logits.argsort(dim=1, descending=True)
    others = logits.gather(1, order[:, top_k:])
    rest = others.logsumexp(dim=1) - torch.tensor(float(num_classes - top_k)).log()
    kept = order[:, :top_k]
    return logits.gather(1, kept).half(), kept.short(), rest.half()
