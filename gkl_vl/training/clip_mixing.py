"""Averages of fine-tuned weights with those that they started from, measured along the line between the two.

Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), CVPR 2022, arXiv 2109.01903.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gkl_vl.evaluation.sets import BenchmarkSet
from gkl_vl.models.clip import Clip
from gkl_vl.models.towers import Towers
from gkl_vl.report.figures import draw_interpolation
from gkl_vl.training.clip_results import log_once
from gkl_vl.training.run import Run
from gkl_vl.training.run_page import MIXED

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the fine-tuned weights, where the line is measured beside the exported share."""


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """The average that is exported, and the sets that the start is measured on as well."""

    share: float
    """Of the fine-tuned weights; the rest is the start's."""
    old: Sequence[str]
    """Names of the sets that show what the start was good at, for the picture."""


def mixed(start: Towers, trained: Towers, share: float) -> Towers:
    """(1 - share) * start + share * trained of all parameters and floating-point buffers, in a copy."""
    result = copy.deepcopy(trained)
    before, after = start.state_dict(), trained.state_dict()
    with torch.no_grad():
        for name, tensor in result.state_dict().items():
            if tensor.is_floating_point():
                first, last = before[name].to(tensor.device), after[name]
                average = torch.lerp(first.float(), last.float(), share).to(last.dtype)
                # Equal entries are kept: an attention mask's -inf would become -inf - -inf = nan.
                tensor.copy_(torch.where(first == last, last, average))
    return result


def role_of(share: float) -> str:
    """Name, in records, of the average with this share of the fine-tuned weights."""
    return f"{MIXED}{share:g}"


def export_mixed(
    run: Run, start: Towers, trained: Clip, interpolation: Interpolation, sets: list[BenchmarkSet], *, step: int
) -> Clip:
    """Measures and draws the line from start to fine-tuned weights; returns the average to export. All ranks."""
    shares, exported = sorted({*SHARES, interpolation.share}), trained
    for share in shares:
        average = replace(trained, towers=mixed(start, trained.towers, share))
        log_once(run.folder, step, {role_of(share): average}, sets, run.device)  # all ranks
        exported = average if share == interpolation.share else exported
    if run.accelerator.is_main_process:
        records = run.folder.records()
        lines = {dataset.name: _curve(records, dataset.name, shares) for dataset in sets}
        draw_interpolation(
            path=run.folder.path / "interpolation.png", lines=lines, old=interpolation.old, share=interpolation.share
        )
    return exported


def _curve(records: list[dict], dataset: str, shares: Sequence[float]) -> list[tuple[float, float]]:
    """(share, top-1 accuracy, or the first metric of a set without classes, in percent)."""
    points = []
    for share in shares:
        of_set = [r for r in records if r.get("model") == role_of(share) and r["dataset"] == dataset]
        metrics = {key: value for key, value in of_set[-1].items() if isinstance(value, float)} if of_set else {}
        value = metrics.get("acc1", next(iter(metrics.values()), None))
        points += [] if value is None else [(share, 100 * value)]
    return points
