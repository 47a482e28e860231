"""int8 forms of an exported pair of ONNX files, by onnxruntime's quantisation, and what they may lose.

Weights are symmetric int8, activations uint8. Convolutional image towers: ranges of activations from calibration images
(static, as QuantizeLinear and DequantizeLinear nodes); transformers, whose activations have outliers: ranges of each
batch (dynamic), of matrix products alone. docs/formats.md has the schemes that were compared.

Axis letters: n = images, s = side of an image in pixels.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from gkl_vl.errors import UserError
from gkl_vl.models.onnx import INPUTS, SIDES, file_name, import_onnx, stored_files
from gkl_vl.models.towers import Side

Scheme = Literal["static", "dynamic"]
CALIBRATION_IMAGES = 256
COMPARED = ("acc1", "image_retrieval_recall@1", "text_retrieval_recall@1")
"""Metrics that int8 may not lower by more than the limit."""


def write_int8(*, folder: Path, pixels: Float[Tensor, "n 3 s s"]) -> dict[Side, Scheme]:
    """Writes image.int8.onnx and text.int8.onnx beside the pair in `folder`; returns the scheme of each.

    Args:
        pixels: calibration images as inputs of the image tower.

    Raises:
        UserError: onnx or onnxruntime is not installed.
    """
    onnx, quantization = import_onnx("onnx", "onnxruntime.quantization")
    schemes: dict[Side, Scheme] = {}
    for side in SIDES:
        operators = [node.op_type for node in onnx.load(folder / file_name(side, int8=False)).graph.node]
        products = operators.count("MatMul") + operators.count("Gemm")
        schemes[side] = "static" if operators.count("Conv") > products else "dynamic"
        with TemporaryDirectory(dir=folder) as scratch, _quiet():
            prepared = Path(scratch) / "prepared.onnx"
            external = len(stored_files(folder, side, int8=False)) > 1
            _prepare(quantization, folder / file_name(side, int8=False), prepared, external)
            images = pixels if schemes[side] == "static" else None
            _quantise(quantization, prepared, folder / file_name(side, int8=True), images, external)
    return schemes


def _prepare(quantization: Any, source: Path, target: Path, external: bool) -> None:
    """Folds constants and batch norms, and infers shapes: a tensor without a shape is not quantised."""
    quantization.quant_pre_process(
        source, target, skip_symbolic_shape=True, save_as_external_data=external, all_tensors_to_one_file=external
    )


def _quantise(quantization: Any, source: Path, target: Path, images: Tensor | None, external: bool) -> None:
    """One file. `images`: static, with ranges from them; None = dynamic."""
    settings = {"per_channel": True, "weight_type": quantization.QuantType.QInt8, "use_external_data_format": external}
    if images is None:
        settings |= {"extra_options": {"MatMulConstBOnly": True}}  # attention's products of activations stay fp32
        quantization.quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "Gemm", "Gather"], **settings)
        return
    quantization.quantize_static(
        source,
        target,
        _reader(quantization, ({INPUTS["image"]: image[None]} for image in images.numpy())),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        calibrate_method=quantization.CalibrationMethod.MinMax,
        **settings,
    )


def _reader(quantization: Any, batches: Iterator[dict[str, np.ndarray]]) -> Any:
    """The interface from which onnxruntime reads calibration inputs, one image at a time."""

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(batches, None)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines and warnings of onnxruntime's tools, which are about their own steps."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)


def refuse_chance(records: Sequence[Mapping[str, Any]]) -> None:
    """Raises: UserError for a model that is no better than chance on a set, for its loss there means nothing.

    Args:
        records: for each set: `dataset`, metrics as fractions of 1 and their `intervals`, and for a set with labels
            the number of its `classes`.
    """
    for record in records:
        classes = record.get("classes")
        if classes is not None and record["intervals"]["acc1"][0] <= 1 / classes:
            raise UserError(
                f"int8 cannot be judged on {record['dataset']}: the model itself has {100 * record['acc1']:.2f} % top-1"
                f" and chance is {100 / classes:.2f} %: name sets that it knows with --eval-set; nothing was written"
            )


def check_drop(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], *, max_drop: float) -> None:
    """Raises: UserError if int8 lowers one of `COMPARED` by more than `max_drop` points, per cent of all.

    Args:
        before, after: records of the model and of its int8 form on the same sets.
    """
    drops = [
        (100 * (one[key] - other[key]), one, other, key)
        for one, other in zip(before, after, strict=True)
        for key in COMPARED
        if key in one
    ]
    drop, one, other, key = max(drops, key=lambda found: np.nan_to_num(found[0], nan=np.inf))
    if not drop <= max_drop:
        raise UserError(
            f"int8 lowers {key} on {one['dataset']} from {100 * one[key]:.2f} % to {100 * other[key]:.2f} %, by more "
            f"than --max-drop {max_drop:g} points: nothing was written; calibrate with --images of your own data, or "
            "keep fp32"
        )
