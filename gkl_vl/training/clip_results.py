"""Evaluation of a CLIP run, and what it leaves behind: exported student, table, picture and page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch
from torch import nn

from gkl_vl.data.sources import Source
from gkl_vl.disk_cache import cache_folder
from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import set_record
from gkl_vl.evaluation.embed import Embedder, milliseconds_per_image, top_names
from gkl_vl.evaluation.flips import first_classification, top1_flips
from gkl_vl.evaluation.sets import BUNDLED, BenchmarkSet, load_benchmark_set
from gkl_vl.export import hub
from gkl_vl.export.cards import ClipCard, RunFacts, WidgetExample
from gkl_vl.export.formats import Format, summary, write_formats
from gkl_vl.models.clip import BUNDLED_TEACHER, Clip
from gkl_vl.models.student import OneTower, Student, paired
from gkl_vl.models.towers import TransformersTowers, parameter_counts
from gkl_vl.protocols import Record
from gkl_vl.report.figures import SheetItem, draw_report
from gkl_vl.report.page import Flips, Page
from gkl_vl.report.tables import intervals_by_dataset, metrics_by_dataset, pairing_lines, results_table
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.clip_teacher import RunTeachers
from gkl_vl.training.run import Run
from gkl_vl.training.run_page import average_charts, clip_summary, command_shown, run_facts, write_report

SHEET_IMAGES = 12
DRAWINGS_BY = "The drawings are from Fluent UI Emoji, Copyright (c) Microsoft Corporation, MIT License."
"""Of the sheet, as in assets/LICENSES.md."""
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
    """A record per set, with CLIP_benchmark's keys, n and 95 % intervals. All processes share the work."""
    embedder = Embedder(clip=clip, device=device, batch_size=256, cache=cache)
    for dataset in sets:
        yield {"model": role} | set_record(embedder, dataset)


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
    sets: Sequence[BenchmarkSet],
    further: Callable[[Path], UserError | None],
) -> None:
    """Exports the student, draws picture and page, prints the table. Main process.

    Args:
        role: the student's in records.
        further: adds formats to the exported folder; what it returns is raised at the end.
    """
    student.towers.eval()
    facts, folder = run.facts(steps=steps), run.folder.path
    roles = [teacher_role(number) for number in range(len(teachers.clips))]
    own = [record for record in facts.metrics if record["model"] in roles]
    own += [record | {"model": STUDENT} for record in facts.metrics if record["model"] == role]
    sheet = draw_sheet(student, run.device) if bundled else []
    title, picture = run.title if role == STUDENT else f"{run.title} · before averaging", folder / "report.png"
    draw_report(path=picture, records=run.folder.records(), sheet=sheet, title=title)
    filled = replace(card(replace(facts, metrics=own, picture=picture)), example=widget_example(sheet))
    hub.export_clip(clip=student, folder=folder / "model", card=filled)
    models = {teacher_role(number): clip for number, clip in enumerate(teachers.clips)} | {STUDENT: student}
    rows = [table_row(name, clip, own, run.device) for name, clip in models.items()]
    paired = metrics_by_dataset(facts.metrics, TEXTS_OF_TEACHER)
    print("\n".join([results_table(rows), *pairing_lines(paired)]))
    print(f"\nLoad the student:\n\n{loading(student, folder / 'model')}\n")
    print(f"Pictures: {', '.join(map(str, sorted(folder.glob('*.png'))))}")
    write_report(
        folder, partial(make_page, run, student, teachers, filled, rows=rows, paired=paired, sheet=sheet, sets=sets)
    )
    refusal = further(folder / "model")
    run.push()
    if refusal is not None:
        raise refusal


def add_formats(
    folder: Path, *, formats: Sequence[Format], images: Source, sets: Sequence[BenchmarkSet]
) -> UserError | None:
    """Adds --export's formats to the exported student. Returns the refusal of one: the run itself is complete."""
    if not formats:
        return None
    try:
        write_formats(folder, formats, images=images, sets=sets)
    except UserError as error:
        return UserError(f"{str(folder)!r} is complete but for --export {' '.join(formats)}: {error}")
    print(summary(folder))
    return None


def make_page(
    run: Run,
    student: Clip,
    teachers: RunTeachers,
    card: ClipCard,
    *,
    rows: list[dict[str, Any]],
    paired: Mapping[str, Mapping[str, float]],
    sheet: Sequence[SheetItem],
    sets: Sequence[BenchmarkSet],
) -> Page:
    """The page of a CLIP run. Main process."""
    records = run.folder.records()
    facts = {
        "Student": card.student,
        "Initial weights": card.start,
        "Exported": None if card.averaged is None else f"{card.averaged:g} fine-tuned, the rest initial weights",
        "Teacher" if len(card.teachers) < 2 else "Teachers": ", ".join(card.teachers) or "none",
        "Training data": ", ".join(card.datasets),
        "Attacks in training": card.attack,
    }
    return Page(
        title=run.title,
        summary=clip_summary(card),
        records=records,
        rows=rows,
        paired=paired,
        averages=average_charts(records, card.averaged),
        sheet=sheet,
        flips=flips_against_teacher(run, student, teachers, sets),
        usage=dedent(loading(student, run.folder.path / "model")),
        command=command_shown(card),
        facts=run_facts(run, card, facts),
    )


def flips_against_teacher(run: Run, student: Clip, teachers: RunTeachers, sets: Sequence[BenchmarkSet]) -> Flips | None:
    """The student against its first teacher on the first set with classes; None without both. Main process alone.

    The teacher's embeddings are in the cache; the student embeds the set once more.
    """
    dataset = first_classification(sets)
    if dataset is None or not teachers.clips:
        return None
    alone = partial(Embedder, device=run.device, batch_size=256, num_workers=run.flags.workers, alone=True)
    teacher = alone(clip=teachers.clips[0], cache=cache_folder("embeddings"))
    return top1_flips(alone(clip=student), teacher, dataset, teacher_name=teachers.names[0])


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
        **parameter_counts(clip.towers),
        "ms_per_image": milliseconds_per_image(clip=clip, device=device),
        "results": metrics_by_dataset(records, role),
        "intervals": intervals_by_dataset(records, role),
    }


def draw_sheet(student: Clip, device: torch.device) -> list[SheetItem]:
    """Held-out drawings, evenly spaced through the set, with the student's three likeliest names."""
    dataset = load_benchmark_set(BUNDLED[0])
    names = dataset.classnames
    assert names is not None  # the bundled set has them
    drawings: list[Any] = list(dataset)
    chosen = drawings[:: max(len(drawings) // SHEET_IMAGES, 1)][:SHEET_IMAGES]
    embedder = Embedder(clip=student, device=device, batch_size=256)
    best = top_names(embedder, images=[image for image, _ in chosen], dataset=dataset, k=3)
    return [SheetItem(image, names[label], top) for (image, label), top in zip(chosen, best, strict=True)]


def widget_example(sheet: Sequence[SheetItem]) -> WidgetExample | None:
    """For the card: of these drawings the first that the student names, else the first, and its likeliest names."""
    if not sheet:
        return None
    item = next((item for item in sheet if item.top[0][0] == item.name), sheet[0])
    return WidgetExample(
        image=item.image, name=item.name, labels=[item.name, *(text for text, _ in item.top)], credit=DRAWINGS_BY
    )
