"""Exported models: writing, pushing, loading."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`load_onnx`, imported when it is used: the package itself imports nothing."""
    if name == "load_onnx":
        from gkl_vl.models.onnx import load_onnx

        return load_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
