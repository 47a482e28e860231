"""report.html at the end of a run: what the recipes put on the page of `report/page.py`."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from gkl_vl.errors import first_line, notice
from gkl_vl.export.cards import ClassifierCard, ClipCard
from gkl_vl.protocols import Record
from gkl_vl.provenance import without_secrets
from gkl_vl.report.charts import Chart, Line
from gkl_vl.report.curves import label, main_metric, names_of_sets
from gkl_vl.report.page import Page, write_page
from gkl_vl.training.run import Run

PAGE_NAME = "report.html"
MIXED = "mixed "
"""How the roles of averages of start and fine-tuned weights begin in records; the share of the latter follows."""


def write_report(folder: Path, make_page: Callable[[], Page]) -> None:
    """Writes report.html to a run folder and prints its path. Main process.

    The student is exported by then: an error of any kind costs a line on stderr, but neither the run nor its push.
    """
    path = folder / PAGE_NAME
    try:
        write_page(path, make_page())
    except Exception as error:
        notice(f"{path} was not written ({type(error).__name__}: {first_line(error)}); the run is complete without it")
    else:
        print(f"Report: {path}")


def clip_summary(card: ClipCard) -> str:
    """What was trained, in a sentence or two."""
    teachers = " and ".join(f"`{name}`" for name in card.teachers)
    training = f"distilled from {teachers}" if card.teachers else "trained without a teacher"
    attacks = f", against attacks on its images within {card.attack}," if card.attack else ""
    text = f"A CLIP model, `{card.student}`, {training}{attacks} on {_listed(card.datasets)} in {_updates(card)}."
    if card.one_tower is None:
        return text
    other = "text" if card.one_tower == "image" else "image"
    return (
        f"{text} Only the {card.one_tower} tower was trained, into the teacher's embedding space; the {other} tower is "
        "the teacher's."
    )


def classifier_summary(card: ClassifierCard) -> str:
    """What was trained, in a sentence."""
    return f"An image classifier, `{card.student}`, {card.made} on `{card.data}` in {_updates(card)}."


def run_facts(run: Run, card: ClipCard | ClassifierCard, more: Mapping[str, str | None]) -> dict[str, str]:
    """Name -> value of what is known about a run, behind `more`."""
    facts, precision = card.run, run.accelerator.mixed_precision
    skipped = [record["train/skipped"] for record in run.folder.records() if "train/skipped" in record]
    known = {
        **more,
        "Steps": f"{facts.steps:,}",
        "Images seen": None if facts.images is None else f"{facts.images:,}",
        "Samples skipped": f"{skipped[-1]:,.0f}" if skipped and skipped[-1] else None,
        "Training time": None if facts.hours is None else f"{_duration(facts.hours)}, without evaluation",
        "Hardware": facts.hardware,
        "Precision": "fp32" if precision == "no" else precision,
        "Seed": str(facts.seed),
        "Commit of gkl-vl": facts.commit,
        "Versions": ", ".join(f"{package} {version}" for package, version in facts.versions.items()),
        "Run folder": str(run.folder.path),
        "Written": time.strftime("%Y-%m-%d %H:%M %Z"),
    }
    return {name: value for name, value in known.items() if value}


def command_shown(card: ClipCard | ClassifierCard) -> str:
    """The command line of a run, without passwords and tokens in addresses."""
    return without_secrets(card.run.command)


def average_charts(records: list[Record], share: float | None) -> list[Chart]:
    """For each data set the main metric of the averages of start and fine-tuned weights, over the share of the latter.

    Args:
        share: of the exported average, which is marked.
    """
    charts = []
    for dataset in names_of_sets(records):
        of_set = [r for r in records if r.get("dataset") == dataset and r.get("model", "").startswith(MIXED)]
        key = main_metric(of_set)
        if key is not None:
            points = sorted((float(r["model"].removeprefix(MIXED)), 100 * r[key]) for r in of_set if key in r)
            title = f"{dataset}, {label(key)}"
            charts.append(Chart(title=title, lines=[Line(points=points)], percent=True, x_label="share", marked=share))
    return charts


def _updates(card: ClipCard | ClassifierCard) -> str:
    return f"{card.run.steps:,} steps"


def _listed(datasets: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in datasets)


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.0f} seconds"
