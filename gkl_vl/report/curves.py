"""What the page draws of a run's records: charts of the metrics, the loss terms and all else that was logged."""

import math
from collections.abc import Mapping, Sequence

from gkl_vl.report.charts import Chart, Line
from gkl_vl.report.figures import PSEUDO_LABELS, TERMS, pseudo_labels

MOST_SETS = 12
"""Data sets with a chart of their own."""
_METRICS = {
    "acc1": "top-1 accuracy",
    "acc5": "top-5 accuracy",
    "mean_per_class_recall": "mean recall over classes",
    "mean_average_precision": "mean average precision",
    "text_acc": "choice of the right caption",
    "many_acc1": "top-1, frequent classes",
    "medium_acc1": "top-1, less frequent classes",
    "few_acc1": "top-1, rare classes",
}
_LOGGED = {
    "agreement@1": "top-1 agreement with the teacher, in the batch",
    "batch_acc1": "top-1 accuracy, in the batch",
    "batch_robust_acc1": "top-1 accuracy under attack, in the batch",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "logit_scale": "logit scale",
    "images_per_second": "images per second",
}
_ELSEWHERE = {"loss", "skipped", "images_seen", "mask_rate", "pseudo_label_acc1"}
"""Logged values that have another place on the page, or none."""


def metric_charts(records: list[dict]) -> list[Chart]:
    """For each data set the main metric of the student over the steps, with its intervals and the teachers' values."""
    charts = []
    for dataset in names_of_sets(records)[:MOST_SETS]:
        of_set = [record for record in records if record.get("dataset") == dataset]
        student = [record for record in of_set if record["model"] == "student"]
        key = main_metric([*student, *of_set])
        if key is None:
            continue
        measured = [record for record in student if key in record]
        bands = [record.get("intervals", {}).get(key) for record in measured]
        line = Line(
            points=[(record["step"], 100 * record[key]) for record in measured],
            band=None if None in bands else [(100 * low, 100 * high) for low, high in bands],
        )
        teachers = {r["model"]: 100 * r[key] for r in of_set if r["model"].startswith("teacher") and key in r}
        levels = [(name, value) for name, value in teachers.items() if math.isfinite(value)]
        charts.append(Chart(title=f"{dataset}, {label(key)}", lines=[line], levels=levels, percent=True))
    return charts


def loss_charts(records: list[dict]) -> list[Chart]:
    """The loss, and each of its terms; a term against several teachers has their mean and a line for each of them."""
    logged, charts = _logged(records), []
    for term, title in {"loss": "total", **TERMS}.items():
        keys = [key for key in logged if key.partition(".")[0] == term]
        lines = [Line(points=_points(records, key), label=_teacher_of(key)) for key in keys]
        drawn = [line for line in lines if any(value != 0 for _, value in line.points)]  # one that is off has no curve
        charts += [Chart(title=title, lines=drawn)] if drawn else []
    return charts


def pseudo_label_charts(records: list[dict]) -> list[Chart]:
    """Of a semi-supervised run: the share of pseudo-labels above the threshold, and their accuracy."""
    points = pseudo_labels(records, windows=24)
    return [
        Chart(title=title, lines=[Line(points=[(point["step"], point[key]) for point in points])], percent=True)
        for key, title in PSEUDO_LABELS.items()
    ]


def logged_charts(records: list[dict]) -> list[Chart]:
    """All that was logged beside losses and metrics."""
    keys = [key for key in _logged(records) if key not in _ELSEWHERE and key.partition(".")[0] not in TERMS]
    return [Chart(title=_LOGGED.get(key, key), lines=[Line(points=_points(records, key))]) for key in keys]


def main_metric(records: Sequence[Mapping]) -> str | None:
    """acc1, or the first metric of records without it; None without any."""
    keys = [key for record in records for key, value in record.items() if isinstance(value, float)]
    return "acc1" if "acc1" in keys else next(iter(keys), None)


def label(metric: str) -> str:
    """A metric in words."""
    kind, at, k = metric.partition("@")
    if at and kind.endswith("_retrieval_recall"):
        return f"{kind.partition('_')[0]} retrieval R@{k}"
    return _METRICS.get(metric, metric)


def names_of_sets(records: list[dict]) -> list[str]:
    """The data sets of the evaluations."""
    return list(dict.fromkeys(record["dataset"] for record in records if "model" in record and "dataset" in record))


def _logged(records: list[dict]) -> list[str]:
    keys = dict.fromkeys(key for record in records for key in record if key.startswith("train/"))
    return [key.removeprefix("train/") for key in keys]


def _points(records: list[dict], key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[f"train/{key}"]) for record in records if f"train/{key}" in record]


def _teacher_of(key: str) -> str:
    _, _, number = key.partition(".")
    return f"teacher {int(number) + 1}" if number.isdigit() else "mean"
