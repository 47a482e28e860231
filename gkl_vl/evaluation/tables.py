"""Results of evaluations as text tables and CSV."""

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkl_vl.evaluation.benchmark import (
    MEAN_RECALL,
    Line,
)
from gkl_vl.evaluation.set_collections import Entry
from gkl_vl.report import aligned, percent


def tell(lines: Sequence[Line], paths: Sequence[Path], *also: str) -> None:
    """What a script says at its end."""
    print("\n".join([results_text(lines), *also]))
    print(f"appended to {', '.join(dict.fromkeys(map(str, paths)))}")


LEAST_IMAGES = 10


def results_text(lines: Sequence[Line]) -> str:
    """Results of one task: a row for each set and metric, with 95 % intervals, the teacher's and what was kept."""
    return "\n\n".join(_result_text(line) for line in lines)


def _result_text(line: Line) -> str:
    teacher = line.get("teacher")
    broken = f", {line['broken']} could not be decoded" if line["broken"] else ""
    head = [f"{line['dataset']}, {line['n']:,} images{broken}", "", "95 % interval"]
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
    told = aligned(rows)
    return told if not teacher or "likeness" not in teacher else f"{told}\n{_likeness_text(teacher)}"


def _likeness_text(teacher: Mapping[str, Any]) -> str:
    likeness = teacher["likeness"]
    name, test = next((name, test) for name, test in teacher["difference"].items() if name.endswith("acc1"))
    lines = [
        f"as the teacher: top-1 {percent(likeness['agreement@1'])}, top-5 overlap {percent(likeness['top5_overlap'])}, "
        f"KL {likeness['kl']:.3f} nats",
        f"{name} against the teacher's: {100 * test['value']:+.2f} points ({100 * test['low']:+.2f} to "
        f"{100 * test['high']:+.2f}, paired bootstrap, p {'<=' if test['p'] < 0.005 else '='} {test['p']:.3f})",
    ]
    # Of a class with a few images a change says little.
    classes = {name: of for name, of in teacher["per_class"].items() if of["n"] >= LEAST_IMAGES}
    change = sorted((of["student"] - of["teacher"], name) for name, of in classes.items())
    for word, some in (("lost most", change[:3]), ("gained most", change[::-1][:3])):
        told = [f"{name} {100 * by:+.0f}" for by, name in some if (by < 0) == (word == "lost most") and by]
        if told:
            lines.append(f"{word}: {', '.join(told)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Skipped:
    """An entry that was not measured."""

    dataset: str
    reason: str


def skipped_text(skipped: Sequence[Skipped]) -> str:
    """A line for each reason, with all the sets that it holds for."""
    alike: dict[str, list[Skipped]] = {}
    for entry in skipped:
        name = re.escape(entry.dataset).replace("/", "[/-]")
        general = re.sub(f"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])", "NAME", entry.reason)
        alike.setdefault(general, []).append(entry)
    lines = []
    for general, entries in alike.items():
        reason = general if len(entries) > 1 else entries[0].reason
        lines.append(f"skipped {', '.join(entry.dataset for entry in entries)}: {reason}")
    return "\n".join(lines)


def write_csv(path: Path, lines: Iterable[Line]) -> None:
    """A row for each result, as `clip_benchmark build` makes it, with n beside."""
    rows = []
    for line in lines:
        plain = {name: line[name] for name in ("dataset", "model", "pretrained", "task", "language")}
        plain["model_fullname"] = f"{line['model']} {line['pretrained']}"
        rows.append(line["metrics"] | line.get("extra", {}) | plain | {"n": line.get("n")})
    columns = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)


MAIN_METRIC: dict[str, str] = {
    "zeroshot_classification": "acc1",
    "zeroshot_retrieval": MEAN_RECALL,
    "image_caption_selection": "text_acc",
}


def main_metric(line: Line, entries: Sequence[Entry]) -> str:
    """Of a collection's entry, or the task's usual one."""
    named = next((entry.main_metric for entry in entries if entry.task == line["task"]), None)
    if named is None and "mean_average_precision" in line["metrics"]:
        return "mean_average_precision"
    return named or MAIN_METRIC[line["task"]]


def value_of(line: Mapping[str, Any], metric: str) -> float:
    """A metric of a result, or of the teacher's part of it; nan where it was not measured."""
    return {**line["metrics"], **line["extra"]}.get(metric, math.nan)


def suite_text(lines: Sequence[Line], entries: Mapping[str, Sequence[Entry]]) -> str:
    """The table of a model: a row for each result, and the average of the main metrics."""
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
        told = "" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"
        cells = [f"{line['dataset']} {SHORT[line['task']]}", f"{line['n']:,}", metric, percent(own), told]
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


SHORT = {
    "zeroshot_classification": "classification",
    "zeroshot_retrieval": "retrieval",
    "image_caption_selection": "choice",
}


def tradeoff(lines: Sequence[Line], entries: Mapping[str, Sequence[Entry]]) -> list[dict[str, Any]]:
    """What `report.draw_tradeoff` draws: the average of each model, teachers too, over the results that all have."""
    by_model: dict[str, dict[tuple[str, str], Line]] = {}
    for line in lines:
        teacher = [line["teacher"] | {"pretrained": ""}] if "teacher" in line else []
        for part in (line, *teacher):
            if "cost" in part:
                name = f"{part['model']} {part['pretrained']}".strip()
                of_part = {"task": line["task"], "metrics": part["metrics"], "extra": part["extra"]}
                by_model.setdefault(name, {})[line["dataset"], line["task"]] = of_part | {"cost": part["cost"]}
    shared = sorted(set.intersection(*map(set, by_model.values()))) if by_model else []
    points = []
    for name, found in by_model.items():
        scores = [value_of(found[key], main_metric(found[key], entries.get(key[0], ()))) for key in shared]
        if scores:
            cost = next(iter(found.values()))["cost"]
            points.append({"name": name, "score": 100 * sum(scores) / len(scores), "results": len(scores)} | cost)
    return points
