"""Evaluates models on collections of sets; results are JSON files that a later call can reuse.

The output folder has one file for each model, set and task, with CLIP_benchmark's default name, written as soon as the
result is known.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from gkl_vl.atomic import nan_for_null, write_json
from gkl_vl.distributed import gather_objects
from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import (
    DRAWS,
    RESULT_RULES,
    TASK_OF,
    Result,
    Subject,
    evaluate_set,
    file_safe,
    targets_of,
)
from gkl_vl.evaluation.flags import EvalFlags, load_sets
from gkl_vl.evaluation.set_collections import BenchmarkTask, Entry, expand
from gkl_vl.evaluation.sets import BenchmarkSet
from gkl_vl.evaluation.tables import Skipped

NUMBERS = ("metrics", "extra", "intervals", "teacher")
"""Parts of a result that hold numbers and names only: null is a number that is not finite."""


def load_entries(
    names: Sequence[str], flags: EvalFlags
) -> tuple[list[tuple[str, BenchmarkSet, list[Entry]]], list[Skipped]]:
    """Loads the sets of collections: (name, set, entries) of each, and the sets that are skipped, with reasons.

    Raises: UserError if a set in `names` cannot be loaded, or if no set can.
    """
    if not names:
        raise UserError("--collection names no set: give one, or leave it out")
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
    """Reuse existing results with the same `settings_of`: models, data and settings."""
    is_main: bool
    """Whether this process writes the files."""


def run_suite(suite: Suite, subject: Subject, teacher: Subject | None) -> Iterator[Result]:
    """Yields the results of a model in order; the main process writes each to its file. All processes take part."""
    for name, dataset, entries in suite.sets:
        tasks = tasks_of(dataset, entries)
        settings = {task: settings_of(suite, subject, teacher, dataset, task) for task in tasks}
        paths = {task: result_file(suite.output, name, subject, task) for task in tasks}
        lines = {task: read_line(paths[task]) for task in tasks}
        reused = {
            task: line
            for task, line in lines.items()
            if suite.resume and line is not None and line.get("settings") == settings[task]
        }
        # All ranks: the first one decides, because disks of several machines may differ.
        settings, paths, results = gather_objects((settings, paths, reused))[0]
        missing: list[BenchmarkTask] = [task for task in tasks if task not in results]
        if missing:
            lines = evaluate_set(
                subject, teacher, dataset, missing, name=name, recall_k=suite.recall_k, seed=suite.seed
            )
            for line in lines:
                task = line["task"]
                if teacher is not None:
                    line["teacher"]["cost"] = teacher.embedder.cost
                results[task] = line | {"settings": settings[task], "cost": subject.embedder.cost}
                if suite.is_main:
                    write_json(paths[task], results[task])
        yield from (results[task] for task in tasks)


def settings_of(
    suite: Suite, subject: Subject, teacher: Subject | None, dataset: BenchmarkSet, task: BenchmarkTask
) -> dict[str, Any]:
    """Everything that decides a result, for its file; a result with other settings is not reused.

    weights, teacher    `Embedder.fingerprint` of both models, and the teacher's name
    data                `BenchmarkSet.identity`: images, targets, class names, templates
    recall_k, seed, draws, max_broken    of the metrics and their intervals
    rules               `RESULT_RULES`
    """
    return {
        "weights": subject.embedder.fingerprint.hex()[:16],
        "teacher": None if teacher is None else [teacher.model, teacher.embedder.fingerprint.hex()[:16]],
        "data": dataset.identity(*targets_of(dataset, [task]))[:16],
        "recall_k": list(suite.recall_k),
        "seed": suite.seed,
        "draws": DRAWS,
        "max_broken": subject.embedder.max_broken,
        "rules": RESULT_RULES,
    }


def text_task(dataset: BenchmarkSet) -> BenchmarkTask:
    """Returns the task on the captions of a set: caption selection for a choice set, retrieval for all others."""
    return "image_caption_selection" if dataset.kind == "choice" else "zeroshot_retrieval"


def tasks_of(dataset: BenchmarkSet, entries: Sequence[Entry]) -> list[BenchmarkTask]:
    """Returns the tasks of the collection's entries; without any, the default task of the set's kind."""
    named: list[BenchmarkTask] = [entry.task for entry in entries if entry.task is not None] or [TASK_OF[dataset.kind]]
    return list(dict.fromkeys(named))


def result_file(output: Path, dataset: str, subject: Subject, task: str) -> Path:
    """The file of a result: `file_name`, with a number behind it where that holds the result of another model or set.

    Names that differ only in characters that a file name cannot hold (runs/a, runs_a) would share a file otherwise.
    """
    wanted = {"dataset": dataset, "model": subject.model, "pretrained": subject.pretrained, "task": task}
    stem = file_name(dataset, subject, task).removesuffix(".json")
    paths = chain([output / f"{stem}.json"], (output / f"{stem}-{number}.json" for number in count(2)))
    return next(path for path in paths if (line := read_line(path)) is None or wanted.items() <= line.items())


def file_name(dataset: str, subject: Subject, task: str) -> str:
    """Returns CLIP_benchmark's default file name of a result; characters not allowed in one are replaced."""
    parts = (dataset.removeprefix("wds/"), subject.pretrained, subject.model, "en", task)
    return "_".join(file_safe(part) for part in parts) + ".json"


def read_line(path: Path) -> Result | None:
    """Reads a result, with nan for the nulls of its metrics; None if the file does not exist or is not a result."""
    try:
        line = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(line, dict) or not {"dataset", "model", "task", "metrics"} <= line.keys():
        return None
    return line | {key: nan_for_null(line[key]) for key in NUMBERS if key in line}


def refuse_mixing(output: Path, *, resume: bool) -> None:
    """Raises: UserError for a folder that has results, unless `resume`."""
    if not resume and all_lines(output):
        raise UserError(f"{str(output)!r} already holds results: add --resume, or name another folder with --output")


def all_lines(output: Path) -> list[Result]:
    """Reads all results of a folder, also those of earlier calls."""
    return [line for path in sorted(output.glob("*.json")) if (line := read_line(path))]
