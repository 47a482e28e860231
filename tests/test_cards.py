"""Model cards: the Hub reads their metadata, they state only what they were given, and no name, path or command in them
can end the front matter, the table or a code block, or add a link or HTML."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard as HubCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image
from test_hub import CARD, make_clip
from test_label_export import CARD as CLASSIFIER_CARD
from test_label_export import trained

from gkl_vl.export.cards import (
    ClassifierCard,
    ClipCard,
    FormatFacts,
    RunFacts,
    WidgetExample,
    classifier_usage,
    for_hub,
    with_formats,
)
from gkl_vl.export.hub import export_classifier, export_clip
from gkl_vl.export.markdown import front_matter
from gkl_vl.provenance import without_secrets
from gkl_vl.training.run import images_and_seconds

FRONT = r"---\n(.*?)\n---(\n.*)"
EXAMPLE = WidgetExample(
    image=Image.new("RGB", (8, 8), "red"), name="red", labels=["red", "blue, or sea"], credit="Drawn by A. B."
)
MEASURED = [
    {"model": "teacher", "dataset": "emoji", "acc1": 0.5, "n": 1414, "intervals": {"acc1": [0.4, 0.6]}},
    {
        **{"model": "student", "dataset": "emoji", "acc1": 0.4, "acc5": 0.75, "n": 1414},
        "intervals": {"acc1": [0.35, 0.45678912], "acc5": [float("nan"), float("nan")]},
    },
]


def changed(card=CARD, **facts):
    return dataclasses.replace(card, run=dataclasses.replace(card.run, **facts))


def metadata(card: str) -> dict:
    """As the Hub reads it."""
    return yaml.safe_load(re.fullmatch(FRONT, card, flags=re.DOTALL)[1])


# ---- what they say


def test_the_metadata_is_what_the_hub_reads():
    data = HubCard(CARD.render()).data.to_dict()
    assert data["library_name"] == "open_clip"
    assert data["pipeline_tag"] == "zero-shot-image-classification"
    assert data["license"] == "mit"
    assert data["tags"] == ["clip", "knowledge-distillation", "gkl"]
    assert data["datasets"] == ["org/pairs"]  # a plain name is not a Hub id
    assert data["base_model"] == "org/big" and data["base_model_relation"] == "finetune"
    results = data["model-index"][0]["results"]
    metrics = {metric["type"]: metric["value"] for result in results for metric in result["metrics"]}
    assert metrics == {"acc1": 0.4, "image_retrieval_recall@5": 0.125}  # the student's metrics, without nan
    assert "widget" not in data


def test_intervals_are_in_the_table_and_in_the_metadata():
    card = changed(metrics=MEASURED).render()
    assert "| `emoji` | `acc1` | 50.0 % (40.0–60.0) | 40.0 % (35.0–45.7) | 80 % |" in card
    assert "| `emoji` | `acc5` |  | 75.0 % |  |" in card and "nan" not in card
    assert "95 % bootstrap intervals over the images of each set (`emoji` 1,414)" in card
    ((result,),) = [index["results"] for index in metadata(card)["model-index"]]
    first, second = result["metrics"]
    assert first["args"] == {"images": 1414, "confidence_interval_95": [0.35, 0.456789]}
    assert second["args"] == {"images": 1414}
    assert "bootstrap" not in CARD.render()


def test_a_card_has_results_usage_and_command():
    card = CARD.render(transformers=True, image_size=64, context_length=24)
    assert "| `emoji` | `acc1` | 50.0 % | 40.0 % | 80 % |" in card
    assert "| `emoji` | `image_retrieval_recall@5` |  | 12.5 % |  |" in card
    assert "```bash\naccelerate launch recipes/clip_kd.py --steps 7\n```" in card
    assert "- Seed: 3" in card and "- Commit of gkl-vl: 0123abc" in card
    assert "- Images are resized to 64 x 64 pixels, texts are cut after 24 tokens." in card
    for way in ("open_clip.create_model_and_transforms", "CLIPModel.from_pretrained", "eval/zero_shot.py --model"):
        assert way in card
    assert "CLIPModel" not in CARD.render() and "local-dir:path/to/this/folder" in CARD.render()


def test_a_card_states_the_facts_of_its_run():
    versions = {"Python": "3.12.1", "torch": "2.9.0+cu128"}
    facts = {"images": 1_234_567, "hours": 12.34, "hardware": "8 x NVIDIA H100 80GB HBM3", "versions": versions}
    for card, images in ((CARD, "Images seen"), (CLASSIFIER_CARD, "Labelled images seen")):
        text = changed(card, **facts).render()
        assert f"- {images}: 1,234,567\n" in text and "- Hours: 12.3, without evaluation\n" in text
        assert "- Hardware: 8 x NVIDIA H100 80GB HBM3\n" in text
        assert "- Versions: `Python 3.12.1`, `torch 2.9.0+cu128`\n" in text
        assert not any(name in card.render() for name in (images, "Hours", "Hardware", "Versions"))


def test_images_and_time_are_those_of_all_sessions():
    logged = [{"step": 10, "train/images_seen": 100, "train/images_per_second": 50.0}, {"step": 10, "model": "student"}]
    logged += [{"step": 20, "train/images_seen": 200, "train/images_per_second": 10.0}]
    assert images_and_seconds(logged) == (200, 100 / 50 + 100 / 10)
    assert images_and_seconds([{"step": 1, "model": "student"}]) == (None, None)


def test_a_card_without_teacher_or_results_mentions_neither():
    text = dataclasses.replace(changed(metrics=[], commit=None), teachers=()).render()
    data = HubCard(text).data.to_dict()
    assert not data.keys() & {"base_model", "base_model_relation", "model-index", "model_name"}
    assert data["tags"] == ["clip", "gkl"]
    assert "trained without a teacher" in text and "No evaluation was run." in text
    assert "distilled" not in text and "Commit" not in text


@pytest.mark.parametrize(
    "teacher", ["local-dir:runs/teacher", "ViT-B-32", "transformers:{folder}", "transformers:./a/b"]
)
def test_only_a_hub_teacher_is_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str):
    (tmp_path / "models" / "clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = dataclasses.replace(CARD, teachers=(teacher.format(folder="models/clip"),))
    assert "base_model" not in metadata(card.render())
    named = dataclasses.replace(CARD, teachers=("transformers:openai/clip-vit-base-patch32", "hf-hub:org/big"))
    assert metadata(named.render())["base_model"] == ["openai/clip-vit-base-patch32", "org/big"]


def test_a_licence_that_nobody_chose_is_none():
    assert "released under `mit`. The training data and the teacher have terms" in CARD.render()
    text = dataclasses.replace(CARD, license="other").render()
    assert "No licence has been chosen for these weights" in text and "released" not in text


def test_a_classifiers_results_are_in_its_metadata():
    data = metadata(changed(CLASSIFIER_CARD, metrics=MEASURED).render())
    (result,) = data["model-index"][0]["results"]
    assert result["task"] == {"type": "image-classification"} and result["metrics"][0]["value"] == 0.4


def test_pictures_lie_beside_the_card(tmp_path: Path):
    picture = tmp_path / "report.png"
    Image.new("RGB", (4, 4)).save(picture)
    export_clip(
        clip=make_clip(tmp_path, "small_bpe"),
        folder=tmp_path / "clip",
        card=dataclasses.replace(changed(picture=picture), example=EXAMPLE),
    )
    export_classifier(
        classifier=trained("resnet8"), folder=tmp_path / "classifier", card=changed(CLASSIFIER_CARD, picture=picture)
    )
    for folder in (tmp_path / "clip", tmp_path / "classifier"):
        text = (folder / "README.md").read_text()
        assert "](report.png)" in text and (folder / "report.png").read_bytes() == picture.read_bytes()
    (widget,) = metadata((tmp_path / "clip" / "README.md").read_text())["widget"]
    assert Image.open(tmp_path / "clip" / widget["src"]).getpixel((0, 0)) == (255, 0, 0)
    assert widget["candidate_labels"] == "red, blue or sea" and widget["example_title"] == "red"  # split at commas
    assert "Drawn by" in (tmp_path / "clip" / "README.md").read_text()
    assert "report.png" not in CARD.render()


@pytest.mark.parametrize("card", [CARD.render(transformers=True), CARD.render(model_class="SiglipModel")])
def test_a_card_for_the_hub_names_the_repository(card):
    main = for_hub(card, "me/tiny", None)
    assert "path/to" not in main and 'from_pretrained("me/tiny")' in main and "hf download" not in main
    assert ('"hf-hub:me/tiny"' in main) == ("open_clip" in card) and for_hub(main, "other/x", None) == main
    branch = for_hub(card, "me/tiny", "trial")
    assert "```bash\nhf download me/tiny --revision trial --local-dir tiny\n```" in branch
    assert "path/to" not in branch and "hf-hub:me" not in branch and 'from_pretrained("tiny")' in branch
    assert metadata(main) == metadata(branch) == metadata(card)


# ---- formats


FORMATS = [
    FormatFacts(
        name="ONNX int8",
        files={"onnx/image.onnx": 2_000_000, "onnx/text.onnx": 1_500_000},
        note="Compared on 64 images; `load_onnx` loads it.",
        before=[{"dataset": "emoji", "acc1": 0.4, "n": 64}],
        after=[{"dataset": "emoji", "acc1": 0.395, "acc5": 0.5}],
    )
]


def test_formats_have_sizes_and_accuracies():
    card = dataclasses.replace(CARD, formats=FORMATS).render()
    assert "| ONNX int8 | `onnx/image.onnx`, `onnx/text.onnx` | 3.5 |" in card
    assert "- ONNX int8: Compared on 64 images; `load_onnx` loads it.\n" in card
    assert "| ONNX int8 | `emoji` | `acc1` | 40.0 % | 39.5 % | -0.5 |" in card
    assert card.count("acc5") == CARD.render().count("acc5")  # only what both were measured by
    assert "## Formats" not in CARD.render()


def test_formats_are_added_to_a_card_and_replaced():
    once = with_formats(CARD.render(), FORMATS)
    assert once == dataclasses.replace(CARD, formats=FORMATS).render()
    other = [dataclasses.replace(FORMATS[0], name="ONNX")]
    assert with_formats(once, other) == dataclasses.replace(CARD, formats=other).render()


def test_headings_in_a_command_are_no_sections():
    card = changed(command="cat <<X\n## Formats\n```\n## Training\nX")
    assert with_formats(card.render(), FORMATS) == dataclasses.replace(card, formats=FORMATS).render()


# ---- hostile texts

PARTS = (
    *("\n", "\n\n", "\r", "\n---\n", "---", "```", "`", "``", "~~~", "\n~~~\n", "|", "\\|", "\\"),
    *("\n| a |\n|---|\n", "\n===\n", "# x", "\n# x", "\n## Usage\n", "\n## Formats\n", "\n- x", "* x", "_x_", "**x**"),
    *("<b>", "<!--", "</code>", "<https://e.org>", "](http://e.org)", "![x](y)", "[a]: http://e.org", "http://e.org"),
    *("www.e.org", "me@e.org", "@me", "&lt;", ": ", "#", "'", '"', "{", "}", "%", "!", "$x$", "1e3", "yes", "null"),
    *("~", " ", "a", "B-c", "path/to/this/folder", "\t", "\0", "\x0b", "\x0c", "\x1b[31m", "\x7f", "\x85"),
    *("\u200b", "\u2028", "\u202e", "\u2066", "\ufeff", "é", "日本", "😀"),
)  # fmt: skip
pieces = st.lists(st.sampled_from(PARTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=6)
hostile = st.tuples(pieces, pieces).map(lambda around: "x".join(map("".join, around)))
many_hostile = st.lists(hostile, min_size=16, max_size=16)


def clip_card(t: list[str]) -> ClipCard:
    rows = [{"model": model, "dataset": t[0], f"acc{t[1]}": 0.25, "n": 64} for model in ("teacher", "student")]
    file = FormatFacts(name=t[2], files={t[3]: 1}, note=t[4], before=rows, after=rows)
    return ClipCard(
        student=t[5],
        teachers=[t[6]],
        license=t[7],
        datasets=[t[8]],
        run=run_of(t, [*rows, {"model": "student", "dataset": t[9], "acc1": 0.5}]),
        attack=t[10],
        start=t[11],
        formats=[file],
        example=dataclasses.replace(EXAMPLE, name=t[12], labels=[t[12], t[1]], credit=t[4]),
    )


def classifier_card(t: list[str]) -> ClassifierCard:
    rows = [{"model": model, "dataset": t[0], f"acc{t[1]}": 0.25, "n": 64} for model in ("teacher", "student")]
    return ClassifierCard(student=t[5], made=t[10], teacher=t[6], data=t[8], run=run_of(t, rows))


def run_of(t: list[str], rows: list[dict]) -> RunFacts:
    facts = {"command": t[13], "commit": t[14], "hardware": t[15], "versions": {t[2]: t[3]}}
    return RunFacts(steps=1, seed=0, metrics=rows, picture=Path("report.png"), **facts)


CARDS = pytest.mark.parametrize("make", [clip_card, classifier_card])


def body_of(card: str) -> list[Token]:
    """The blocks of a card behind its front matter."""
    return MarkdownIt("commonmark").enable("table").parse(re.fullmatch(FRONT, card, flags=re.DOTALL)[2])


def structure(card: str) -> list[tuple[str, str]]:
    """(type, tag or language) of all blocks, and of all that is not text or code within them."""
    found = []
    for token in body_of(card):
        found += [] if token.type == "inline" else [(token.type, token.info or token.tag)]
        inside = [child for child in token.children or () if child.type not in ("text", "code_inline")]
        found += [(child.type, str(child.attrs)) for child in inside]
    return found


def visible(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\u200c\u200d" else "\ufffd" for c in text)


@CARDS
@settings(max_examples=60, deadline=None)
@given(many_hostile)
@example(["a\n```\n\n# x\n<b>"] * 16)
@example([f"{number}\n---\n| ``` `` ` \\| [x](http://e.org)" for number in range(16)])
def test_hostile_texts_change_no_structure(make, texts):
    card = make(texts)
    text = card.render()
    words = {text: f"w{number}" for number, text in enumerate(dict.fromkeys(texts))}
    assert structure(text) == structure(make([words[text] for text in texts]).render())
    assert visible(text) == text
    tokens = body_of(text)
    plain = [child.content for token in tokens for child in token.children or () if child.type == "text"]
    assert not [content for content in plain if re.search(r"://|www\.|@|[<>`|\\]", content)]  # nothing to link
    commands = [token.content for token in tokens if token.type == "fence" and token.info == "bash"]
    assert commands[-1] == f"{visible(without_secrets(card.run.command))}\n"
    for table in re.findall(r"(?:^\|.*\n)+", text.replace(commands[-1], ""), flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


@CARDS
@settings(max_examples=60, deadline=None)
@given(many_hostile)
def test_yaml_reads_hostile_texts_as_they_were(make, texts):
    card = make(texts)
    text = card.render()
    data = metadata(text)
    assert HubCard(text).data.to_dict() == data  # the client sees the same end of the front matter
    (index,) = data["model-index"]
    assert index["name"] == card.student
    results = {
        (result["dataset"]["name"], metric["type"]) for result in index["results"] for metric in result["metrics"]
    }
    own = [row for row in card.run.metrics if row["model"] == "student"]
    assert results == {(row["dataset"], key) for row in own for key in row if key.startswith("acc")}
    if isinstance(card, ClipCard):
        (widget,) = data["widget"]
        assert data["license"] == card.license and widget["example_title"] == card.example.name
        assert widget["candidate_labels"].count(",") < 2


@settings(max_examples=60, deadline=None)
@given(hostile)
@example("1e3")  # a number in YAML 1.2, which the Hub reads
def test_a_text_has_one_line_of_yaml_and_stays_a_text(text):
    block = front_matter({"name": text})
    assert len(block.splitlines()) == 3 and re.match(r'---\nname: ["A-Za-z]', block)
    assert block.isascii() and yaml.safe_load(block.strip("-")) == {"name": text}


@settings(max_examples=50, deadline=None)
@given(hostile)
def test_a_path_in_the_usage_code_is_a_literal(path):
    names: dict = {}
    exec(classifier_usage("timm:x", path).replace("import timm", "timm = Timm()"), {"Timm": Recorder}, names)
    assert names["model"] == f"local-dir:{visible(path).replace(chr(10), chr(0xFFFD))}"


class Recorder:
    def create_model(self, name: str, *, pretrained: bool) -> str:
        return name
