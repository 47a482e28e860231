"""Hashes of a model's weights and configuration, for cache keys. `digest` is a hashlib object."""

from typing import Any

import torch
from torch import nn

from gkl_vl.disk_cache import tensor_bytes
from gkl_vl.models.clip import Clip, TransformersTowers


def add_clip(digest: Any, clip: Clip) -> None:
    """Hashes what a CLIP's embeddings depend on: weights, configuration (QuickGELU, heads), preprocessing, torch."""
    config = clip.towers.model.config if isinstance(clip.towers, TransformersTowers) else clip.model_cfg
    digest.update(f"{clip.towers} {config} {clip.preprocess} {torch.__version__}".encode())
    add_weights(digest, clip.towers)


def add_weights(digest: Any, model: nn.Module) -> None:
    """Hashes name, dtype, shape and bits of every parameter and buffer, non-persistent buffers included."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
