"""HTML of what the page shows. All texts that come from users, files and models are escaped."""

import json
from collections.abc import Sequence

from gkl_vl.demo.classify import Prediction
from gkl_vl.demo.models import DemoModel
from gkl_vl.demo.search import Index, Ranking, shared_first
from gkl_vl.report.markup import escaped, isolated

SHOWN_LABELS = 10
FIRST = 10
"""Images that are compared between two models."""


def header(models: Sequence[DemoModel]) -> str:
    """The title and a card for each model."""
    student, *teachers = models
    beside = "".join(f" <small>beside {isolated(teacher.title)}</small>" for teacher in teachers)
    cards = "".join(_card(model, count=len(models)) for model in models)
    return (
        f'<header class="head"><h1>{isolated(student.title)}{beside}</h1>'
        f"<p>Zero-shot classification and image search with a CLIP, on this machine ({student.embedder.device}).</p>"
        f'<div class="cards">{cards}</div></header>'
    )


def _card(model: DemoModel, *, count: int) -> str:
    clip = model.embedder.clip
    facts = (
        ("input", f"{clip.image_size} px"),
        ("embedding", f"{clip.embed_dim}-d"),
        ("parameters", _millions(model.parameters)),
        ("image tower", _millions(model.image_parameters)),
        ("per image", _ms(model.ms_per_image)),
        ("per text", _ms(model.ms_per_text)),
    )
    title = f'<h2><span class="role {model.role}"></span>{_name(model, count)}</h2>' if count > 1 else ""
    terms = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<section class="card">{title}<dl>{terms}</dl></section>'


def message(text: str, *, kind: str = "note") -> str:
    """A line for the user: a `note`, or a `problem`. Empty for an empty text."""
    return f'<p class="message {kind}" role="status">{escaped(text)}</p>' if text else ""


def bars(models: Sequence[DemoModel], predictions: Sequence[Prediction]) -> str:
    """The probabilities of each model as bars."""
    columns = "".join(
        f'<section class="answer {model.role}">{_answer_title(model, len(models), _times(prediction))}'
        f"{_rows(prediction.probabilities)}</section>"
        for model, prediction in zip(models, predictions, strict=True)
    )
    return f'<div class="answers">{columns}</div>'


def _times(prediction: Prediction) -> str:
    return f"image {_ms(prediction.image_ms)} · label {_ms(prediction.ms_per_text)}"


def _rows(probabilities: Sequence[tuple[str, float]]) -> str:
    shown, others = probabilities[:SHOWN_LABELS], probabilities[SHOWN_LABELS:]
    rows = "".join(
        f'<li><span class="label">{isolated(label)}</span><span class="share">{100 * share:.1f} %</span>'
        f'<span class="track"><span class="bar" style="width:{100 * share:.1f}%"></span></span></li>'
        for label, share in shown
    )
    rest = 100 * sum(share for _, share in others)
    more = f'<p class="rest">{len(others):,} other labels, {rest:.1f} % together</p>' if others else ""
    return f'<ol class="bars">{rows}</ol>{more}'


def _answer_title(model: DemoModel, count: int, times: str) -> str:
    return f'<h3 class="answer-title"><span>{_name(model, count)}</span><span class="times">{times}</span></h3>'


def _name(model: DemoModel, count: int) -> str:
    """What one of `count` models is called in an answer."""
    return model.role.capitalize() if count > 1 else "Result"


def ranking_title(model: DemoModel, ranking: Ranking, *, count: int) -> str:
    """The line above the images of one of `count` models."""
    return _answer_title(model, count, f"query {_ms(ranking.query_ms)}")


def found(index: Index, rankings: Sequence[Ranking], query: str) -> str:
    """What was searched, in one line."""
    count, total = len(rankings[0].order), len(index.folder.names)
    if index.has_ended:
        text = f"{count:,} image{'s' if count > 1 else ''} by similarity to {query}."
    else:
        text = f"{count:,} of {total:,} images by similarity to {query}; the others are not embedded yet."
    if len(rankings) > 1:
        shared, first = len(shared_first(rankings, FIRST)), min(FIRST, count)
        text += f" Student and teacher share {shared} of their first {first}{', outlined in blue' if shared else ''}."
    return message(text)


def grid(ranking: Ranking, shared: Sequence[int]) -> str:
    """A ranking as JSON for grid.js; `shared` are outlined."""
    similarities = [round(similarity, 3) for similarity in ranking.similarities]
    return json.dumps({"order": ranking.order, "similarities": similarities, "shared": list(shared)})


def progress(index: Index) -> str:
    """How many images are embedded, and what of them failed."""
    count = len(index.folder.names)
    if index.problem:
        return message(f"Embedding ended at {index.seen:,} of {count:,} images: {index.problem}", kind="problem")
    if not index.has_ended:
        bar = f'<span class="track"><span class="bar" style="width:{100 * index.seen / count:.1f}%"></span></span>'
        return f'<div class="progress" role="status">{index.seen:,} of {count:,} images embedded{bar}</div>'
    text = f"{int(index.ready.sum()):,} images of the folder {isolated(index.folder.root.name)}."
    if index.broken:
        text += f" {len(index.broken):,} left out: {isolated(index.broken[0])}"
    return f'<div class="progress">{text}</div>'


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e3:.0f} k"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f} ms" if milliseconds < 100 else f"{milliseconds:,.0f} ms"
