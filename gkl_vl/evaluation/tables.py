"""Formats evaluation results: text tables, CSV, and the points of the trade-off plot."""

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkl_vl.atomic import replacing
from gkl_vl.evaluation.benchmark import MEAN_RECALL, Result
from gkl_vl.evaluation.set_collections import Entry
from gkl_vl.report.tables import aligned, percent

LEAST_IMAGES = 10
"""Classes with fewer images are not listed as lost or gained: their accuracy is too noisy."""
FEW_IMAGES = 30
"""With fewer images the bootstrap's intervals are too narrow; where all images are right, or none, they are a point."""
MAIN_METRIC: dict[str, str] = {
    "zeroshot_classification": "acc1",
    "zeroshot_retrieval": MEAN_RECALL,
    "image_caption_selection": "text_acc",
}
SHORT = {
    "zeroshot_classification": "classification",
    "zeroshot_retrieval": "retrieval",
    "image_caption_selection": "choice",
}


def print_results(lines: Sequence[Result], paths: Sequence[Path], *more: str) -> None:
    """Prints the tables of the results, further lines, and the files that the results were appended to."""
    print("\n".join([results_text(lines), *more]))
    print(f"appended to {', '.join(dict.fromkeys(map(str, paths)))}")


def results_text(lines: Sequence[Result]) -> str:
    """Formats a table per result: each metric with its 95 % interval and, with a teacher, its value and the ratio."""
    return "\n\n".join(_result_text(line) for line in lines)


def _result_text(line: Result) -> str:
    teacher = line.get("teacher")
    broken = f", {line['broken']} could not be decoded" if line["broken"] else ""
    head = [f"{line['dataset']}, {images_text(line)} images{broken}", "", "95 % interval"]
    rows = [head + (["teacher", "kept"] if teacher else [])]
    for name, (low, high) in line["intervals"].items():
        value = value_of(line, name)
        if math.isnan(value):
            continue
        cells = [name, percent(value), f"{percent(low)} to {percent(high)}"]
        if teacher:
            kept = teacher["kept"].get(name, math.nan)
            cells += [
                percent({**teacher["metrics"], **teacher["extra"]}[name]),
                "" if math.isnan(kept) else percent(kept),
            ]
        rows.append(cells)
    notes = _notes(line)
    if teacher and "likeness" in teacher:
        notes.append(_likeness_text(teacher))
    return "\n".join([aligned(rows), *notes])


def images_text(line: Result) -> str:
    """The number of evaluated images, and that of the release where they differ."""
    release = line.get("release")
    return f"{line['n']:,}" + (f" of the release's {release:,}" if release not in (None, line["n"]) else "")


def _notes(line: Result) -> list[str]:
    """What makes the numbers mean less than they say."""
    notes = []
    if empty := line.get("empty_classes"):
        counted = "counts them as 0" if "mean_average_precision" in line["metrics"] else "is over the others"
        notes.append(f"{empty} of the classes have no image: the mean over classes {counted}")
    trivial = [name for name in line["metrics"] if "@" in name and int(name.partition("@")[2]) >= line["n"]]
    if trivial:
        notes.append(f"{', '.join(trivial)} of {line['n']} images is 1 for any model")
    if line["n"] < FEW_IMAGES:
        notes.append(f"fewer than {FEW_IMAGES} images: the intervals are too narrow")
    return notes


def _likeness_text(teacher: Mapping[str, Any]) -> str:
    likeness = teacher["likeness"]
    overlap = likeness["top5_overlap"]
    name, test = next((name, test) for name, test in teacher["difference"].items() if name.endswith("acc1"))
    lines = [
        f"agreement with the teacher: top-1 {percent(likeness['agreement@1'])}, "
        + ("" if math.isnan(overlap) else f"top-5 overlap {percent(overlap)}, ")
        + f"KL {likeness['kl']:.3f} nats",
        f"{name} against the teacher's: {100 * test['value']:+.2f} points ({100 * test['low']:+.2f} to "
        f"{100 * test['high']:+.2f}, paired bootstrap, p {'<=' if test['p'] < 0.005 else '='} {test['p']:.3f})",
    ]
    classes = {name: row for name, row in teacher["per_class"].items() if row["n"] >= LEAST_IMAGES}
    changes = sorted((row["student"] - row["teacher"], name) for name, row in classes.items())
    for label, extremes in (("lost most", changes[:3]), ("gained most", changes[::-1][:3])):
        cells = [f"{name} {100 * by:+.0f}" for by, name in extremes if (by < 0) == (label == "lost most") and by]
        if cells:
            lines.append(f"{label}: {', '.join(cells)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Skipped:
    """A set that was not evaluated, and why."""

    dataset: str
    reason: str


def skipped_text(skipped: Sequence[Skipped]) -> str:
    """Formats one line per reason, with all sets that share it; their own names in it are replaced by NAME."""
    by_reason: dict[str, list[Skipped]] = {}
    for entry in skipped:
        name = re.escape(entry.dataset).replace("/", "[/-]")
        general = re.sub(f"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])", "NAME", entry.reason)
        by_reason.setdefault(general, []).append(entry)
    lines = []
    for general, entries in by_reason.items():
        reason = general if len(entries) > 1 else entries[0].reason
        lines.append(f"skipped {', '.join(entry.dataset for entry in entries)}: {reason}")
    return "\n".join(lines)


def write_csv(path: Path, lines: Iterable[Result]) -> None:
    """Writes one row per result in the format of `clip_benchmark build`, with a further column n."""
    rows = []
    for line in lines:
        plain = {name: line[name] for name in ("dataset", "model", "pretrained", "task", "language")}
        plain["model_fullname"] = f"{line['model']} {line['pretrained']}"
        rows.append(line["metrics"] | line.get("extra", {}) | plain | {"n": line.get("n")})
    columns = dict.fromkeys(name for row in rows for name in row)
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)


def main_metric(line: Result, entries: Sequence[Entry]) -> str:
    """Returns the metric that the average uses: the collection's for this task, else the task's default."""
    named = next((entry.main_metric for entry in entries if entry.task == line["task"]), None)
    if named is not None:
        return named
    return "mean_average_precision" if "mean_average_precision" in line["metrics"] else MAIN_METRIC[line["task"]]


def value_of(line: Mapping[str, Any], metric: str) -> float:
    """Returns a metric of a result, or of its teacher part; nan if it was not measured."""
    return {**line["metrics"], **line["extra"]}.get(metric, math.nan)


def suite_text(lines: Sequence[Result], entries: Mapping[str, Sequence[Entry]]) -> str:
    """Formats the table of a model: one row per result with its main metric, and the average of the main metrics."""
    has_teacher = "teacher" in lines[0]
    rows = [
        ["", "n", "metric", "", "95 % interval"] + (["teacher", "kept", "as teacher", "ECE"] if has_teacher else [])
    ]
    means: list[tuple[float, float]] = []
    for line in lines:
        metric = main_metric(line, entries.get(line["dataset"], ()))
        teacher = line.get("teacher")
        own, other = value_of(line, metric), value_of(teacher or line, metric)
        means.append((own, other))
        interval = line["intervals"].get(metric)
        bounds = "" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"
        cells = [f"{line['dataset']} {SHORT[line['task']]}", images_text(line), metric, percent(own), bounds]
        if teacher:
            agreement = teacher.get("likeness", {}).get("agreement@1")
            cells += [percent(other), f"{100 * own / other:.0f} %" if other else ""]
            cells += ["" if agreement is None else f"{100 * agreement:.0f} %"]
            cells += [f"{line['extra']['ece']:.3f} ({teacher['extra']['ece']:.3f})" if "ece" in line["extra"] else ""]
        rows.append(cells)
    own, other = (sum(values) / len(values) for values in zip(*means, strict=True))
    last = [f"average of {len(lines)}", "", "", percent(own), ""]
    rows.append(last + ([percent(other), f"{100 * own / other:.0f} %" if other else "", "", ""] if has_teacher else []))
    return aligned(rows)


def tradeoff(lines: Sequence[Result], entries: Mapping[str, Sequence[Entry]]) -> list[dict[str, Any]]:
    """Points for `draw_tradeoff`: for each model, teachers included, the average over results that all have."""
    by_model: dict[tuple[str, str], dict[tuple[str, str], Result]] = {}
    for line in lines:
        teacher = [line["teacher"] | {"pretrained": ""}] if "teacher" in line else []
        for part in (line, *teacher):
            if "cost" in part:
                name = part["model"], part["pretrained"]
                of_part = {"task": line["task"], "metrics": part["metrics"], "extra": part["extra"]}
                by_model.setdefault(name, {})[line["dataset"], line["task"]] = of_part | {"cost": part["cost"]}
    shared = sorted(set.intersection(*map(set, by_model.values()))) if by_model else []
    points = []
    for (model, pretrained), results in by_model.items():
        scores = [value_of(results[key], main_metric(results[key], entries.get(key[0], ()))) for key in shared]
        if scores:
            cost = next(iter(results.values()))["cost"]
            points.append(
                {
                    "name": f"{model} {pretrained}".strip(),
                    "score": 100 * sum(scores) / len(scores),
                    "results": len(scores),
                }
                | cost
            )
    return points
