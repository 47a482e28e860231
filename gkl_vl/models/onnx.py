"""CLIPs as pairs of ONNX files: reads the folder that `export/onnx_format.py` writes, runs its files by onnxruntime.

The folder holds image.onnx, text.onnx, their int8 forms if there are any, the tokenizer, and onnx_config.json, which
says how images and texts become inputs (docs/formats.md).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from open_clip.tokenizer import get_clean_fn
from open_clip.transform import PreprocessCfg
from tokenizers import Tokenizer
from torch import Tensor

from gkl_vl.errors import UserError, first_line
from gkl_vl.models.clip import Clip, PaddedTokens
from gkl_vl.models.preprocessing import check_preprocess, is_number
from gkl_vl.models.pretrained import load_tokenizer
from gkl_vl.models.towers import OnnxTowers, Side
from gkl_vl.models.weights import fetch
from gkl_vl.reading import read_json, refuse_pointer

SUBFOLDER = "onnx"
CONFIG_NAME = "onnx_config.json"
TOKENIZER_NAME = "tokenizer.json"
SIDES: tuple[Side, ...] = ("image", "text")
INPUTS: dict[Side, str] = {"image": "pixels", "text": "tokens"}
OUTPUT = "embeddings"
CLEANINGS = ("whitespace", "lower", "canonicalize")


def file_name(side: Side, *, int8: bool) -> str:
    """Name of a tower's file."""
    return f"{side}.int8.onnx" if int8 else f"{side}.onnx"


def stored_files(folder: Path, side: Side, *, int8: bool) -> list[Path]:
    """The files of a tower: above 2 GB its weights are beside it."""
    path = folder / file_name(side, int8=int8)
    return [file for file in (path, path.with_name(f"{path.name}.data")) if file.is_file()]


def import_onnx(*packages: str) -> list[Any]:
    """Imports packages of the extra `onnx`. Raises: UserError with the line that installs them."""
    try:
        return [import_module(package) for package in packages]
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install 'gkl-vl[onnx]'") from error


def load_onnx(folder: str | Path, *, int8: bool = False, name: str | None = None) -> Clip:
    """Loads an exported pair of ONNX files, which runs on the CPU with as many threads as torch has.

    Args:
        folder: a run folder, an exported model, its onnx/ folder, or a Hub repository (org/name) with one.
        int8: the quantised pair.
        name: of the clip; None = onnx:FOLDER or onnx-int8:FOLDER.

    Raises:
        UserError: onnxruntime is not installed, no such pair in the folder, files that are damaged or do not fit their
            configuration.
    """
    (runtime,) = import_onnx("onnxruntime")
    place = find_onnx(folder)
    fields = _checked(read_json(place / CONFIG_NAME), str(place / CONFIG_NAME))
    paths = {side: place / file_name(side, int8=int8) for side in SIDES}
    for path in paths.values():
        if not path.is_file():
            remedy = "python -m gkl_vl.export FOLDER --formats onnx int8" if int8 else "export it again"
            raise UserError(f"{str(place)!r} holds no {path.name}: {remedy}")
        refuse_pointer(path)
    size = fields.preprocess.size
    towers = OnnxTowers(
        _open(runtime, paths["image"], "image", "tensor(float)", [3, size, size], fields.embed_dim),
        _open(runtime, paths["text"], "text", "tensor(int64)", [fields.context_length], fields.embed_dim),
        log_scale=math.log(fields.logit_scale),
        bias=fields.logit_bias,
        embed_dim=fields.embed_dim,
        counts=fields.counts,
        identity=f"onnxruntime {version('onnxruntime')} {fields} {_digest(place, int8=int8)}",
    )
    prefix = "onnx-int8" if int8 else "onnx"
    tokenize, hf_tokenizer = _tokenizer(place, fields)
    return Clip(
        name=f"{prefix}:{folder}" if name is None else name,
        towers=towers.eval(),
        preprocess=fields.preprocess,
        tokenize=tokenize,
        hf_tokenizer=hf_tokenizer,
        model_cfg=None,
    )


def find_onnx(folder: str | Path) -> Path:
    """The folder with onnx_config.json: this one, one below it, or of a Hub repository. Raises: UserError."""
    path = Path(folder)
    if not path.is_dir() and str(folder).count("/") == 1 and not str(folder).startswith((".", "/")):
        path = fetch(str(folder), files=(f"{SUBFOLDER}/*",), pickles=(), allow_pickle=False)
    for place in (path, path / SUBFOLDER, path / "model" / SUBFOLDER):
        if (place / CONFIG_NAME).is_file():
            return place
    raise UserError(
        f"{str(folder)!r} holds no ONNX files ({SUBFOLDER}/{CONFIG_NAME}): write them with "
        f"`python -m gkl_vl.export {folder} --formats onnx`"
    )


# ---- onnx_config.json ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Fields:
    """What of onnx_config.json is read here."""

    preprocess: PreprocessCfg
    context_length: int
    clean: str
    encode_special_tokens: bool
    embed_dim: int
    logit_scale: float
    logit_bias: float | None
    counts: dict[str, int]


def _checked(config: dict, source: str) -> _Fields:
    """The fields of a configuration. Raises: UserError for one that is incomplete or wrong, naming it."""

    def field(section: Any, key: str, fine: Callable[[Any], bool]) -> Any:
        value = section.get(key) if isinstance(section, dict) else None
        if not fine(value):
            raise UserError(f"{key} in {source} is {value!r}: export the model again")
        return value

    image, text = config.get("image"), config.get("text")
    preprocess = check_preprocess(field(image, "preprocess", lambda value: isinstance(value, dict)), source)
    field(preprocess, "size", _is_count)
    bias = field(config, "logit_bias", lambda value: value is None or is_number(value))
    counts = config.get("parameters")
    return _Fields(
        preprocess=PreprocessCfg(**preprocess),
        context_length=field(text, "context_length", _is_count),
        clean=field(text, "clean", CLEANINGS.__contains__),
        encode_special_tokens=field(text, "encode_special_tokens", lambda value: isinstance(value, bool)),
        embed_dim=field(config, "embed_dim", _is_count),
        logit_scale=float(field(config, "logit_scale", lambda value: is_number(value) and value > 0)),
        logit_bias=None if bias is None else float(bias),
        counts={key: field(counts, key, _is_count) for key in ("parameters", "image_parameters")},
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# ---- files ---------------------------------------------------------------------------------------------------------


def _open(
    runtime: Any, path: Path, side: Side, dtype: str, shape: Sequence[Any], embed_dim: int
) -> Callable[[np.ndarray], np.ndarray]:
    """A function that runs a file on a batch of inputs of this shape."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base class
        raise UserError(f"{str(path)!r} cannot be read ({first_line(error)}): export it again") from error
    found = [(port.name, port.type, port.shape[1:]) for port in (*session.get_inputs(), *session.get_outputs())]
    expected = [(INPUTS[side], dtype, list(shape)), (OUTPUT, "tensor(float)", [embed_dim])]
    if found != expected:
        raise UserError(f"{str(path)!r} has {found} where {CONFIG_NAME} says {expected}: export both again")

    def run(inputs: np.ndarray) -> np.ndarray:
        return session.run([OUTPUT], {INPUTS[side]: inputs})[0]

    return run


def _digest(folder: Path, *, int8: bool) -> str:
    """A hash of the files of a pair."""
    digest = hashlib.sha256()
    for side in SIDES:
        for path in stored_files(folder, side, int8=int8):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# ---- texts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FileTokens:
    """Cleans texts in Python, as open_clip does, then applies tokenizer.json, which pads and cuts to one length."""

    tokenizer: Tokenizer
    clean: Callable[[str], str]

    def __call__(self, texts: list[str]) -> Int[Tensor, "n length"]:
        rows = self.tokenizer.encode_batch([self.clean(text) for text in texts])
        return torch.tensor([row.ids for row in rows], dtype=torch.int64)


def _tokenizer(folder: Path, fields: _Fields) -> tuple[Callable[[list[str]], Tensor], Any | None]:
    """The function from texts to tokens, and the transformers tokenizer behind it where it has no tokenizer.json."""
    clean = get_clean_fn(fields.clean)
    if not (folder / TOKENIZER_NAME).is_file():
        tokenizer = load_tokenizer(folder, str(folder))
        return PaddedTokens(tokenizer, clean, fields.context_length), tokenizer
    try:
        backend = Tokenizer.from_file(str(folder / TOKENIZER_NAME))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{str(folder / TOKENIZER_NAME)!r} cannot be read ({first_line(error)}): export it") from error
    backend.encode_special_tokens = fields.encode_special_tokens
    return _FileTokens(backend, clean), None
