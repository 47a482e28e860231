"""Many sets in one go: the flags of the evaluation scripts, their tables, and collections of data sets.

A suite's folder holds a JSON file for each task of each set and model, named as CLIP_benchmark names it and written as
it comes, `benchmark.csv` as `clip_benchmark build` writes it, and `suite.png`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gkl_vl.atomic import write_text
from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import TASK_OF, Line, Subject, evaluate_set, file_safe
from gkl_vl.evaluation.flags import Flags, load_sets
from gkl_vl.evaluation.set_collections import BenchmarkTask, Entry, expand
from gkl_vl.evaluation.sets import BenchmarkSet
from gkl_vl.evaluation.tables import Skipped


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
                    write_text(paths[line["task"]], json.dumps(found[line["task"]]) + "\n")
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
