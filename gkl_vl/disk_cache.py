"""Cache files of tensors with a checksum; a damaged file counts as missing. File names are hashes of all inputs."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gkl_vl.atomic import replacing

_CHECKSUM = "sha256"


def cache_folder(kind: str) -> Path:
    """`$XDG_CACHE_HOME/gkl_vl/KIND`, by default `~/.cache/gkl_vl/KIND`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gkl_vl" / kind


def read(path: Path) -> dict[str, Tensor] | None:
    """The tensors that `write` stored; None if the file is missing or damaged."""
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
    """Writes the tensors and their checksum, replacing an existing file."""
    with replacing(path) as scratch:
        save_file(tensors, scratch, metadata={_CHECKSUM: _checksum(tensors)})


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The bits of a tensor as a uint8 numpy array."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
