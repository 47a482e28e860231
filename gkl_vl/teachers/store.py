"""A classifier's logits of numbered views of a set of images, computed once and kept on disk.

A frozen teacher has the same output for the same view every time. Results are kept under a hash of everything that they
depend on.
Axis letters: v = views of each image, N = images, C = classes, k = stored logits.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float16, Int, Int16
from torch import Tensor
from tqdm import tqdm

from gkl_vl import disk_cache
from gkl_vl.data.images import DECODE_RULES
from gkl_vl.data.views import Views
from gkl_vl.evaluation.embed import predict
from gkl_vl.models.classifiers import Classifier
from gkl_vl.models.fingerprint import add_model
from gkl_vl.teachers.online import LabelTeacher


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
    path = (folder or disk_cache.cache_folder("teacher")) / f"logits_{digest.hexdigest()[:32]}.safetensors"
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
