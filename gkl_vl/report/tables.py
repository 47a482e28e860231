"""Plain-text tables of results.

Records are the lines of results.jsonl. An evaluation record has `step`, `model` (teacher or student), `dataset`,
metrics as fractions, `n`, the number of images, and `intervals`, {metric: [low, high]}.
"""

import math
from collections.abc import Iterator, Sequence

COSTS = (
    ("image tower, parameters", "image_parameters", "smaller"),
    ("all parameters", "parameters", "smaller"),
    ("ms per image", "ms_per_image", "faster"),
)
"""What a model costs: name, key, and what a student of a lower cost is."""


def results_table(rows: list[dict]) -> str:
    """The closing table of a run in plain text, at most 100 columns wide: one line per number, one column per model.

    Args:
        rows: one dict per model, with the keys
            `model`: "teacher", "teacher 2" and so on, "student"; ratios are given for one teacher and one student,
            `name`: of the model,
            `image_parameters` (of the image tower, optional) and `parameters`: counts,
            `ms_per_image`: float, optional,
            `results`: {dataset: {metric key: fraction}}, as in the evaluation records. NaN (acc5 of fewer than five
            classes) is left out.
    """
    sides = {row["model"]: row for row in rows}
    width = 21 if len(sides) < 3 else 56 // len(sides)
    lines = [["", *(shorten(f"{model} {row['name']}", width) for model, row in sides.items())]]
    lines += [_cost_line(label, key, sides, better) for label, key, better in COSTS if all(key in row for row in rows)]
    for dataset in dict.fromkeys(dataset for row in rows for dataset in row["results"]):
        for key, values, kept in compared(sides, dataset):
            cells = ["–" if math.isnan(value) else f"{100 * value:.1f} %" for value in values.values()]
            note = "" if math.isnan(kept) else f"{100 * kept:.0f} % kept"
            lines.append([f"{shorten(dataset, 12)}  {shorten(key, 25)}", *cells, note])
    return _underlined(lines)


def compared(sides: dict[str, dict], dataset: str) -> Iterator[tuple[str, dict[str, float], float]]:
    """The metrics of a data set: key, value by model, and what the student kept of its only teacher's.

    A value that was not measured is nan, as is what was kept with several teachers or none; a metric without any value
    is left out.

    Args:
        sides: rows of `results_table` by `model`.
    """
    metrics = {model: row["results"].get(dataset, {}) for model, row in sides.items()}
    for key in dict.fromkeys(key for of_model in metrics.values() for key in of_model):
        values = {model: of_model.get(key, math.nan) for model, of_model in metrics.items()}
        if not all(math.isnan(value) for value in values.values()):
            kept = values["student"] / values["teacher"] if len(sides) == 2 and values.get("teacher") else math.nan
            yield key, values, kept


def metrics_by_dataset(records: list[dict], role: str) -> dict[str, dict[str, float]]:
    """The `results` of a row of `results_table`, from the evaluation records of `role`, "teacher" or "student"."""
    return {
        record["dataset"]: {key: value for key, value in record.items() if isinstance(value, float)}
        for record in records
        if record["model"] == role
    }


def intervals_by_dataset(records: list[dict], role: str) -> dict[str, dict[str, tuple[float, float]]]:
    """The 95 % intervals (low, high) beside `metrics_by_dataset`, of those metrics that have one."""
    return {
        record["dataset"]: {key: (low, high) for key, (low, high) in record.get("intervals", {}).items()}
        for record in records
        if record["model"] == role
    }


def pairing_lines(results: dict[str, dict[str, float]]) -> list[str]:
    """Below `results_table`: accuracy of the student's images with the texts of its teacher, in their common space."""
    lines = []
    for dataset, metrics in results.items():
        scores = {key: metrics.get(key, math.nan) for key in ("acc1", "acc5")}
        known = [f"{key} {100 * score:.1f} %" for key, score in scores.items() if not math.isnan(score)]
        lines += [f"{shorten(dataset, 12)}  {', '.join(known)}"] if known else []
    return ["", "The student's images with the teacher's texts:", *lines] if lines else []


def _cost_line(label: str, key: str, sides: dict[str, dict], better: str) -> list[str]:
    cells = [f"{row[key]:,.2f}" if isinstance(row[key], float) else f"{row[key]:,}" for row in sides.values()]
    note = f"{sides['teacher'][key] / sides['student'][key]:.1f}x {better}" if len(sides) == 2 else ""
    return [label, *cells, note]


def _underlined(lines: list[list[str]]) -> str:
    """An aligned table with a rule below its header."""
    width = max(len(line) for line in lines)
    header, *rows = aligned([line + [""] * (width - len(line)) for line in lines]).split("\n")
    return "\n".join([header, "-" * max(map(len, [header, *rows])), *rows])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Pads columns to their longest cell; the first is left-aligned, the others are right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def percent(share: float) -> str:
    """0.1234 -> "12.34 %"."""
    return f"{100 * share:.2f} %"


def shorten(text: str, length: int) -> str:
    """`text` on one line of at most `length` characters; longer text is cut and ends in an ellipsis."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
