"""The bundled teacher's stored embeddings as tables, for studies that choose their own views and captions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gkl_vl.models.clip import Clip
from gkl_vl.teachers.embeddings import unpacked
from gkl_vl.training.clip_teacher import bundled_store


@dataclass(frozen=True)
class BundledEmbeddings:
    """Axis letters: p = pairs, v = views of each, c = most captions of a pair, e = the teacher's embedding."""

    pixels: Tensor
    """[p, v, 3, s, s], uint8."""
    image: Tensor
    """[p, v, e]."""
    text: Tensor
    """[p, c, e], zeros behind a pair's captions."""


def bundled_embeddings(teacher: Clip, student: Clip) -> BundledEmbeddings:
    """From the store that the recipes use for this student."""
    block = bundled_store([teacher], student.image_size).block(0)
    starts = block["captions"].tolist()
    texts = unpacked(block["text.0"], None).split([b - a for a, b in zip(starts, starts[1:], strict=False)])
    padded = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    return BundledEmbeddings(block["pixels"], unpacked(block["image.0"], None), padded)
