"""The page: two tabs around the functions of classify.py and search.py. Only this module and server.py use gradio.

A handler returns a value for each of its outputs: a message, the answers, and where an image was given, its field.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
from PIL import Image

from gkl_vl.demo import markup
from gkl_vl.demo.classify import TEMPLATE, classify, parse_labels
from gkl_vl.demo.folder import decode_named
from gkl_vl.demo.models import DemoModel
from gkl_vl.demo.search import Index, Ranking, search_image, search_words, shared_first
from gkl_vl.errors import UserError

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
GRID_JS = (Path(__file__).parent / "grid.js").read_text(encoding="utf-8")
_SHOW_ANSWER = """() => setTimeout(() => {
  const column = [...document.querySelectorAll(".answer-column")].find((one) => one.offsetParent);
  if (window.innerWidth <= 640 && column?.querySelector(".answer-title, .problem")) column.scrollIntoView();
}, 50)"""
"""On a phone the answer is below the fields, out of sight."""
_POLL_SECONDS = 0.5
_QUESTION = {"scale": 2, "min_width": 300}
_ANSWER = {"scale": 5, "min_width": 320, "elem_classes": "answer-column"}
"""The two columns of a tab, one below the other on a narrow screen."""


def build_page(models: Sequence[DemoModel], index: Index | None) -> Any:
    """The page as gradio's Blocks. `index` None = no folder to search."""
    with gr.Blocks(title=f"{models[0].title} - gkl_vl", analytics_enabled=False) as page:
        gr.HTML(markup.header(models))
        with gr.Tabs():
            with gr.Tab("Classify"):
                _classify_tab(models)
            with gr.Tab("Search"):
                if index is None:
                    gr.HTML(markup.message("Start the page with --images FOLDER to search a folder of your images."))
                else:
                    _search_tab(index, page)
    return page


def quiet_theme() -> Any:
    """Gradio's default theme with one colour, and with fonts of the system, so that none is fetched."""
    colors = gr.themes.colors
    theme = gr.themes.Default(
        primary_hue=colors.sky,
        secondary_hue=colors.slate,
        neutral_hue=colors.gray,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    blue, dark = "#0072b2", "#005d91"  # the student's in page.css
    return theme.set(
        color_accent=blue,
        button_primary_background_fill=blue,
        button_primary_background_fill_dark=blue,
        button_primary_background_fill_hover=dark,
        button_primary_background_fill_hover_dark=dark,
    )


# ---- classify ----------------------------------------------------------------------------------------------------


def _classify_tab(models: Sequence[DemoModel]) -> None:
    with gr.Row():
        with gr.Column(**_QUESTION):
            image = _image_field("Image", height=220)
            labels = gr.Textbox(
                "", label="Labels, by line or comma", lines=4, max_lines=8, placeholder="cat, dog, bird"
            )
            template = gr.Textbox(TEMPLATE, label="Prompt ({c} is the label)", max_length=500)
            button = gr.Button("Classify", variant="primary")
        with gr.Column(**_ANSWER):
            note = gr.HTML(markup.message("Drop an image and type at least two labels."))
            bars = gr.HTML()

    def on_classify(file: dict | None, labels: str, template: str) -> tuple[Any, ...]:
        return _answer_image(file, lambda image: _classified(models, image, labels, template), answers=1)

    def on_upload(file: dict | None, labels: str, template: str) -> tuple[Any, ...]:
        # An image that comes before its labels is no mistake.
        return on_classify(file, labels, template) if labels.strip() else (gr.skip(),) * 3

    fields, outputs = [image, labels, template], [note, bars, image]
    _on(button.click, on_classify, fields, outputs)
    _on(template.submit, on_classify, fields, outputs)
    _on(image.upload, on_upload, fields, outputs)


def _classified(models: Sequence[DemoModel], image: Image.Image, labels: str, template: str) -> tuple[str, str]:
    parsed = parse_labels(labels)
    predictions = [classify(model, image=image, labels=parsed.names, template=template) for model in models]
    text = f"{len(parsed.names)} labels in the prompt “{template}”."
    if parsed.repeated:
        text += f" Typed more than once, counted once: {', '.join(parsed.repeated)}."
    return markup.message(text), markup.bars(models, predictions)


# ---- search ------------------------------------------------------------------------------------------------------


def _search_tab(index: Index, page: Any) -> None:
    with gr.Row():
        with gr.Column(**_QUESTION):
            words = gr.Textbox("", label="Words", placeholder="a red car in the snow", max_length=1000)
            button = gr.Button("Search", variant="primary")
            image = _image_field("Or an image", height=170)
        with gr.Column(**_ANSWER):
            state, note = gr.HTML(markup.progress(index)), gr.HTML(markup.message("Type words, or drop an image."))
            lists = _ranking_columns(len(index.models))

    def on_words(words: str) -> tuple[Any, ...]:
        quoted = f"“{words.strip()}”"
        return _answer(lambda: _ranked(index, search_words(index, words), quoted), answers=len(lists))

    def on_image(file: dict | None) -> tuple[Any, ...]:
        return _answer_image(
            file, lambda image: _ranked(index, search_image(index, image), "the image"), answers=len(lists)
        )

    _on(button.click, on_words, [words], [note, *lists])
    _on(words.submit, on_words, [words], [note, *lists])
    _on(image.upload, on_image, [image], [note, *lists, image])
    timer = gr.Timer(_POLL_SECONDS)

    def on_tick() -> tuple[str, Any]:
        return markup.progress(index), gr.Timer(active=not index.has_ended)

    for event in (timer.tick, page.load):
        event(on_tick, None, [state, timer], show_progress="hidden", api_visibility="private")


def _ranking_columns(count: int) -> list[Any]:
    """For each model a line and a grid of images."""
    fields: list[Any] = []
    with gr.Row():
        for _ in range(count):
            with gr.Column(min_width=280, elem_classes="answer-column"):
                fields += [gr.HTML(), gr.HTML("", html_template='<div class="grid"></div>', js_on_load=GRID_JS)]
    return fields


def _ranked(index: Index, rankings: Sequence[Ranking], query: str) -> tuple[str, ...]:
    shared = shared_first(rankings, markup.FIRST) if len(rankings) > 1 else []
    answers: list[str] = []
    for model, ranking in zip(index.models, rankings, strict=True):
        answers += [markup.ranking_title(model, ranking, count=len(rankings)), markup.grid(ranking, shared)]
    return (markup.found(index, rankings, query), *answers)


# ---- both --------------------------------------------------------------------------------------------------------


def _image_field(label: str, *, height: int) -> Any:
    return gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=height, buttons=[])


def _on(event: Callable[..., Any], handler: Callable[..., Any], fields: list[Any], outputs: list[Any]) -> None:
    # preprocess=False: gradio would decode the image itself, by other rules. A private handler is not in its API.
    shown = {"show_progress": "minimal", "show_progress_on": outputs[0], "api_visibility": "private"}
    event(handler, fields, outputs, preprocess=False, **shown).then(None, js=_SHOW_ANSWER)


def _answer(compute: Callable[[], tuple[str, ...]], *, answers: int) -> tuple[str, ...]:
    """What `compute` returns, a message and `answers` values; for a user's error its message and empty values."""
    try:
        return compute()
    except UserError as error:
        return (markup.message(str(error), kind="problem"), *[""] * answers)


def _answer_image(
    file: dict | None, compute: Callable[[Image.Image], tuple[str, ...]], *, answers: int
) -> tuple[Any, ...]:
    """`_answer` for an uploaded image, and what becomes of its field: a broken image is taken out."""
    try:
        image = _decoded(file)
    except UserError as error:
        return (markup.message(str(error), kind="problem"), *[""] * answers, None)
    return (*_answer(lambda: compute(image), answers=answers), gr.skip())


def _decoded(file: dict | None) -> Image.Image:
    if file is None:
        raise UserError("Drop an image first.")
    path = Path(file["path"])
    return decode_named(path.read_bytes(), file.get("orig_name") or path.name)
