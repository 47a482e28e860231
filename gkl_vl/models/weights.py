"""Files of models: downloads from the Hub, state dicts read without running code and compared with a model.

A pickle is read with torch's `weights_only=True`, and only on request.
"""

import argparse
import json
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gkl_vl.errors import UserError, first_line, notice, refuse_full_disk
from gkl_vl.reading import refuse_pointer

_NESTED = ("state_dict", "model", "student", "state_dict_ema", "model_ema", "ema")
"""Keys under which checkpoints store a state dict, in order of preference."""
_PREFIXES = ("module.", "student.")
"""Prefixes of (Distributed)DataParallel and of distillation scripts, before all names."""
_COMPILED = "_orig_mod."
"""torch.compile's prefix, before the names of each compiled submodule."""
# Training checkpoints hold their arguments and their best metric beside the weights. All are plain data.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_NUMBERS = ("float64", "float32", "float16", "int64", "int32", "bool")
_PLAIN_TYPES = [argparse.Namespace, np.dtype, *(type(np.dtype(name)) for name in _NUMBERS)]
_PLAIN_TYPES += [(_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar")]


def refuse_pickle(path: str | Path, *, allow_pickle: bool) -> None:
    """Raises: UserError for a file that is neither safetensors nor npz, unless `allow_pickle`."""
    if Path(path).suffix not in (".safetensors", ".npz") and not allow_pickle:
        if Path(path).is_file():
            _check_ending(Path(path))
        raise UserError(f"{path} is a pickle, not safetensors: convert it, or pass --allow-pickle if you trust it")


def fetch(repo: str, *, files: Sequence[str], pickles: Sequence[str], allow_pickle: bool) -> Path:
    """Downloads a Hub repository unless it is cached, and returns its local folder.

    Args:
        files: patterns of the files to download.
        pickles: further patterns, used only with `allow_pickle`.

    Raises: UserError offline, for an unknown repository, without access.
    """
    try:
        return Path(snapshot_download(repo, allow_patterns=[*files, *(pickles if allow_pickle else ())]))
    except Exception as error:  # offline, unknown repository or no access: the client's message names the cause
        refuse_full_disk(error)
        raise UserError(
            f"the Hub repository {repo!r} could not be fetched ({first_line(error)}): "
            "check the name and the connection, or download it and write local-dir:path"
        ) from error


def read_json_or_none(path: Path) -> Any:
    """The content of a JSON file, whatever it is; None if it is malformed, which its own reader reports."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None


def check_weights_file(path: Path) -> None:
    """Raises: UserError for a file that does not exist, is empty, a pointer of Git LFS, or cut-off safetensors."""
    if not path.is_file():
        raise UserError(f"weights {str(path)!r} are no file: give the path of a checkpoint, or leave them out")
    if not path.stat().st_size:
        raise UserError(f"weights {str(path)!r} are an empty file: download them again")
    refuse_pointer(path)
    _check_ending(path)
    if path.suffix == ".npz" and not zipfile.is_zipfile(path):
        raise UserError(f"weights {str(path)!r} cannot be read: the file is cut off or damaged: download it again")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):  # checks the header against the file's length
                pass
        except Exception as error:
            raise UserError(f"weights {str(path)!r} cannot be read: {why_unreadable(path, error)}") from error


def _check_ending(path: Path) -> None:
    """Raises: UserError for a pickle named as safetensors and the converse: the ending decides how a file is read."""
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors" and start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":
        raise UserError(f"weights {str(path)!r} are a pickle, not safetensors: rename the file to end in .bin")
    if path.suffix not in (".safetensors", ".npz") and start[8:9] == b"{":
        raise UserError(f"weights {str(path)!r} are safetensors: rename the file to end in .safetensors")


def read_state_dict(path: str | Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """Reads a state dict, plain or nested in a training checkpoint, without the prefixes of wrappers.

    Understands `state_dict`, `model`, `student` and the EMA's keys around the tensors, and `_orig_mod.`, `module.` and
    `student.` before all names, in any combination. Of weights and their EMA it takes the weights and says so.

    Raises:
        UserError: no such file, a pickle without `allow_pickle`, a damaged file, no tensors.
    """
    path = Path(path)
    stored: Any = _read(path, allow_pickle=allow_pickle)
    while isinstance(stored, Mapping):
        keys = [key for key in _NESTED if isinstance(stored.get(key), Mapping)]
        if not keys:
            break
        if averages := [key for key in keys[1:] if "ema" in key]:
            notice(f"weights {str(path)!r}: took {keys[0]!r}; the file also holds {averages[0]!r}")
        stored = stored[keys[0]]
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(v, Tensor) for v in stored.values()):
        raise UserError(f"weights {str(path)!r} hold no state dict, plain or under 'model' or 'state_dict': save one")
    _refuse_other_layouts(stored, path)
    return _without_prefixes({str(key): tensor for key, tensor in stored.items()}, str(path))


def check_fit(
    state: Mapping[str, Tensor], stored: Mapping[str, Tensor], *, path: str | Path, name: str, hint: str | None = None
) -> None:
    """Compares the state dict `stored`, read from `path`, with that of the model `name`.

    `num_batches_tracked` alone may be missing: early versions of torch did not store it, and only a batch norm with
    `momentum=None` reads it.

    Raises:
        UserError: names missing, unexpected and misshapen tensors, and `hint` as the remedy.
    """
    missing = [k for k in state if k not in stored and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in stored if k not in state]
    misfits = [k for k in state if k in stored and stored[k].shape != state[k].shape]
    shapes = [f"{k} has {list(stored[k].shape)}, not {list(state[k].shape)}" for k in misfits]
    refuse_misfits({"missing": missing, "unexpected": unexpected, "of another shape": shapes}, path, name, hint)
    for key, tensor in stored.items():
        _check_numbers(key, tensor, path, floating=state[key].is_floating_point())


def check_plain_floats(path: Path, *, allow_pickle: bool) -> None:
    """Checks a file of transformers' weights: a plain state dict of finite floats, beside position ids.

    Raises:
        UserError: as `read_state_dict`, prefixes or keys around the tensors, other numbers.
    """
    stored = _read(path, allow_pickle=allow_pickle)
    if not isinstance(stored, Mapping) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise UserError(f"weights {str(path)!r} hold no plain state dict: save the state dict alone, as safetensors")
    _refuse_other_layouts(stored, path)
    for prefix in (*_PREFIXES, _COMPILED):
        if stored and all(str(key).startswith(prefix) for key in stored):
            raise UserError(f"the tensors of {str(path)!r} have the prefix {prefix!r}: save them without it")
    for key, tensor in stored.items():
        _check_numbers(key, tensor, path, floating=not str(key).endswith("position_ids"))


def _refuse_other_layouts(stored: Mapping[str, Tensor], path: Path) -> None:
    for key, tensor in stored.items():
        if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta:
            kind = "without values" if tensor.is_meta else "quantised or sparse"
            raise UserError(f"tensor {key} of {str(path)!r} is {kind}: save it as a dense tensor of floats")


def _check_numbers(key: str, tensor: Tensor, path: str | Path, *, floating: bool) -> None:
    place = f"tensor {key} of {str(path)!r}"
    if tensor.is_floating_point() != floating or tensor.is_complex():
        expected = "floats" if floating else "integers"
        raise UserError(f"{place} is of {tensor.dtype}, expected {expected}: take the weights before conversion")
    if floating and not tensor.float().isfinite().all():
        raise UserError(f"{place} has values that are not finite: take an earlier checkpoint")


def refuse_misfits(misfits: Mapping[str, Sequence[str]], path: str | Path, name: str, hint: str | None = None) -> None:
    """Raises: UserError for lists of tensors that do not fit, by what is wrong with them, unless all are empty."""
    faults = [f"{len(keys)} {kind} ({_first_few(keys)})" for kind, keys in misfits.items() if keys]
    if faults:
        remedy = hint or "take those of this model"
        raise UserError(f"weights {str(path)!r} do not fit {name!r}: {'; '.join(faults)}: {remedy}")


def load_exactly(model: nn.Module, stored: Mapping[str, Tensor], *, path: str | Path, name: str) -> None:
    """Loads `stored` into `model`. Raises: UserError unless all names and shapes agree, see `check_fit`."""
    check_fit(model.state_dict(), stored, path=path, name=name)
    model.load_state_dict(stored, strict=False)


def _first_few(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def _without_prefixes(stored: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    plain = Counter(key.replace(_COMPILED, "") for key in stored)
    if repeated := [key for key, count in plain.items() if count > 1]:
        raise UserError(f"weights {path!r} hold {repeated[0]} twice, with and without {_COMPILED!r}: remove one")
    stored = {key.replace(_COMPILED, ""): tensor for key, tensor in stored.items()}
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in stored)), None):
        stored = {key.removeprefix(prefix): tensor for key, tensor in stored.items()}
    return stored


def _read(path: Path, *, allow_pickle: bool) -> Any:
    check_weights_file(path)
    refuse_pickle(path, allow_pickle=allow_pickle)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN_TYPES):
            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"weights {str(path)!r} cannot be read: {why_unreadable(path, error)}") from error


def why_unreadable(path: Path, error: Exception) -> str:
    """Cause and remedy for a weights file that raised `error`, without torch's advice to run what it holds."""
    if path.suffix == ".safetensors":
        return f"the file is cut off or damaged ({first_line(error)}): download it again"
    if "TorchScript" in str(error):
        return "a TorchScript archive is a program that runs when it is read: save its state_dict() as safetensors"
    if refused := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
        return f"it holds {refused[1]}, which could run code: save the state dict alone, or as safetensors"
    if refused := re.search(r"GLOBAL '?([\w.]+).* whose module", str(error)):
        return f"it holds {refused[1]}, which could run code: save the state dict alone, or as safetensors"
    return "the file is cut off, damaged or no checkpoint: download it again, or save the state dict alone"
