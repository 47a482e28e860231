"""Many sets in one go: the flags of the evaluation scripts, their tables, and collections of data sets.

A suite's folder holds a JSON file for each task of each set and model, named as CLIP_benchmark names it and written as
it comes, `benchmark.csv` as `clip_benchmark build` writes it, and `suite.png`.
"""

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gkl_vl.benchmark import (
    MEAN_RECALL,
    TASK_OF,
    Line,
    Subject,
    evaluate_set,
    file_safe,
    refuse_random_weights,
)
from gkl_vl.data.benchmark_collections import BenchmarkTask, Entry, expand
from gkl_vl.data.benchmark_sets import BenchmarkSet, load_benchmark_sets
from gkl_vl.disk_cache import cache_folder
from gkl_vl.embed import Embedder
from gkl_vl.errors import UserError
from gkl_vl.gkl import Number
from gkl_vl.report import aligned
from gkl_vl.towers import load_clip


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What every evaluation of a CLIP asks."""

    dataset_root: str | None = None
    """Folder of the set, or its URL on the Hub; {dataset} and {dataset_cleaned} are filled in."""
    split: str = "test"
    """Of the sets."""
    custom_classname_file: str | None = None
    """JSON: {dataset: [class names]}."""
    custom_template_file: str | None = None
    """JSON: {dataset: [prompts with {c}]} or {dataset: {class: [prompts]}}."""
    batch_size: int = 64
    """Images, or texts, per forward pass and process."""
    num_workers: int = 2
    """Processes that decode images, per process; 0 = this one."""
    amp: bool = False
    """Autocast (fp16 on a GPU, bf16 on a CPU), as CLIP_benchmark does unless told --no_amp."""
    max_broken: float = 0.001
    """Share of a set's images that may fail to decode; they are left out and counted. More of them are an error."""
    cache: bool = True
    """Keep embeddings on disk, under a hash of model, preprocessing and data."""
    seed: int = 0
    """Of the bootstrap that the intervals come from."""
    allow_pickle: bool = False
    """Read weights stored as a pickle."""


def load_sets(names: Sequence[str], flags: Flags, *, split: str | None = None) -> list[BenchmarkSet]:
    """The sets that the flags name; another split than theirs where one is given."""
    return load_benchmark_sets(
        names,
        root=flags.dataset_root,
        split=split or flags.split,
        classname_file=flags.custom_classname_file,
        template_file=flags.custom_template_file,
    )


def load_subject(model: str, pretrained: str | None, flags: Flags, device: torch.device) -> Subject:
    """A model that is ready to embed.

    Raises: UserError as `load_clip`, and for an architecture without weights.
    """
    refuse_random_weights(model, pretrained)
    clip = load_clip(model, pretrained, allow_pickle=flags.allow_pickle)
    clip.towers.to(device)
    embedder = Embedder(
        clip=clip,
        device=device,
        batch_size=flags.batch_size,
        num_workers=flags.num_workers,
        amp=flags.amp,
        max_broken=flags.max_broken,
        cache=cache_folder("embeddings") if flags.cache else None,
        progress=True,
    )
    return Subject(model=model, pretrained=pretrained or "", embedder=embedder)


def load_subjects(
    model: str, pretrained: str | None, teacher: str | None, flags: Flags, device: torch.device
) -> tuple[Subject, Subject | None]:
    """A model, and the teacher that it is compared with."""
    subject = load_subject(model, pretrained, flags, device)
    return subject, None if teacher is None else load_subject(teacher, None, flags, device)


def tell(lines: Sequence[Line], paths: Sequence[Path], *also: str) -> None:
    """What a script says at its end."""
    print("\n".join([results_text(lines), *also]))
    print(f"appended to {', '.join(dict.fromkeys(map(str, paths)))}")


LEAST_IMAGES = 10

# ---- for people --------------------------------------------------------------------------------------------------


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


def percent(share: Number) -> str:
    return f"{100 * share:.2f} %"


# ---- collections -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Skipped:
    """An entry that was not measured."""

    dataset: str
    reason: str


def load_entries(
    names: Sequence[str], flags: Flags
) -> tuple[list[tuple[str, BenchmarkSet, list[Entry]]], list[Skipped]]:
    """The sets of collections, each with its entries; and what cannot be had, with the reason.

    Raises: UserError for a set that was named itself and cannot be had, and where nothing can.
    """
    by_name: dict[str, list[Entry]] = {}
    for entry in expand(names):
        by_name.setdefault(entry.dataset, []).append(entry)
    loaded, skipped = [], []
    for name, entries in by_name.items():
        if reason := next((entry.reason for entry in entries if entry.reason), None):
            skipped.append(Skipped(name, reason))
            continue
        try:
            (dataset,) = load_sets([name], flags)
        except UserError as error:
            if name in names:
                raise
            skipped.append(Skipped(name, str(error)))
            continue
        loaded.append((name, dataset, entries))
    if not loaded:
        raise UserError(
            f"none of the {len(by_name)} sets of {', '.join(names)} can be had; the first: {skipped[0].reason}"
        )
    return loaded, skipped


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


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is measured of every model, and where it is kept."""

    sets: Sequence[tuple[str, BenchmarkSet, list[Entry]]]
    output: Path
    recall_k: Sequence[int]
    seed: int
    resume: bool
    """Keep results that are there, of the same weights and settings."""
    is_main: bool
    """This process writes."""


def run_suite(suite: Suite, subject: Subject, teacher: Subject | None) -> Iterator[Line]:
    """The results of a model, one by one; each is written when it is there. All processes take part."""
    settings = {
        "weights": subject.embedder.fingerprint.hex()[:16],
        "teacher": None if teacher is None else teacher.embedder.fingerprint.hex()[:16],
        "recall_k": list(suite.recall_k),
        "seed": suite.seed,
    }
    for name, dataset, entries in suite.sets:
        tasks = tasks_of(dataset, entries)
        paths = {task: suite.output / file_name(name, subject, task) for task in tasks}
        there = {task: line for task in tasks if (line := read_line(paths[task])) and line.get("settings") == settings}
        missing: list[BenchmarkTask] = [task for task in tasks if not (suite.resume and task in there)]
        found = {task: there[task] for task in tasks if task not in missing}
        if missing:
            lines = evaluate_set(
                subject, teacher, dataset, missing, asked=name, recall_k=suite.recall_k, seed=suite.seed
            )
            for line in lines:
                if teacher is not None:
                    line["teacher"]["cost"] = teacher.embedder.cost
                found[line["task"]] = line | {"settings": settings, "cost": subject.embedder.cost}
                if suite.is_main:
                    write_line(paths[line["task"]], found[line["task"]])
        yield from (found[task] for task in tasks)


def text_task(dataset: BenchmarkSet) -> BenchmarkTask:
    """Choice for a set of choices, retrieval for all others."""
    return "image_caption_selection" if dataset.kind == "choice" else "zeroshot_retrieval"


def tasks_of(dataset: BenchmarkSet, entries: Sequence[Entry]) -> list[BenchmarkTask]:
    """Of a collection's entries, or what the set is for."""
    named: list[BenchmarkTask] = [entry.task for entry in entries if entry.task is not None] or [TASK_OF[dataset.kind]]
    return list(dict.fromkeys(named))


def file_name(dataset: str, subject: Subject, task: str) -> str:
    """CLIP_benchmark's default, with what cannot stand in a file name replaced."""
    parts = (dataset.removeprefix("wds/"), subject.pretrained, subject.model, "en", task)
    return "_".join(file_safe(part) for part in parts) + ".json"


def write_line(path: Path, line: Line) -> None:
    """Aside and renamed: a kill leaves the whole result or none."""
    aside = path.with_suffix(".writing")
    aside.write_text(json.dumps(line) + "\n", encoding="utf-8")
    aside.replace(path)


def read_line(path: Path) -> Line | None:
    """A result that is there; None for none, or for a file of something else."""
    try:
        line = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return line if isinstance(line, dict) and {"dataset", "model", "task", "metrics"} <= line.keys() else None


def refuse_mixing(output: Path, *, resume: bool) -> None:
    """Raises: UserError for a folder with results that are not to be gone on with."""
    if not resume and all_lines(output):
        raise UserError(f"{str(output)!r} already holds results: add --resume, or name another folder with --output")


def all_lines(output: Path) -> list[Line]:
    """Every result of a folder, whichever call made it."""
    return [line for path in sorted(output.glob("*.json")) if (line := read_line(path))]


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


# ---- the headline ------------------------------------------------------------------------------------------------

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


def value_of(line: Mapping[str, Any], metric: str) -> Number:
    """A metric of a result, or of the teacher's part of it; nan where it was not measured."""
    return {**line["metrics"], **line["extra"]}.get(metric, math.nan)


def suite_text(lines: Sequence[Line], entries: Mapping[str, Sequence[Entry]]) -> str:
    """The table of a model: a row for each result, and the average of the main metrics."""
    has_teacher = "teacher" in lines[0]
    rows = [
        ["", "n", "metric", "", "95 % interval"] + (["teacher", "kept", "as teacher", "ECE"] if has_teacher else [])
    ]
    means: list[tuple[Number, Number]] = []
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
