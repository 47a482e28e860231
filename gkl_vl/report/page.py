"""report.html: a run in one file that needs no network and no script.

Sections without content are left out: a run without a teacher has no comparison, one without images no sheet.
"""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

from gkl_vl.atomic import nan_for_null, write_text
from gkl_vl.report.charts import Chart, figure
from gkl_vl.report.curves import (
    MOST_SETS,
    label,
    logged_charts,
    loss_charts,
    main_metric,
    metric_charts,
    names_of_sets,
    pseudo_label_charts,
)
from gkl_vl.report.figures import SheetItem
from gkl_vl.report.markup import escaped, isolated, prose
from gkl_vl.report.tables import COSTS, compared

_STYLE = Path(__file__).with_name("page.css")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_IMAGE_SIDE = 144
"""Longest side of an embedded image, in pixels: twice its size on the page, for sharp screens."""
_LOSSLESS_SIDE = 64
"""Longest side up to which an image is embedded without loss: drawings and CIFAR's images."""


@dataclass(frozen=True, kw_only=True)
class FlippedImage:
    """An image on which one of two models is right and the other is wrong."""

    image: PIL.Image.Image
    name: str
    """Of its class."""
    student: tuple[str, float]
    """The class name with the highest probability, and that."""
    teacher: tuple[str, float]


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Top-1 predictions of a student and its teacher on the same images: how often which of them is right.

    Lost images are the negative flips of Yan et al., CVPR 2021, arXiv 2011.09161, won ones the positive flips.
    """

    dataset: str
    teacher: str
    """Its name."""
    both: int
    lost: int
    """The teacher alone is right."""
    won: int
    """The student alone is right."""
    neither: int
    difference: tuple[float, float, float]
    """Top-1 accuracy of the student minus the teacher's, and its 95 % interval (low, high)."""
    lost_images: Sequence[FlippedImage]
    """Some of them, in the order of the set."""
    won_images: Sequence[FlippedImage]


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the page shows."""

    title: str
    """Parts between " · "; the first is the heading."""
    summary: str
    """What was trained; names in backticks."""
    records: list[dict]
    """Lines of results.jsonl, in chronological order."""
    rows: list[dict]
    """Models as for `results_table`, with `intervals` beside `results`."""
    paired: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Metrics by data set of the student's images with the texts of its teacher."""
    published: str = ""
    """A line of published numbers."""
    averages: Sequence[Chart] = ()
    """Of a fine-tuning run: the metrics along the line from start to fine-tuned weights."""
    sheet: Sequence[SheetItem] = ()
    flips: Flips | None = None
    usage: str
    """Code that loads the student."""
    command: str
    facts: Mapping[str, str]
    """Name -> value of what else is known of the run."""


def write_page(path: Path, page: Page) -> None:
    """Replaces a file by the page.

    Raises: OSError for no permission or a full disk; an existing file is untouched.
    """
    write_text(path, page_text(page))


def page_text(page: Page) -> str:
    """The HTML of the page."""
    records = nan_for_null(page.records)
    heading, *details = page.title.split(" · ")
    sections = [
        _section("Results", f"{_results(page.rows)}{_paired(page.paired)}{_note(page.published)}"),
        _section("Evaluation while training", _grid(metric_charts(records)) + _left_out_sets(records)),
        _section("Averages of start and fine-tuned weights", _grid(page.averages)),
        _section("Pseudo-labels", _grid(pseudo_label_charts(records))),
        _section("Loss", _grid(loss_charts(records))),
        _section("Held-out images, and the student's three likeliest names", _sheet(page.sheet)),
        "" if page.flips is None else _section(f"Student against teacher: {page.flips.dataset}", _flips(page.flips)),
        _section("Load the student", f"<pre><code>{escaped(page.usage)}</code></pre>"),
        _section("The run", _run(page)),
        _more(logged_charts(records)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(page.title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"<header><p>{' · '.join(map(isolated, details))}</p><h1>{isolated(heading)}</h1>"
        f'<p class="summary">{prose(page.summary)}</p>{_headlines(page.rows)}</header>\n<main>\n'
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


# ---- parts of the page


def _section(title: str, content: str) -> str:
    return f"<section><h2>{isolated(title)}</h2>\n{content}</section>" if content else ""


def _note(text: str) -> str:
    return f'<p class="note">{prose(text)}</p>' if text else ""


def _grid(charts: Sequence[Chart]) -> str:
    figures = "".join(map(figure, charts))
    return f'<div class="charts">{figures}</div>' if figures else ""


def _more(charts: Sequence[Chart]) -> str:
    grid = _grid(charts)
    return (
        f"<section><details><summary>Everything else that was logged</summary>{grid}</details></section>"
        if grid
        else ""
    )


def _left_out_sets(records: list[dict]) -> str:
    count = len(names_of_sets(records)) - MOST_SETS
    return _note(f"{count} further data sets are in the table above.") if count > 0 else ""


def _headlines(rows: list[dict]) -> str:
    """Up to four numbers: the main metric of two data sets, size and speed."""
    sides = {row["model"]: row for row in rows}
    student, teacher = sides["student"], sides.get("teacher") if len(sides) == 2 else None
    tiles = []
    for dataset, metrics in list(student["results"].items())[:2]:
        key = main_metric([metrics])
        if key is not None and math.isfinite(metrics[key]):
            reference = math.nan if teacher is None else teacher["results"].get(dataset, {}).get(key, math.nan)
            beside = "" if math.isnan(reference) else f"teacher {100 * reference:.1f} %"
            interval = _interval(student, dataset, key)
            notes = [part for part in (interval and f"95 %: {interval}", beside) if part]
            tiles.append((f"{isolated(dataset)}, {escaped(label(key))}", f"{100 * metrics[key]:.1f} %", notes))
    for name, key, better in COSTS:
        if teacher is not None and key in student and key in teacher and key != "parameters":
            of_both = f"{_count(student[key])} against {_count(teacher[key])}"
            tiles.append((name, f"{teacher[key] / student[key]:.1f}× {better}", [of_both]))
    cells = (
        f"<li><span>{name}</span><b>{value}</b>{''.join(f'<small>{note}</small>' for note in notes)}</li>"
        for name, value, notes in tiles
    )
    return f'<ul class="tiles">{"".join(cells)}</ul>' if tiles else ""


def _results(rows: list[dict]) -> str:
    """The table of all metrics with their intervals, and of what the models cost."""
    sides = {row["model"]: row for row in rows}
    heads = "".join(
        f'<th scope="col">{isolated(model)}<small>{isolated(row["name"])}</small></th>' for model, row in sides.items()
    )
    groups = {dataset: list(_metric_lines(sides, dataset)) for row in rows for dataset in row["results"]}
    bodies = [_rows(isolated(dataset), lines) for dataset, lines in groups.items()]
    kept = '<th scope="col">kept</th>' if len(sides) == 2 else ""
    small = "In grey: 95 % intervals over the images." if any(row["intervals"] for row in rows) else ""
    return (
        f'<div class="wide"><table><thead><tr><th></th>{heads}{kept}</tr></thead>'
        f"{''.join(bodies)}{_rows('cost', list(_cost_lines(sides)))}</table></div>{_note(small)}"
    )


def _rows(heading: str, lines: list[str]) -> str:
    """A group of rows below a heading; "" without rows."""
    head = f'<tr><th scope="rowgroup" colspan="9">{heading}</th></tr>'
    return f"<tbody>{head}{''.join(lines)}</tbody>" if lines else ""


def _metric_lines(sides: dict[str, dict], dataset: str) -> Iterator[str]:
    for key, values, kept in compared(sides, dataset):
        cells = []
        for model, value in values.items():
            interval = _interval(sides[model], dataset, key)
            shown = "–" if math.isnan(value) else f"{100 * value:.1f} %"
            cells.append(f"<td>{shown} <small>{interval}</small></td>")
        share = f"<td>{'' if math.isnan(kept) else f'{100 * kept:.0f} %'}</td>" if len(sides) == 2 else ""
        yield f'<tr><th scope="row">{escaped(label(key))}</th>{"".join(cells)}{share}</tr>'


def _cost_lines(sides: dict[str, dict]) -> Iterator[str]:
    for name, key, better in COSTS:
        if all(key in row for row in sides.values()):
            cells = "".join(f"<td>{_count(row[key])}</td>" for row in sides.values())
            ratio = f"{sides['teacher'][key] / sides['student'][key]:.1f}× {better}" if len(sides) == 2 else None
            cells += "" if ratio is None else f'<td class="ratio">{ratio}</td>'
            yield f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _interval(row: Mapping, dataset: str, key: str) -> str:
    low, high = row["intervals"].get(dataset, {}).get(key, (math.nan, math.nan))
    return "" if math.isnan(low) or math.isnan(high) else f"{100 * low:.1f} to {100 * high:.1f}"


def _count(value: float) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _paired(results: Mapping[str, Mapping[str, float]]) -> str:
    rows = []
    for dataset, metrics in results.items():
        shown = [f"{escaped(label(key))} {100 * metrics[key]:.1f} %" for key in ("acc1", "acc5") if key in metrics]
        rows += [f"<li>{isolated(dataset)}: {', '.join(shown)}</li>"] if shown else []
    return f"<h3>The student's images with the teacher's texts</h3><ul>{''.join(rows)}</ul>" if rows else ""


def _sheet(sheet: Sequence[SheetItem]) -> str:
    cards = []
    for item in sheet:
        bars = []
        for name, probability in item.top[:3]:
            right = ' class="right"' if name == item.name else ""
            width = 100 * min(max(probability, 0), 1)
            bars.append(
                f'<li{right}><i style="width:{width:.1f}%"></i><span>{isolated(name)}</span>'
                f"<span>{100 * probability:.0f} %</span></li>"
            )
        cards.append(_card(item.image, item.name, f'<ol class="bars">{"".join(bars)}</ol>'))
    return f'<ul class="cards">{"".join(cards)}</ul>' if cards else ""


def _flips(flips: Flips) -> str:
    """The four cases with their counts, and images of the two in which the models differ."""
    parts = [_cases(flips)]
    for title, count, images in (
        ("Lost: the teacher is right, the student is wrong", flips.lost, flips.lost_images),
        ("Won: the student is right, the teacher is wrong", flips.won, flips.won_images),
    ):
        shown = (
            f"{len(images)} of {count:,}, evenly spaced through the set" if len(images) < count else f"all {count:,}"
        )
        if images:
            parts.append(f'<h3>{title}</h3>{_note(shown)}<ul class="cards">{"".join(map(_flipped, images))}</ul>')
    return "".join(parts)


def _cases(flips: Flips) -> str:
    counts = {
        "both": ("both right", flips.both),
        "won": ("won: the student alone", flips.won),
        "lost": ("lost: the teacher alone", flips.lost),
        "neither": ("both wrong", flips.neither),
    }
    total = sum(count for _, count in counts.values())
    bars, tiles = [], []
    for case, (name, count) in counts.items():
        share = 100 * count / total
        bars.append(f'<i class="{case}" style="width:{share:.2f}%"></i>')
        tiles.append(f'<li class="{case}"><b>{count:,}</b>{name}<small>{share:.1f} %</small></li>')
    value, low, high = (f"{100 * number:+.1f}".replace("-", "−") for number in flips.difference)
    note = (
        f"Top-1 predictions on {total:,} images, beside teacher `{flips.teacher}`. Accuracy of the student minus the "
        f"teacher's: {value} points ({low} to {high}: 95\u00a0%, paired bootstrap over the images)."
    )
    return (
        f'<div class="bar" aria-hidden="true">{"".join(bars)}</div><ul class="cases">{"".join(tiles)}</ul>{_note(note)}'
    )


def _flipped(item: FlippedImage) -> str:
    guesses = []
    for who, (name, probability) in (("student", item.student), ("teacher", item.teacher)):
        case = "right" if name == item.name else "wrong"
        share = f"<small>{100 * probability:.0f} %</small>"
        guesses.append(f'<dt>{who}</dt><dd class="{case}">{isolated(name)} {share}</dd>')
    return _card(item.image, item.name, f'<dl class="guesses">{"".join(guesses)}</dl>')


def _card(image: PIL.Image.Image, name: str, content: str) -> str:
    return f"<li>{_image(image)}<div><b>{isolated(name)}</b>{content}</div></li>"


def _run(page: Page) -> str:
    facts = "".join(f"<dt>{escaped(name)}</dt><dd>{isolated(value)}</dd>" for name, value in page.facts.items())
    return f'<pre class="wrapped"><code>{escaped(page.command)}</code></pre><dl class="facts">{facts}</dl>'


def _image(image: PIL.Image.Image) -> str:
    """An img element on white, small ones without loss. Its class name stands beside it."""
    shown = PIL.Image.new("RGBA", image.size, "white")
    shown.alpha_composite(image.convert("RGBA"))
    shown = shown.convert("RGB")
    lossless = max(shown.size) <= _LOSSLESS_SIDE
    shown.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE), PIL.Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if lossless:
        shown.save(file, "png", optimize=True)
    else:
        shown.save(file, "jpeg", quality=85)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" src="data:image/{"png" if lossless else "jpeg"};base64,{content}">'
