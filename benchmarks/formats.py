"""A CLIP in PyTorch, as ONNX and as int8 ONNX, on the CPU: time of the export, sizes, time of an image and of a text.

    pip install -e '.[onnx]'
    python benchmarks/formats.py                              # ten minutes on two cores
    python benchmarks/formats.py --models runs/NAME --rounds 3

Models are names as for --student, with random weights, or exported folders. The pair is written and compared with the
model as by `python -m gkl_vl.export`; int8 is calibrated on 64 drawings, and what it loses is not measured here.

Times are of one batch through a tower, without decoding and tokenizing, in this process. In each round the three take
turns, each after a call that is not timed, for at least `--seconds`; of its calls the median counts. The table has
the ratios to PyTorch in the same round: the median over the rounds, with the smallest and the largest. Milliseconds, on
stderr, depend on the machine.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from gkl_vl.export.formats import real_inputs
from gkl_vl.export.int8 import write_int8
from gkl_vl.export.onnx_format import write_onnx
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.onnx import SIDES, load_onnx, stored_files
from gkl_vl.models.towers import Side, Towers, parameter_counts

FORMS = ("PyTorch", "ONNX", "int8")
BATCHES = (1, 32)
IMAGES = 64


def load(name: str) -> Clip:
    """An exported folder, or a named architecture with random weights; on the CPU, in evaluation mode."""
    torch.manual_seed(0)
    clip = load_clip(name)
    clip.towers.requires_grad_(False).eval()
    return clip


def export(clip: Clip, pixels: Tensor, texts: list[str], folder: Path) -> dict[str, float]:
    """Writes both pairs; returns the seconds."""
    started = time.perf_counter()
    write_onnx(clip=clip, folder=folder, pixels=pixels, texts=texts)
    written = time.perf_counter()
    write_int8(folder=folder, pixels=pixels)
    return {"ONNX": written - started, "int8": time.perf_counter() - written}


def megabytes(folder: Path, side: Side, *, int8: bool) -> float:
    return sum(path.stat().st_size for path in stored_files(folder, side, int8=int8)) / 1e6


def milliseconds(call: Callable[[], object], seconds: float) -> float:
    """Median time of a call."""
    call()
    times, started = [], time.perf_counter()
    while not times or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return 1000 * median(times)


def calls_of(clips: dict[str, Clip], side: Side, inputs: Tensor) -> dict[str, Callable[[], object]]:
    """By form, a function that embeds these inputs."""

    def call(form: str, towers: Towers) -> Callable[[], object]:
        if side == "text":
            return lambda: towers.encode_text(inputs)
        pixels = inputs.contiguous(memory_format=torch.channels_last) if form == "PyTorch" else inputs  # its fastest
        return lambda: towers.encode_image(pixels)

    return {form: call(form, clip.towers) for form, clip in clips.items()}


def ratios(rounds: list[dict[str, float]], form: str) -> str:
    """Of the times to PyTorch's in the same round."""
    found = sorted(one[form] / one["PyTorch"] for one in rounds)
    return f"{median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def measure(name: str, options: argparse.Namespace) -> None:
    """Prints the rows of one model."""
    clip = load(name)
    pixels, texts = real_inputs(clip, None)
    inputs: dict[Side, Tensor] = {"image": pixels, "text": clip.tokenize(texts)}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        folder = Path(scratch)
        seconds = export(clip, pixels[:IMAGES], texts, folder)
        clips = {"PyTorch": clip, "ONNX": load_onnx(folder), "int8": load_onnx(folder, int8=True)}
        counts = parameter_counts(clip.towers)
        weights = {"image": counts["image_parameters"], "text": counts["parameters"] - counts["image_parameters"]}
        for side in SIDES:
            sizes = [megabytes(folder, side, int8=int8) for int8 in (False, True)]
            for batch in BATCHES:
                calls = calls_of(clips, side, inputs[side][:batch])
                rounds = []
                for _ in range(options.rounds):
                    rounds.append({form: milliseconds(call, options.seconds) / batch for form, call in calls.items()})
                own = ", ".join(f"{form} {median(one[form] for one in rounds):.3f}" for form in FORMS)
                print(f"{name} {side} batch {batch}: {own} ms each", file=sys.stderr)
                cells = [f"{4 * weights[side] / 1e6:.1f}", *(f"{size:.1f}" for size in sizes)]
                cells += [ratios(rounds, form) for form in FORMS[1:]]
                print(f"| {name} | {side} | {batch} | {' | '.join(cells)} |", flush=True)
    print(f"{name}: export {seconds['ONNX']:.0f} s, int8 {seconds['int8']:.0f} s more", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["emoji-student", "ViT-T-16", "FastViT-T8"])
    parser.add_argument("--rounds", type=int, default=7, help="in which the three take turns")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each of the three in a round")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_average = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{options.rounds} rounds, {options.threads} threads, load {load_average}")
    print("\n| model | tower | batch | fp32 MB | ONNX MB | int8 MB | ONNX / PyTorch | int8 / PyTorch |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name in options.models:
        measure(name, options)


if __name__ == "__main__":
    main()
