"""Hashes of models for the keys of caches and stored results. `digest` is a hashlib object.

What a hash holds: the versions of the packages that compute the numbers, the precision of matrix products, and of the
model every parameter and buffer, the classes of its modules, their plain attributes and the code of their functions.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from importlib.metadata import version
from inspect import unwrap
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from gkl_vl.disk_cache import tensor_bytes
from gkl_vl.models.clip import Clip
from gkl_vl.models.towers import TransformersTowers

PACKAGES = ("torch", "torchvision", "pillow", "open_clip_torch", "timm", "transformers")
"""Packages whose version decides the numbers: layers, resizing, decoding, architectures."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size)
_OWN = set(vars(nn.Module())) - {"_forward_hooks", "_forward_pre_hooks"}
"""Attributes of every module that hold no settings of its own, or are hashed otherwise."""
_COLUMNS = 512
_weights: WeakKeyDictionary[nn.Module, tuple[list[Any], bytes]] = WeakKeyDictionary()
"""What `_state` returned of a model, and its hash then."""


def add_clip(digest: Any, clip: Clip) -> None:
    """Hashes what a CLIP's embeddings depend on: the model (`add_model`), its configuration and its preprocessing."""
    config = clip.towers.model.config if isinstance(clip.towers, TransformersTowers) else clip.model_cfg
    digest.update(f"{config} {clip.preprocess}".encode())
    add_model(digest, clip.towers)


def add_model(digest: Any, model: nn.Module) -> None:
    """Hashes what a model's outputs depend on: versions, precision of matrix products, architecture and weights.

    The weights are hashed again only if they changed since the last call, in place or not.
    """
    digest.update(versions().encode())
    digest.update(f"{torch.get_float32_matmul_precision()} {architecture(model)}".encode())
    add_weights(digest, model)


def versions() -> str:
    """Names and versions of `PACKAGES`."""
    return " ".join(f"{package} {version(package)}" for package in PACKAGES)


def add_weights(digest: Any, model: nn.Module) -> None:
    """Hashes name, dtype, shape and bits of every parameter and buffer, non-persistent buffers included."""
    state = _state(model)
    known = _weights.get(model)
    if known is None or known[0] != state:
        known = _weights[model] = state, _hash(model)
    digest.update(known[1])


def add_tensors(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Hashes name, dtype, shape and bits of each."""
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))


def _hash(model: nn.Module) -> bytes:
    digest = hashlib.sha256()
    add_tensors(digest, _tensors(model))
    return digest.digest()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _state(model: nn.Module) -> list[Any]:
    """Changes when a tensor is replaced or changed, also through `.data`, which torch's version counter does not see.

    Cheaper than a hash of all bits, and on a GPU without copying them: sums of the bits as integers by row and by
    column, weighted by their place.
    """
    state = []
    for name, tensor in _tensors(model):
        counter = 0 if tensor.is_inference() else tensor._version
        state.append((name, tensor.dtype, tuple(tensor.shape), tensor.data_ptr(), counter, _checksum(tensor).tolist()))
    return state


@torch.no_grad()
def _checksum(tensor: Tensor) -> Tensor:
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(bits) // (8 * _COLUMNS) * 8 * _COLUMNS
    rows = bits[:whole].view(torch.int64).view(-1, _COLUMNS)  # 64 bits at a time: several times faster than 32
    # Flipped signs change single high bits, which cancel in a sum modulo 2^64: the shift spreads them to lower ones.
    rows = rows ^ (rows >> 17)
    parts = rows.sum(dim=0), rows.sum(dim=1), bits[whole:].long()
    return torch.stack([(part * torch.arange(1, len(part) + 1, device=part.device)).sum() for part in parts])


# ---- architecture ------------------------------------------------------------------------------------------------


def architecture(model: nn.Module) -> str:
    """A text of the structure of a model: class, code and plain attributes of each module, by name.

    `str(model)` lacks settings that decide the output, for example the number of heads of an attention.
    """
    lines = []
    for name, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if key not in _OWN}
        kind = type(module)
        forward = _described(unwrap(kind.forward))  # type checkers wrap it
        lines.append(f"{name} {kind.__module__}.{kind.__qualname__} {forward} {_described(settings)}")
    return "\n".join(lines)


def _described(value: Any) -> str:
    """A text of a value that is the same in every process: no addresses, no order of a set."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor | np.ndarray):
        array = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        return f"{array.dtype} {tuple(array.shape)} {hashlib.sha256(tensor_bytes(array)).hexdigest()}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_described(key)}: {_described(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_described, value)) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(_described, value))) + "}"
    if isinstance(value, partial):
        return f"partial {_described(value.func)} {_described(value.args)} {_described(value.keywords)}"
    if isinstance(value, FunctionType | MethodType):
        return _described_function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__qualname__ + _described({field.name: vars(value)[field.name] for field in fields(value)})
    named = value if isinstance(value, type | BuiltinFunctionType) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _described_function(function: Callable[..., Any]) -> str:
    plain = function.__func__ if isinstance(function, MethodType) else function
    assert isinstance(plain, FunctionType)
    # Not lists and other objects: a function may hold itself, and a hook the record of what it saw.
    held = [cell.cell_contents for cell in plain.__closure__ or () if isinstance(cell.cell_contents, (*_PLAIN, Tensor))]
    code = _described_code(plain.__code__)
    return f"{plain.__module__}.{plain.__qualname__} {code} {_described(plain.__defaults__)} {_described(held)}"


def _described_code(code: CodeType) -> str:
    constants = [_described_code(item) if isinstance(item, CodeType) else _described(item) for item in code.co_consts]
    return f"{hashlib.sha256(code.co_code).hexdigest()[:16]} {code.co_names} {constants}"
