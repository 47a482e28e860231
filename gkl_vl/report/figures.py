"""PNG figures of runs and model comparisons.

Records are the lines of results.jsonl. A training record has `step` and `train/...` keys, an evaluation record has
`step`, `model` (teacher or student), `dataset` and metrics as fractions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gkl_vl.atomic import nan_for_null, replacing
from gkl_vl.report.tables import shorten

Pixels = float
"""Coordinates from the figure's top left corner, and lengths."""

_WIDTH, _HEIGHT = 1400, 780
_INK, _MUTED, _RULE = "#1f2328", "#656d76", "#d8dee4"
_GREEN, _GREEN_BAR, _GREY_BAR, _TRACK = "#1a7f37", "#aceebb", "#d0d7de", "#f3f5f7"
# Okabe and Ito's palette for colour-blind readers; _INK is reserved for the total loss.
_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
TERMS = {
    "contrastive": "contrastive",
    "soft_ce": "soft CE",
    "wmse": "wMSE",
    "mimicry": "mimicry",
    "cross_soft_ce": "cross soft CE",
    "cross_wmse": "cross wMSE",
    "kl": "KL",
    "ce": "labels",
    "distillation": "distillation",
    "robust": "attacked",
    "consistency": "consistency",
}
"""Terms of the loss, by their key in the log without `train/`."""
PSEUDO_LABELS = {"mask_rate": "Pseudo-labels above the threshold", "acc1": "Accuracy of those pseudo-labels"}
"""What `pseudo_labels` gives."""
_MAX_DATASETS = 4
_SHEET_COLUMNS, _SHEET_ROWS = 2, 6


@dataclass(frozen=True)
class SheetItem:
    """A held-out image, its class name, and the student's predictions."""

    image: PIL.Image.Image
    name: str
    top: list[tuple[str, float]]
    """(text, probability in [0, 1]), most probable first; three are shown. Correct if the first text is `name`."""


# ---- figures


def draw_report(*, path: Path, records: list[dict], sheet: list[SheetItem], title: str) -> None:
    """Writes a PNG with loss curves and top-1 accuracy at the left and a sheet of held-out images at the right.

    Terms, evaluations and a teacher that are not in the records are left out. Without a sheet, pseudo-labels are drawn
    at the right; without either, the curves take the full width. The file is written atomically.

    Args:
        path: the .png to write.
        records: lines of results.jsonl, in chronological order.
        sheet: the first twelve are drawn.
        title: title of the figure, one line.

    Raises:
        OSError: no permission, disk full; an existing file is untouched.
    """
    figure = Figure(figsize=(_WIDTH / 100, _HEIGHT / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    _text(figure, 34, 40, shorten(title, 88), size=16, weight="bold")
    records = nan_for_null(records)  # as the file has them
    points = pseudo_labels(records, windows=12)
    width = 0.36 if sheet else 0.43 if points else 0.92
    _draw_losses(figure.add_axes((0.052, 0.53, width, 0.325)), records)
    _draw_accuracy(figure.add_axes((0.052, 0.075, width, 0.335)), records)
    if sheet:
        _draw_sheet(figure, sheet[: _SHEET_COLUMNS * _SHEET_ROWS])
    elif points:
        for key, bottom, height in (("mask_rate", 0.53, 0.325), ("acc1", 0.075, 0.335)):
            axes = figure.add_axes((0.545, bottom, width, height))
            _draw_shares(axes, PSEUDO_LABELS[key], {"": [(point["step"], point[key]) for point in points]})
    _save(figure, path)


def pseudo_labels(records: list[dict], *, windows: int) -> list[dict[str, float]]:
    """Share of pseudo-labels above the threshold and their accuracy over the training, in percent.

    Pools the logged batches, which are small, into `windows` consecutive parts. Each part has `step` (of its last
    batch), `mask_rate` and `acc1` (NaN if no pseudo-label is above the threshold).
    """
    logged = [nan_for_null(record) for record in records if "train/mask_rate" in record]
    points = []
    for part in np.array_split(np.arange(len(logged)), min(windows, len(logged))) if logged else []:
        rates = [logged[i]["train/mask_rate"] for i in part]
        correct = [logged[i]["train/mask_rate"] * logged[i]["train/pseudo_label_acc1"] for i in part]
        acc1 = 100 * sum(correct) / sum(rates) if sum(rates) else math.nan
        points.append({"step": logged[part[-1]]["step"], "mask_rate": 100 * sum(rates) / len(rates), "acc1": acc1})
    return points


def draw_pseudo_labels(*, path: Path, runs: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Writes a PNG of `pseudo_labels`: one row per setting, one line per method.

    The left column shows the share above the threshold, the right column the accuracy.

    Args:
        path: the .png to write.
        runs: setting -> method -> points.

    Raises:
        OSError: no permission, disk full; an existing file is untouched.
    """
    figure = Figure(figsize=(12, 4.2 * len(runs)), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    for row, (setting, methods) in enumerate(runs.items()):
        for left, key in ((0.06, "mask_rate"), (0.56, "acc1")):
            axes = figure.add_axes((left, (len(runs) - 1 - row + 0.13) / len(runs), 0.41, 0.64 / len(runs)))
            lines = {name: [(point["step"], point[key]) for point in points] for name, points in methods.items()}
            _draw_shares(axes, f"{PSEUDO_LABELS[key]}, {setting}", lines)
            axes.set_xlabel("step", fontsize=10.5, color=_MUTED)
    _save(figure, path)


def draw_tradeoff(*, path: Path, points: list[dict]) -> None:
    """Writes a PNG with the average main metric of each model over its parameters, and over its latency.

    Args:
        path: the .png to write.
        points: one dict per model with `name`, `score` (percent), `results` (number of results in the average),
            `parameters` and `ms_per_image`. An empty list gives a figure with a placeholder.

    Raises:
        OSError: no permission, disk full; an existing file is untouched.
    """
    figure = Figure(figsize=(12, 5), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    axes = [figure.add_axes((left, 0.13, 0.41, 0.7)) for left in (0.06, 0.56)]
    for ax, key, label in zip(
        axes, ("parameters", "ms_per_image"), ("parameters, millions", "image tower, ms per image"), strict=True
    ):
        _draw_points(ax, points, key, 1e-6 if key == "parameters" else 1, label)
    shared = f"Average main metric over {points[0]['results']} results" if points else "No results"
    figure.text(0.06, 0.93, shared, fontsize=14, weight="bold", color=_INK)
    _save(figure, path)


def draw_interpolation(
    *, path: Path, lines: dict[str, list[tuple[float, float]]], old: Sequence[str], share: float
) -> None:
    """Writes a PNG with the accuracy of averages of two models' weights over the share of the fine-tuned ones.

    Args:
        path: the .png to write.
        lines: set -> (share in [0, 1], percent), in ascending order.
        old: the sets that are drawn dashed, those that the start was made for.
        share: of the exported model, marked by a vertical line.

    Raises:
        OSError: no permission, disk full; an existing file is untouched.
    """
    figure = Figure(figsize=(8, 5.2), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.115, 0.88, 0.68))
    _style(axes)
    axes.set_xlabel("share of the fine-tuned weights, the rest is the start's", fontsize=10.5, color=_MUTED)
    handles = []
    for number, (name, points) in enumerate((name, points) for name, points in lines.items() if points):
        xs, ys = zip(*points, strict=True)
        dashes = (0, (5, 3)) if name in old else "-"
        (line,) = axes.plot(xs, ys, color=_COLOURS[number % len(_COLOURS)], linewidth=2, marker="o", linestyle=dashes)
        at = dict(points)[share]
        line.set_label(f"{shorten(name, 34)}  {ys[0]:.1f} → {at:.1f} → {ys[-1]:.1f} %")
        handles.append(line)
    axes.axvline(share, color=_MUTED, linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    title = f"Top-1 accuracy: start, exported ({share:g}), fine-tuned; old sets dashed"
    if handles:
        _add_title_and_legend(axes, title, handles, columns=1)
        axes.set_xlim(-0.03, 1.03)
    else:
        _draw_placeholder(axes, "Accuracy: not measured")
    _save(figure, path)


# ---- parts of figures


def _draw_losses(axes: Axes, records: list[dict]) -> None:
    _style(axes)
    curves = {"loss": ("total", _INK)}
    logged = [key for key in TERMS if any(f"train/{key}" in row for row in records)]
    curves |= {key: (TERMS[key], colour) for key, colour in zip(logged, _COLOURS, strict=False)}
    drawn = []
    for key, (label, colour) in curves.items():
        points = [(row["step"], row[f"train/{key}"]) for row in records if f"train/{key}" in row]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points and any(value != 0 for _, value in points):  # a term that is switched off has no curve
            _draw_curve(axes, points, colour, width=2.2 if key == "loss" else 1.4).set_label(label)
            drawn += [value for _, value in points]
    if not drawn:
        _draw_placeholder(axes, "Training loss: not logged")
        return
    if min(drawn) > 0 and max(drawn) > 20 * min(drawn):  # terms differ by orders of magnitude
        axes.set_yscale("log")
        axes.tick_params(which="minor", length=0)
        axes.set_ylabel("log scale", fontsize=10, color=_MUTED)
    _add_title_and_legend(axes, "Training loss", list(axes.lines), columns=len(axes.lines))


def _draw_accuracy(axes: Axes, records: list[dict]) -> None:
    _style(axes)
    axes.set_xlabel("step", fontsize=10.5, color=_MUTED)
    rows = [row for row in records if "acc1" in row and math.isfinite(row["acc1"])]
    if not rows:
        _draw_placeholder(axes, "Top-1 accuracy: not measured")
        return
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    rows = [row for row in rows if row["dataset"] in datasets[:_MAX_DATASETS]]
    handles = [
        _draw_dataset(axes, dataset, [row for row in rows if row["dataset"] == dataset], colour)
        for dataset, colour in zip(datasets[:_MAX_DATASETS], _COLOURS, strict=False)
    ]
    axes.set_ylim(bottom=0, top=1.08 * max(100 * row["acc1"] for row in rows) + 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    title = "Top-1 accuracy"
    if any(row["model"] == "teacher" for row in rows):
        title += ", teacher dashed"
    if len(datasets) > _MAX_DATASETS:
        title += f" ({_MAX_DATASETS} of {len(datasets)} data sets)"
    _add_title_and_legend(axes, title, handles, columns=2)


def _draw_dataset(axes: Axes, dataset: str, rows: list[dict], colour: str) -> Line2D:
    """Draws the student's curve and the teacher's horizontal line; returns the legend handle for both."""
    student = [(row["step"], 100 * row["acc1"]) for row in rows if row["model"] == "student"]
    teacher = [100 * row["acc1"] for row in rows if row["model"] == "teacher"]
    handle = Line2D([], [], color=colour, linewidth=2.0, marker="o", markersize=4.5)
    label = shorten(dataset, 13)  # two legend columns with numbers have to fit
    if student:
        _draw_curve(axes, student, colour, width=2.0, marker="o")
        label += f"  {student[-1][1]:.1f} %"
    if teacher:
        axes.axhline(teacher[-1], color=colour, linewidth=1.4, linestyle=(0, (5, 3)))
        label += f" (teacher {teacher[-1]:.1f} %)"
    handle.set_label(label)
    return handle


def _draw_shares(axes: Axes, title: str, lines: dict[str, list[tuple[float, float]]]) -> None:
    """Percentages over steps, one line per name; the legend shows the name, which may be empty, and the last value."""
    _style(axes)
    handles = []
    for (name, points), colour in zip(lines.items(), _COLOURS, strict=False):
        finite = [(int(step), value) for step, value in points if math.isfinite(value)]
        if finite:
            line = _draw_curve(axes, finite, colour, width=2.0, marker="o")
            line.set_label(f"{name}  {finite[-1][1]:.0f} %".strip())
            handles.append(line)
    if not handles:
        _draw_placeholder(axes, f"{title}: none")
        return
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    _add_title_and_legend(axes, title, handles, columns=len(handles) if len(handles) <= 3 else 2)


def _draw_points(axes: Axes, points: list[dict], key: str, unit: float, label: str) -> None:
    _style(axes)
    axes.set_xlabel(f"{label} (log scale)", fontsize=10.5, color=_MUTED)
    if not points:
        _draw_placeholder(axes, "no model")
        return
    xs, ys = [unit * point[key] for point in points], [point["score"] for point in points]
    axes.set_xscale("log")
    axes.set_xlim(min(xs) / 2.2, max(xs) * 2.2)
    axes.set_ylim(max(min(ys) - 8, 0), max(ys) + 8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    for number, (point, x, y) in enumerate(zip(points, xs, ys, strict=True)):
        axes.plot([x], [y], marker="o", markersize=9, color=_COLOURS[number % len(_COLOURS)])
        text = f"{shorten(point['name'], 28)}  {y:.1f} %"
        left = x > (min(xs) * max(xs)) ** 0.5  # in the right half the label goes to the left of its point
        axes.annotate(
            _drawable(text), (x, y), xytext=(-10 if left else 10, 6), textcoords="offset points", fontsize=9.5,
            color=_INK, ha="right" if left else "left", parse_math=False,
        )  # fmt: skip


def _draw_sheet(figure: Figure, sheet: list[SheetItem]) -> None:
    left, top, right, bottom = 620, 100, _WIDTH - 30, _HEIGHT - 16
    cell_width, cell_height = (right - left) / _SHEET_COLUMNS, (bottom - top) / _SHEET_ROWS
    hits = sum(bool(item.top) and item.top[0][0] == item.name for item in sheet)
    heading = "Held-out images and the student's three likeliest names"
    _text(figure, left, top - 22, heading, size=12, weight="bold")
    _text(figure, right - 16, top - 22, f"{hits} of {len(sheet)} right", size=10.5, colour=_MUTED, align="right")
    for index, item in enumerate(sheet):
        row, column = divmod(index, _SHEET_COLUMNS)
        _draw_item(figure, item, left + column * cell_width, top + row * cell_height, cell_width - 16)


def _draw_item(figure: Figure, item: SheetItem, x: Pixels, y: Pixels, width: Pixels) -> None:
    side, line = 88, 22
    image = PIL.Image.new("RGBA", item.image.size, "white")
    image.alpha_composite(item.image.convert("RGBA"))
    image = image.convert("RGB").resize((side, side), PIL.Image.Resampling.LANCZOS)
    figure.figimage(np.asarray(image), xo=round(x), yo=round(_HEIGHT - y - side), origin="upper")
    x, width = x + side + 12, width - side - 12
    _text(figure, x, y + 15, shorten(item.name, 30), size=11, weight="bold")
    for rank, (text, probability) in enumerate(item.top[:3]):
        top, correct = y + 22 + rank * line, text == item.name
        _bar(figure, x, top, width, line - 3, _TRACK)
        _bar(figure, x, top, width * min(max(probability, 0), 1), line - 3, _GREEN_BAR if correct else _GREY_BAR)
        colour = _GREEN if correct else _INK
        _text(figure, x + 6, top + 14, shorten(text, 27), size=9.5, colour=colour)
        _text(
            figure,
            x + width - 6,
            top + 14,
            f"{100 * probability:.0f} %",
            size=9.5,
            colour=colour,
            align="right",
        )


def _draw_curve(
    axes: Axes, points: Sequence[tuple[int, float]], colour: str, *, width: float, marker: str = ""
) -> Line2D:
    steps, values = zip(*points, strict=True)
    marker = marker or ("o" if len(points) == 1 else "")  # a line through one point is invisible
    (line,) = axes.plot(steps, values, color=colour, linewidth=width, marker=marker, markersize=4.5)
    return line


def _bar(figure: Figure, x: Pixels, y: Pixels, width: Pixels, height: Pixels, colour: str) -> None:
    corner = (x / _WIDTH, 1 - (y + height) / _HEIGHT)
    figure.add_artist(Rectangle(corner, width / _WIDTH, height / _HEIGHT, facecolor=colour, linewidth=0))


def _text(
    figure: Figure,
    x: Pixels,
    y: Pixels,
    text: str,
    *,
    size: int | float,
    weight="normal",
    colour=_INK,
    align="left",
) -> None:
    # Names contain `$` and `_`, which matplotlib would parse as formulas.
    style = {"fontsize": size, "weight": weight, "color": colour, "ha": align, "parse_math": False}
    figure.text(x / _WIDTH, 1 - y / _HEIGHT, _drawable(text), **style)


def _drawable(text: str) -> str:
    """`text` with a box for every character that the font lacks, about which matplotlib would warn."""
    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in text)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_RULE)
    axes.grid(axis="y", color=_RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=10, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def _add_title_and_legend(axes: Axes, title: str, handles: list[Line2D], *, columns: int) -> None:
    """Places the legend above the axes and the title above the legend."""
    rows = math.ceil(len(handles) / columns)
    axes.set_title(title, loc="left", fontsize=12, weight="bold", color=_INK, pad=9 + 15 * rows)
    for handle in handles:
        handle.set_label(_drawable(str(handle.get_label())).replace("$", r"\$"))
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 0.99), borderaxespad=0, ncols=columns,
        frameon=False, fontsize=9.5, labelcolor=_INK, handlelength=1.4, columnspacing=1.2, handletextpad=0.5,
        borderpad=0.4,
    )  # fmt: skip
    low, high = axes.get_xlim()
    if high - low < 2:  # a single step: ticks would be at fractions of a step
        axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)


def _draw_placeholder(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=11, color=_MUTED)
    axes.set_axis_off()


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png")
