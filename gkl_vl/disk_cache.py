"""Tensors kept on disk under a hash of all that they depend on; what is damaged there is made anew, not trusted."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gkl_vl.towers import Clip, TransformersTowers

_CHECKSUM = "sha256"


def cache_folder(kind: str) -> Path:
    """`$XDG_CACHE_HOME/gkl_vl/KIND`, by default `~/.cache/gkl_vl/KIND`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gkl_vl" / kind


def read(path: Path) -> dict[str, Tensor] | None:
    """What `write` wrote there; None where there is nothing, or not what was written."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            checksum = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError):
        return None
    return tensors if checksum == _checksum(tensors) else None


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Written aside and renamed: a kill leaves the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.writing")
    try:
        save_file(tensors, aside, metadata={_CHECKSUM: _checksum(tensors)})
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def add_clip(digest: Any, clip: Clip) -> None:
    """All that decides what a CLIP says: weights, and what is no weight, such as QuickGELU and the number of heads."""
    config = clip.towers.model.config if isinstance(clip.towers, TransformersTowers) else clip.model_cfg
    digest.update(f"{clip.towers} {config} {clip.preprocess} {torch.__version__}".encode())
    add_weights(digest, clip.towers)


def add_weights(digest: Any, model: nn.Module) -> None:
    """Names and bits."""
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
