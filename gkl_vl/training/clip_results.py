"""Evaluation of a CLIP run, and what it leaves behind: exported student, table and pictures."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gkl_vl import report
from gkl_vl.disk_cache import cache_folder
from gkl_vl.evaluation.benchmark import TASK_OF, measure, metrics_of
from gkl_vl.evaluation.embed import Embedder, milliseconds_per_image, top_names
from gkl_vl.evaluation.set_collections import BenchmarkTask
from gkl_vl.evaluation.sets import BUNDLED, BenchmarkSet, load_benchmark_set
from gkl_vl.export import hub
from gkl_vl.export.cards import ClipCard, RunFacts
from gkl_vl.models.clip import BUNDLED_TEACHER, Clip
from gkl_vl.models.student import OneTower, Student, paired
from gkl_vl.models.towers import TransformersTowers
from gkl_vl.protocols import Record
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.clip_teacher import RunTeachers
from gkl_vl.training.run import Run

SHEET_IMAGES = 12
STUDENT = "student"
"""Name, in records, of the student with its trained weights."""
TEXTS_OF_TEACHER = "student, texts of teacher"
"""Name, in records, of the student's images with the texts of its only teacher."""


def evaluate_student(
    sets: list[BenchmarkSet], student: Clip, device: torch.device, model: nn.Module
) -> Iterator[Record]:
    """Records of the student with the current weights of `model`."""
    yield from evaluate(replace(student, towers=model.towers), STUDENT, sets, device, cache=None)


def evaluate(
    clip: Clip, role: str, sets: list[BenchmarkSet], device: torch.device, cache: Path | None
) -> Iterator[Record]:
    """A record per set, with CLIP_benchmark's keys. All processes share the work."""
    embedder = Embedder(clip=clip, device=device, batch_size=256, cache=cache)
    for dataset in sets:
        tasks: list[BenchmarkTask] = [TASK_OF[dataset.kind]]
        if dataset.name in BUNDLED:  # they have captions too
            tasks.append("zeroshot_retrieval")
        yield {"model": role, "dataset": dataset.name} | metrics_of(measure(embedder, dataset, tasks))


def teacher_role(number: int) -> str:
    """Name of a teacher in records and tables."""
    return "teacher" if number == 0 else f"teacher {number + 1}"


def models_beside(model: Student | OneTower, trained: Clip, teachers: RunTeachers) -> dict[str, Clip]:
    """What is evaluated beside the student at the end of a run, by role."""
    beside = {teacher_role(number): clip for number, clip in enumerate(teachers.clips)}
    if isinstance(model, Student) and model.in_teachers_space and teachers.clips:
        beside[TEXTS_OF_TEACHER] = paired(image_of=trained, text_of=teachers.clips[0])
    return beside


def log_once(
    folder: RunFolder, step: int, models: dict[str, Clip], sets: list[BenchmarkSet], device: torch.device
) -> None:
    """Logs models' metrics, by role, once per run, also after a resume. All processes measure, the main one writes."""
    logged = {record.get("model") for record in folder.records()}
    for role, clip in models.items():
        cache = cache_folder("embeddings") if role.startswith("teacher") else None  # a student's are not used again
        records = list(evaluate(clip, role, sets, device, cache))  # all ranks
        for record in records if role not in logged else ():
            folder.log({"step": step} | record)


def finish(
    run: Run,
    student: Clip,
    teachers: RunTeachers,
    card: Callable[[RunFacts], ClipCard],
    *,
    steps: int,
    bundled: bool,
    role: str,
) -> None:
    """Exports the student, draws the report, prints the table. Main process. `role`: of the student in records."""
    student.towers.eval()
    facts, folder = run.facts(steps=steps), run.folder.path
    roles = [teacher_role(number) for number in range(len(teachers.clips))]
    own = [record for record in facts.metrics if record["model"] in roles]
    own += [record | {"model": STUDENT} for record in facts.metrics if record["model"] == role]
    hub.export_clip(clip=student, folder=folder / "model", card=card(replace(facts, metrics=own)))
    sheet = draw_sheet(student, run.device) if bundled else []
    title = run.title if role == STUDENT else f"{run.title} · before averaging"
    report.draw_report(path=folder / "report.png", records=run.folder.records(), sheet=sheet, title=title)
    models = {teacher_role(number): clip for number, clip in enumerate(teachers.clips)} | {STUDENT: student}
    print(report.results_table([table_row(name, clip, own, run.device) for name, clip in models.items()]))
    for line in report.pairing_lines(report.metrics_by_dataset(facts.metrics, TEXTS_OF_TEACHER)):
        print(line)
    print(f"\nLoad the student:\n\n{loading(student, folder / 'model')}\n")
    print(f"Pictures: {', '.join(map(str, sorted(folder.glob('*.png'))))}")
    run.push()


def loading(student: Clip, folder: Path) -> str:
    """The code that loads an exported student."""
    if isinstance(student.towers, TransformersTowers):
        name = type(student.towers.model).__name__
        return f'    from transformers import {name}\n    model = {name}.from_pretrained("{folder}")'
    created = f'open_clip.create_model_and_transforms("local-dir:{folder}")'
    return f"    import open_clip\n    model, _, preprocess = {created}"


def table_row(role: str, clip: Clip, records: list[Record], device: torch.device) -> dict[str, Any]:
    """A model in the closing table: parameters, time per image, metrics."""
    return {
        "model": role,
        "name": "bundled" if clip.name == BUNDLED_TEACHER else clip.name,
        "image_parameters": sum(p.numel() for p in clip.towers.image_parameters()),
        "parameters": sum(p.numel() for p in clip.towers.parameters()),
        "ms_per_image": milliseconds_per_image(clip=clip, device=device),
        "results": report.metrics_by_dataset(records, role),
    }


def draw_sheet(student: Clip, device: torch.device) -> list[report.SheetItem]:
    """Held-out drawings, evenly spaced through the set, with the student's three likeliest names."""
    dataset = load_benchmark_set(BUNDLED[0])
    names = dataset.classnames
    assert names is not None  # the bundled set has them
    drawings: list[Any] = list(dataset)
    chosen = drawings[:: max(len(drawings) // SHEET_IMAGES, 1)][:SHEET_IMAGES]
    embedder = Embedder(clip=student, device=device, batch_size=256)
    best = top_names(embedder, images=[image for image, _ in chosen], dataset=dataset, k=3)
    return [report.SheetItem(image, names[label], top) for (image, label), top in zip(chosen, best, strict=True)]
