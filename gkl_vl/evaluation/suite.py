"""Evaluates models on collections of sets; results are JSON files that a later call can reuse.

The output folder has one file for each model, set and task, with CLIP_benchmark's default name, written as soon as the
result is known.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gkl_vl.atomic import write_text
from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import TASK_OF, Result, Subject, evaluate_set, file_safe
from gkl_vl.evaluation.flags import EvalFlags, load_sets
from gkl_vl.evaluation.set_collections import BenchmarkTask, Entry, expand
from gkl_vl.evaluation.sets import BenchmarkSet
from gkl_vl.evaluation.tables import Skipped


def load_entries(
    names: Sequence[str], flags: EvalFlags
) -> tuple[list[tuple[str, BenchmarkSet, list[Entry]]], list[Skipped]]:
    """Loads the sets of collections: (name, set, entries) of each, and the sets that are skipped, with reasons.

    Raises: UserError if a set in `names` cannot be loaded, or if no set can.
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
            f"none of the {len(by_name)} sets of {', '.join(names)} can be loaded; the first: {skipped[0].reason}"
        )
    return loaded, skipped


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The sets and settings of an evaluation, and its output folder."""

    sets: Sequence[tuple[str, BenchmarkSet, list[Entry]]]
    output: Path
    recall_k: Sequence[int]
    seed: int
    resume: bool
    """Reuse existing results with the same weights and settings."""
    is_main: bool
    """Whether this process writes the files."""


def run_suite(suite: Suite, subject: Subject, teacher: Subject | None) -> Iterator[Result]:
    """Yields the results of a model in order; the main process writes each to its file. All processes take part."""
    settings = {
        "weights": subject.embedder.fingerprint.hex()[:16],
        "teacher": None if teacher is None else teacher.embedder.fingerprint.hex()[:16],
        "recall_k": list(suite.recall_k),
        "seed": suite.seed,
    }
    for name, dataset, entries in suite.sets:
        tasks = tasks_of(dataset, entries)
        paths = {task: suite.output / file_name(name, subject, task) for task in tasks}
        existing = {
            task: line for task in tasks if (line := read_line(paths[task])) and line.get("settings") == settings
        }
        missing: list[BenchmarkTask] = [task for task in tasks if not (suite.resume and task in existing)]
        results = {task: existing[task] for task in tasks if task not in missing}
        if missing:
            lines = evaluate_set(
                subject, teacher, dataset, missing, name=name, recall_k=suite.recall_k, seed=suite.seed
            )
            for line in lines:
                if teacher is not None:
                    line["teacher"]["cost"] = teacher.embedder.cost
                results[line["task"]] = line | {"settings": settings, "cost": subject.embedder.cost}
                if suite.is_main:
                    write_text(paths[line["task"]], json.dumps(results[line["task"]]) + "\n")
        yield from (results[task] for task in tasks)


def text_task(dataset: BenchmarkSet) -> BenchmarkTask:
    """Returns the task on the captions of a set: caption selection for a choice set, retrieval for all others."""
    return "image_caption_selection" if dataset.kind == "choice" else "zeroshot_retrieval"


def tasks_of(dataset: BenchmarkSet, entries: Sequence[Entry]) -> list[BenchmarkTask]:
    """Returns the tasks of the collection's entries; without any, the default task of the set's kind."""
    named: list[BenchmarkTask] = [entry.task for entry in entries if entry.task is not None] or [TASK_OF[dataset.kind]]
    return list(dict.fromkeys(named))


def file_name(dataset: str, subject: Subject, task: str) -> str:
    """Returns CLIP_benchmark's default file name of a result; characters not allowed in one are replaced."""
    parts = (dataset.removeprefix("wds/"), subject.pretrained, subject.model, "en", task)
    return "_".join(file_safe(part) for part in parts) + ".json"


def read_line(path: Path) -> Result | None:
    """Reads a result; None if the file does not exist or is not a result."""
    try:
        line = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return line if isinstance(line, dict) and {"dataset", "model", "task", "metrics"} <= line.keys() else None


def refuse_mixing(output: Path, *, resume: bool) -> None:
    """Raises: UserError for a folder that has results, unless `resume`."""
    if not resume and all_lines(output):
        raise UserError(f"{str(output)!r} already holds results: add --resume, or name another folder with --output")


def all_lines(output: Path) -> list[Result]:
    """Reads all results of a folder, also those of earlier calls."""
    return [line for path in sorted(output.glob("*.json")) if (line := read_line(path))]
