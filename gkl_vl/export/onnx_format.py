"""A CLIP as two ONNX files, image.onnx and text.onnx, with tokenizer and constants of preprocessing beside them.

Both take a batch of any size and return L2-normalised embeddings. What is written is compared with the model first.

Axis letters: n = rows, d = embedding, s = side of an input image in pixels.
"""

import copy
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.config import set_exportable
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from gkl_vl.atomic import write_json
from gkl_vl.errors import UserError, causes, first_line
from gkl_vl.export.text_cleaning import save_tokenizer
from gkl_vl.export.transformers_format import exported_tokenizer
from gkl_vl.models.clip import Clip, cleaning_of
from gkl_vl.models.modes import evaluating
from gkl_vl.models.onnx import CONFIG_NAME, INPUTS, OUTPUT, SIDES, TOKENIZER_NAME, file_name, import_onnx, load_onnx
from gkl_vl.models.towers import Side, Towers, TransformersTowers, parameter_counts

BATCHES = (1, 5, 64)
"""Batch sizes at which a conversion is compared with the model."""
INPUTS_CHECKED = 64
TOLERANCE = 1e-4
"""Largest absolute difference of normalised embeddings."""
SINGLE_FILE_BYTES = 2**31 - 2**24
"""A protobuf file holds 2 GiB: a tower with more bytes of weights has them in image.onnx.data beside image.onnx."""
_ODD_TEXTS = ("", "“It’s” A &amp; b, ﬁsh", "a ! <end_of_text>", "many words " * 100)
"""Texts whose tokens are compared besides: padding, case, cleaning, special tokens, truncation."""


class _Tower(nn.Module):
    """One side of a CLIP as a module of one input."""

    def __init__(self, towers: Towers, side: Side):
        super().__init__()
        self.towers, self.side = towers, side

    def forward(self, inputs: Tensor) -> Tensor:
        return self.towers.encode_image(inputs) if self.side == "image" else self.towers.encode_text(inputs)


def write_onnx(*, clip: Clip, folder: Path, pixels: Float[Tensor, "n 3 s s"], texts: Sequence[str]) -> dict[str, Any]:
    """Writes both files, the tokenizer and onnx_config.json to an existing folder, and returns the configuration.

    `load_onnx(folder)` loads them. The caller discards the folder if this raises.

    Args:
        clip: on the CPU, in fp32; it stays as it is.
        pixels, texts: real inputs for the comparison, as many of each.

    Raises:
        UserError: packages that are not installed, a tower with an operator that ONNX lacks, a tokenizer that no file
            expresses, embeddings that differ from the model's by more than `TOLERANCE`.
    """
    import_onnx("onnx", "onnxscript", "onnxruntime")
    encode_special_tokens = _write_tokenizer(clip, folder)
    inputs: dict[Side, Tensor] = {"image": pixels[:2], "text": clip.tokenize(list(texts[:2]))}
    opset = [_write_tower(clip, side, inputs[side], folder / file_name(side, int8=False)) for side in SIDES][0]
    config = _config(clip, folder, opset, encode_special_tokens)
    write_json(folder / CONFIG_NAME, config, indent=2)
    differences = check(clip, load_onnx(folder), pixels, texts, tokens_too=True)
    config["checked"] = {
        "inputs": len(pixels),
        "batches": list(BATCHES),
        "tolerance": TOLERANCE,
        "largest_difference": differences,
    }
    write_json(folder / CONFIG_NAME, config, indent=2)
    return config


# ---- the files -----------------------------------------------------------------------------------------------------


def _write_tower(clip: Clip, side: Side, inputs: Tensor, path: Path) -> int:
    """Writes the file of one tower; returns the version of ONNX's operators that it uses."""
    module = _Tower(_without_branches(clip), side).eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), _exporting():
            program: Any = torch.onnx.export(
                module,
                (inputs,),
                dynamo=True,
                input_names=[INPUTS[side]],
                output_names=[OUTPUT],
                dynamic_shapes=({0: "batch"},),
                verbose=False,
            )
    except Exception as error:  # the exporter's own classes are private, and torch.export raises many others
        raise UserError(
            f"the {side} tower of {clip.name!r} cannot be exported to ONNX: {_obstacle(error)}; nothing was written"
        ) from error
    weights = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    program.save(path, external_data=weights > SINGLE_FILE_BYTES)
    return program.model.opset_imports[""]


def _without_branches(clip: Clip) -> Towers:
    """A copy of the towers whose parallel convolutions are merged, as of FastViT: equal outputs in less time."""
    towers = copy.deepcopy(clip.towers)
    if isinstance(trunk := dict(towers.named_modules()).get("model.visual.trunk"), nn.Module):
        towers.get_submodule("model.visual").trunk = reparameterize_model(trunk.eval(), inplace=True)
    return towers


@contextmanager
def _exporting() -> Iterator[None]:
    """timm's layers in the form that exports, and none of what the exporter prints and logs about its own parts."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), set_exportable(True):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _obstacle(error: Exception) -> str:
    """The operator that has no translation, or the first line of the first cause."""
    chain = list(causes(error))
    for cause in chain:
        if found := re.search(r"OpOverload\(op='([\w.]+)'", str(cause)):
            return f"ONNX has no form of the operator {found[1]}"
    return first_line(chain[-1])


def _write_tokenizer(clip: Clip, folder: Path) -> bool:
    """Writes tokenizer.json, which pads and cuts to the context length by itself; a tokenizer in Python in its own
    files. Returns whether special tokens in a text are words, which tokenizer.json does not store."""
    tokenizer, length = exported_tokenizer(clip), clip.tokenize([""]).shape[1]
    if not tokenizer.is_fast:
        save_tokenizer(tokenizer, folder)
        return False
    backend = tokenizer.backend_tokenizer
    pad_id = 0 if clip.hf_tokenizer is None else tokenizer.pad_token_id  # open_clip pads CLIP's BPE with 0
    backend.enable_truncation(length, direction=tokenizer.truncation_side)
    backend.enable_padding(
        length=length, pad_id=pad_id, pad_token=backend.id_to_token(pad_id), direction=tokenizer.padding_side
    )
    backend.save(str(folder / TOKENIZER_NAME))
    return bool(tokenizer.split_special_tokens)


# ---- onnx_config.json ----------------------------------------------------------------------------------------------


def _config(clip: Clip, folder: Path, opset: int, encode_special_tokens: bool) -> dict[str, Any]:
    size, bias = clip.image_size, clip.towers.bias()
    length = clip.tokenize([""]).shape[1]
    output = {"name": OUTPUT, "dtype": "float32", "shape": ["batch", clip.embed_dim], "normalised": True}
    return {
        "format_version": 1,
        "embed_dim": clip.embed_dim,
        "logit_scale": clip.towers.log_scale().exp().item(),
        "logit_bias": None if bias is None else bias.item(),
        "logits": "logit_scale * image_embeddings @ text_embeddings.T"
        + ("" if bias is None else " + logit_bias, then a sigmoid"),
        "image": {
            "file": file_name("image", int8=False),
            "input": {"name": INPUTS["image"], "dtype": "float32", "shape": ["batch", 3, size, size]},
            "output": output,
            "preprocess": asdict(clip.preprocess) | {"size": size},
            "steps": _image_steps(clip),
        },
        "text": {
            "file": file_name("text", int8=False),
            "input": {"name": INPUTS["text"], "dtype": "int64", "shape": ["batch", length]},
            "output": output,
            "tokenizer": TOKENIZER_NAME if (folder / TOKENIZER_NAME).is_file() else "transformers.AutoTokenizer",
            "context_length": length,
            "clean": _cleaning(clip),
            "encode_special_tokens": encode_special_tokens,
        },
        "parameters": parameter_counts(clip.towers),
        "opset": opset,
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
    }


def _image_steps(clip: Clip) -> list[str]:
    """The preprocessing in words, in order."""
    size, preprocess = clip.image_size, clip.preprocess
    how = "bilinear" if preprocess.interpolation == "bilinear" else "bicubic"
    resized = {
        "shortest": [
            f"resize the shorter side to {size} pixels, {how}, as PIL does",
            f"cut out the central {size} x {size}",
        ],
        "longest": [
            f"resize the longer side to {size} pixels, {how}, as PIL does",
            f"pad to {size} x {size} with {preprocess.fill_color}, the image in the centre",
        ],
        "squash": [f"resize to {size} x {size} pixels, {how}, as PIL does"],
    }
    return [
        "convert to RGB",
        *resized[preprocess.resize_mode],
        "divide by 255, subtract mean, divide by std, by channel",
        "order the axes as batch, channel, height, width",
    ]


def _cleaning(clip: Clip) -> str:
    """open_clip's name of the function that cleans texts before the tokenizer."""
    if isinstance(clip.towers, TransformersTowers):
        return cleaning_of(clip.towers.model.config)
    assert clip.model_cfg is not None
    kwargs = clip.model_cfg["text_cfg"].get("tokenizer_kwargs") or {}
    return kwargs.get("clean", "lower" if clip.hf_tokenizer is None else "whitespace")


# ---- the comparison ------------------------------------------------------------------------------------------------


def check(
    clip: Clip, converted: Clip, pixels: Float[Tensor, "n 3 s s"], texts: Sequence[str], *, tokens_too: bool = False
) -> dict[str, float]:
    """Largest absolute difference between the embeddings of a model and of its conversion, by side.

    Args:
        tokens_too: also compare the tokens of these texts and of odd ones.

    Raises: UserError above `TOLERANCE`, and for other tokens.
    """
    if tokens_too:
        _check_tokens(clip, converted, [*texts, *_ODD_TEXTS])
    with evaluating(clip.towers), evaluating(converted.towers), torch.inference_mode():
        image = _difference(clip.towers.encode_image, converted.towers.encode_image, pixels, pixels)
        tokens = (model.tokenize(list(texts)) for model in (clip, converted))
        text = _difference(clip.towers.encode_text, converted.towers.encode_text, *tokens)
    for side, found in (("image", image), ("text", text)):
        batch, largest = max(found.items(), key=lambda item: item[1])
        if not largest <= TOLERANCE:  # also nan
            raise UserError(
                f"the {side} embeddings of the converted {clip.name!r} differ from the model's by up to {largest:.2g} "
                f"(batch {batch}), more than {TOLERANCE:g}: nothing was written; try other versions of the packages"
            )
    return {"image": max(image.values()), "text": max(text.values())}


def _difference(
    encode: Callable[[Tensor], Tensor], converted: Callable[[Tensor], Tensor], inputs: Tensor, others: Tensor
) -> dict[int, float]:
    """Batch size -> largest absolute difference."""
    expected = encode(inputs)
    rows = {batch: torch.cat([converted(part) for part in others.split(batch)]) for batch in BATCHES}
    return {batch: (found - expected).abs().nan_to_num(nan=torch.inf).max().item() for batch, found in rows.items()}


def _check_tokens(clip: Clip, converted: Clip, texts: list[str]) -> None:
    expected, found = clip.tokenize(texts).tolist(), converted.tokenize(texts).tolist()
    for text, ours, theirs in zip(texts, expected, found, strict=True):
        if ours != theirs:
            raise UserError(
                f"no tokenizer file expresses the tokenizer of {clip.name!r}: {text[:40]!r} would be {theirs[:12]}, "
                f"not {ours[:12]}; nothing was written"
            )
