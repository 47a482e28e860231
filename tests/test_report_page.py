"""report.html: one file without network and script, in which no text of a user is markup; it shows what the records
have, and where student and teacher differ. An error in it does not end a run."""

import base64
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from small_models import ColourBlind, colour_blind_clip
from small_sets import COLOURS, colour_of, colour_set, picture, write_set

from gkl_vl.evaluation.embed import Embedder
from gkl_vl.evaluation.flips import first_classification, top1_flips
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.export.cards import ClassifierCard, ClipCard, RunFacts
from gkl_vl.models.towers import OpenClipTowers
from gkl_vl.report.charts import Chart, Line, figure
from gkl_vl.report.curves import logged_charts, loss_charts, metric_charts, pseudo_label_charts
from gkl_vl.report.figures import SheetItem
from gkl_vl.report.page import FlippedImage, Flips, Page, page_text, write_page
from gkl_vl.training.run_page import average_charts, classifier_summary, clip_summary, command_shown, write_report

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "' onmouseover='alert(1)",
    "</title></style></code><!-- & &lt;b&gt; `<i>` -->",
    "right\u202eleft\u2066 \u200f",
    "nul\x00 escape\x1b surrogate\udcff \ufffe",
    "עברית عربي 日本語 😀",
]
RED = PIL.Image.new("RGB", (64, 64), (255, 0, 0))
TRAINING = [
    {"step": s, "train/loss": 5 / (s + 1), "train/contrastive": 3 / (s + 1), "train/kl": 0.0, "train/lr": 0.1}
    for s in range(0, 100, 10)
]


def evaluated(step: int, model: str, acc1: float, dataset: str = "emoji") -> dict:
    bounds = {"acc1": [acc1 - 0.02, acc1 + 0.02]}
    return {"step": step, "model": model, "dataset": dataset, "n": 1000, "acc1": acc1, "intervals": bounds}


RECORDS = [*TRAINING, evaluated(50, "student", 0.2), evaluated(100, "student", 0.3), evaluated(100, "teacher", 0.4)]


def row(model: str, acc1: float, dataset: str = "emoji", name: str = "tiny") -> dict:
    return {
        "model": model,
        "name": name,
        "image_parameters": 2_000 if model == "student" else 6_000,
        "parameters": 5_000,
        "ms_per_image": 1.5 if model == "student" else 6.0,
        "results": {dataset: {"acc1": acc1, "acc5": math.nan}},
        "intervals": {dataset: {"acc1": (acc1 - 0.02, acc1 + 0.02), "acc5": (math.nan, math.nan)}},
    }


def flips(image: PIL.Image.Image = RED, *names: str, dataset: str = "emoji") -> Flips:
    truth, other, teacher = names or ("ghost", "alien", "bundled")
    lost = FlippedImage(image=image, name=truth, student=(other, 0.6), teacher=(truth, 0.7))
    won = FlippedImage(image=image, name=truth, student=(truth, 0.8), teacher=(other, 0.9))
    return Flips(
        dataset=dataset,
        teacher=teacher,
        both=500,
        lost=200,
        won=100,
        neither=1200,
        difference=(-0.05, -0.08, 0.021),
        lost_images=[lost] * 12,
        won_images=[won] * 12,
    )


PAGE = Page(
    title="tiny distilled from big · 100 steps of 8 · seed 0",
    summary="A CLIP model, `tiny`, distilled from `big`.",
    records=RECORDS,
    rows=[row("teacher", 0.4), row("student", 0.3)],
    sheet=[SheetItem(RED, "ghost", [("ghost", 0.8), ("alien", 0.1), ("robot", 0.05)])] * 12,
    flips=flips(),
    usage="import open_clip",
    command="accelerate launch recipes/clip_kd.py",
    facts={"Seed": "0", "Commit of gkl-vl": "abc1234"},
)


class Reader(HTMLParser):
    """The elements and texts of a page. Fails on an element that is not closed in its place."""

    EMPTY = {"meta", "img"}

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style",):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def hostile_page(text: str) -> str:
    records = [*TRAINING, evaluated(50, "student", 0.2, text), evaluated(100, f"teacher {text}", 0.4, text)]
    records += [{"step": 9, f"train/{text}": 1.0}]
    return page_text(
        Page(
            title=f"{text} · {text}",
            summary=f"A model, `{text}`.",
            records=records,
            rows=[row("teacher", 0.4, text, text), row("student", 0.3, text, text)],
            paired={text: {"acc1": 0.5}},
            published=f"`{text}`",
            averages=[Chart(title=text, x_label=text, lines=[Line(points=[(0, 1), (1, 2)], label=text)] * 2)],
            sheet=[SheetItem(RED, text, [(text, 0.8), ("b", 0.1)])],
            flips=flips(RED, text, text + "2", text, dataset=text),
            usage=text,
            command=text,
            facts={"Data": text},
        )
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_users_are_no_markup(text):
    plain, hostile = Reader(hostile_page("word")), Reader(hostile_page(text))
    assert {*hostile.tags} == {*plain.tags} and "script" not in hostile.tags
    assert [tag for tag in hostile.tags if tag != "code"] == [tag for tag in plain.tags if tag != "code"]
    names = [name for name, _ in hostile.attributes]
    assert sorted(names) == sorted(name for name, _ in plain.attributes)
    assert not any(name.startswith("on") or name in ("href", "srcset") for name in names)
    assert all(value.startswith("data:image/png;base64,") for name, value in hostile.attributes if name == "src")
    shown = re.sub("[\u202e\u2066\u200f\x00\x1b\udcff\ufffe]", "\ufffd", text)
    assert hostile.texts.count(shown) > 10  # where it stands alone


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_reorders_or_ends_what_is_around_it(text):
    page = hostile_page(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\u200f\ud800-\udfff\ufffe]", page)
    page.encode()
    # Outside of attributes and the title, a name stands in an element that isolates its direction of writing.
    bare = re.sub(r"<(bdi|code|title|text)[ >].*?</\1>|aria-label=\"[^\"]*\"", "", page, flags=re.DOTALL)
    assert "עברית" not in bare


def test_the_page_is_one_file_that_needs_nothing_else(tmp_path: Path):
    write_page(tmp_path / "report.html", PAGE)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe|<object|javascript:", page)
    policies = [value for name, value in Reader(page).attributes if name == "content"]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in policies
    assert "prefers-color-scheme: dark" in page and "@media print" in page and "max-width: 640px" in page


def test_large_images_are_embedded_small(tmp_path: Path):
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8))
    page = page_text(replace(PAGE, flips=flips(noise), sheet=[SheetItem(noise, "a", [("b", 0.5)])] * 12))
    assert page.count("data:image/jpeg") == 36 and len(page) < 1_500_000
    (source, *_) = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    image = PIL.Image.open(io.BytesIO(base64.b64decode(source)))
    assert image.size == (144, 96)


def test_the_page_has_the_numbers_of_the_run():
    text = Reader(page_text(PAGE)).text
    for part in (
        "tiny distilled from big",
        "100 steps of 8 · seed 0",
        "top-1 accuracy 40.0 % 38.0 to 42.0 30.0 % 28.0 to 32.0 75 %",
        "image tower, parameters 6,000 2,000 3.0× smaller",
        "500 both right 25.0 % 100 won: the student alone 5.0 % 200 lost: the teacher alone 10.0 %",
        "on 2,000 images",
        "−5.0 points (−8.0 to +2.1: 95 %",
        "12 of 200, evenly spaced through the set",
        "student alien 60 % teacher ghost 70 %",
        "accelerate launch recipes/clip_kd.py Seed 0 Commit of gkl-vl abc1234",
    ):
        assert part in text, part
    assert "acc5" not in text and "nan" not in text


def test_what_a_run_does_not_have_is_left_out():
    lonely = replace(PAGE, records=[], rows=[row("student", 0.3)], sheet=[], flips=None, facts={})
    text = Reader(page_text(lonely)).text
    assert "30.0 %" in text and "teacher" not in text and "kept" not in text
    for title in ("Evaluation while training", "Loss", "Held-out", "Student against", "Pseudo-labels", "Averages"):
        assert title not in text and ("Averages" == title or "Pseudo-labels" == title or title in page_text(PAGE))
    empty = replace(
        lonely, rows=[{"model": "student", "name": "tiny", "parameters": 3, "results": {}, "intervals": {}}]
    )
    assert "all parameters 3" in Reader(page_text(empty)).text


# ---- charts


def numbers_in(svg: str) -> list[float]:
    drawn = re.findall(r'(?:d|cx|cy|x|y)="([^"]*)"', svg)
    return [float(number) for path in drawn for number in re.findall(r"-?[\d.]+", path)]


@pytest.mark.parametrize(
    "points",
    [
        [(3, 1.0)],
        [(0, 0.0)],
        [(0, 5.0), (10, 5.0)],
        [(1, 1e-6), (2, 1e6)],
        [(1, -3.0), (2, 1e-9)],
        [(10, math.nan), (20, 0.5), (30, math.inf)],
        [(step, 1 / step) for step in range(1, 3_000_000, 1000)],
    ],
    ids=["one", "zero", "constant", "orders of magnitude", "negative", "not finite", "many"],
)
@pytest.mark.parametrize("percent", [False, True])
def test_a_chart_of_any_values_stays_in_its_frame(points, percent):
    svg = figure(
        Chart(title="a", lines=[Line(points=points, band=[(y - 1, y + 1) for _, y in points])], percent=percent)
    )
    assert "nan" not in svg and "inf" not in svg and len(svg) < 30_000
    assert all(-1 <= number <= 401 for number in numbers_in(svg))
    assert re.search(r'class="line c0" d="M[\d.]+ [\d.]+', svg)


def test_a_chart_of_nothing_is_no_figure():
    assert figure(Chart(title="a", lines=[])) == figure(Chart(title="a", lines=[Line(points=[(1, math.nan)])])) == ""


@pytest.mark.parametrize("offset", [0, 10_000], ids=["logarithmic", "linear"])
def test_higher_values_are_drawn_higher_and_a_thinned_line_ends_at_its_last_point(offset):
    svg = figure(Chart(title="a", lines=[Line(points=[(step, float(step + offset)) for step in range(1, 2001)])]))
    path = re.findall(r'class="line c0" d="M([^"]*)"', svg)[0]
    places = [tuple(map(float, place.split())) for place in path.split("L")]
    assert len(places) < 310 and places == sorted(places, key=lambda place: (place[0], -place[1]))
    assert places[0][1] > 150 and places[-1][1] < 20 and f"{2000 + offset:.4g} at step 2,000" in svg
    assert ("log scale" in svg) == (offset == 0)


def test_each_loss_term_that_is_on_has_a_chart():
    several = [{"step": s, "train/soft_ce": 2.0, "train/soft_ce.0": 1.0, "train/soft_ce.1": 3.0} for s in (1, 2)]
    charts = {chart.title: chart for chart in loss_charts([*TRAINING, *several])}
    assert list(charts) == ["total", "contrastive", "soft CE"]  # kl is 0
    assert [line.label for line in charts["soft CE"].lines] == ["mean", "teacher 1", "teacher 2"]
    assert charts["total"].lines[0].points == [(s, 5 / (s + 1)) for s in range(0, 100, 10)]
    assert [chart.title for chart in logged_charts(TRAINING)] == ["learning rate"]


def test_the_metric_of_a_set_is_drawn_with_its_intervals_and_the_teacher():
    captions = {"step": 100, "model": "student", "dataset": "coco", "image_retrieval_recall@1": 0.25}
    emoji, coco = metric_charts([*RECORDS, captions])
    assert emoji.lines[0].points == [(50, 20.0), (100, 30.0)] and emoji.levels == [("teacher", 40.0)]
    assert emoji.lines[0].band[1] == pytest.approx((28, 32))
    assert coco.title == "coco, image retrieval R@1" and coco.lines[0].points == [(100, 25.0)]
    assert coco.lines[0].band is None
    many = [evaluated(1, "student", 0.1, f"set{number}") for number in range(15)]
    page = Reader(page_text(replace(PAGE, records=many))).text
    assert "set11" in page and "set12" not in page and "3 further data sets" in page


def test_pseudo_labels_and_averages_have_charts():
    logged = [{"step": s, "train/mask_rate": 0.5, "train/pseudo_label_acc1": 0.75} for s in (1, 2)]
    assert [chart.lines[0].points[0][1] for chart in pseudo_label_charts(logged)] == [50, 75]
    shares = [evaluated(9, f"mixed {share:g}", 0.1 + share / 2) for share in (1, 0, 0.25)]
    (chart,) = average_charts([*RECORDS, *shares], 0.25)
    assert chart.lines[0].points == [(0, 10), (0.25, 22.5), (1, pytest.approx(60))] and chart.marked == 0.25
    assert "<span>22.5 %</span>" in figure(chart)  # the exported one
    assert "Averages of start" in Reader(page_text(replace(PAGE, averages=[chart]))).text


# ---- where student and teacher differ


EMBEDDED: list[int] = []


class SeesAll(ColourBlind):
    """The same, with green and blue apart."""

    def encode_image(self, pixels, normalize):
        channels = pixels.mean(dim=(2, 3)).clamp(min=0.01)
        EMBEDDED.append(len(channels))  # not in the module, whose attributes are part of the cache's key
        return torch.nn.functional.normalize(self.gain * channels, dim=-1)


@pytest.fixture
def models() -> tuple[Embedder, Embedder]:
    """A student that takes blue for green, and a teacher that does not."""
    student = colour_blind_clip()
    teacher = replace(student, name="sees all", towers=OpenClipTowers(SeesAll()))
    return Embedder(clip=student, alone=True), Embedder(clip=teacher, alone=True)


def test_lost_images_are_those_that_the_teacher_alone_gets_right(tmp_path, models):
    colours = ["red", "blue", "green", "blue", "blue", "red"]
    dataset = load_benchmark_set(str(colour_set(tmp_path / "colours", colours)))
    found = top1_flips(*models, dataset, teacher_name="big", shown=2)
    assert (found.both, found.lost, found.won, found.neither) == (3, 3, 0, 0) and found.won_images == []
    assert found.difference[0] == pytest.approx(-0.5) and found.difference[1] < -0.5 < found.difference[2]
    assert [(colour_of(item.image), item.name, item.student[0]) for item in found.lost_images] == [
        ("blue", "blue", "green")
    ] * 2
    assert all(item.teacher[0] == "blue" and 0 < item.teacher[1] < 1 for item in found.lost_images)
    won = top1_flips(*models[::-1], dataset, teacher_name="small")
    assert (won.lost, won.won) == (0, 3) and len(won.won_images) == 3


def test_images_are_those_of_their_rows_where_others_cannot_be_decoded(tmp_path, models):
    names, kinds = list(COLOURS), ["red", None, "green", "blue", None, "red", "blue"]
    samples = [
        (f"{place}", {"png": b"no image" if kind is None else picture(kind), "cls": b"%d" % names.index(kind or "red")})
        for place, kind in enumerate(kinds)
    ]
    files = {"classnames": names, "zeroshot_classification_templates": ["{c}"]}
    dataset = load_benchmark_set(str(write_set(tmp_path / "some", [samples], **files)))
    student, teacher = (replace(model, max_broken=0.5) for model in models)
    found = top1_flips(student, teacher, dataset, teacher_name="big")
    assert (found.both, found.lost) == (3, 2)
    assert [colour_of(item.image) for item in found.lost_images] == ["blue", "blue"]


def test_a_teacher_in_the_cache_embeds_nothing_again(tmp_path, models):
    student, teacher = models[0], replace(models[1], cache=tmp_path / "cache")
    EMBEDDED.clear()
    dataset = load_benchmark_set(str(colour_set(tmp_path / "colours", ["red", "blue"])))
    first = top1_flips(student, teacher, dataset, teacher_name="big")
    assert EMBEDDED == [2]
    assert top1_flips(student, teacher, dataset, teacher_name="big").lost == first.lost == 1
    assert EMBEDDED == [2]


def test_the_set_is_the_first_with_class_names(tmp_path):
    colours = load_benchmark_set(str(colour_set(tmp_path / "colours", ["red", "blue"])))
    others = [replace(colours, kind="retrieval"), replace(colours, classnames=None), replace(colours, templates=None)]
    assert first_classification([*others, colours]) is colours and first_classification(others) is None


# ---- a run


def test_an_error_in_the_page_ends_in_a_line(tmp_path, capsys):
    def broken() -> Page:
        raise RuntimeError("no such\nthing")

    write_report(tmp_path, broken)
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert "report.html was not written (RuntimeError: no such); the run is complete without it" in error
    write_report(tmp_path, lambda: PAGE)
    assert capsys.readouterr().out == f"Report: {tmp_path / 'report.html'}\n" and (tmp_path / "report.html").is_file()


def test_a_run_is_told_in_a_sentence_without_secrets():
    facts = RunFacts(command="accelerate launch x.py --data https://me:secret@host/x", commit=None, steps=1000, seed=0)
    card = ClipCard(student="tiny", teachers=["big", "L"], license="mit", datasets=["a.tar"], run=facts, attack="4/255")
    assert clip_summary(card) == (
        "A CLIP model, `tiny`, distilled from `big` and `L`, against attacks on its images within 4/255, on `a.tar` in "
        "1,000 steps."
    )
    one = replace(card, one_tower="image", attack=None, teachers=["big"])
    assert clip_summary(one).endswith("Only the image tower was trained, into the teacher's embedding space; the text "
                                      "tower is the teacher's.")  # fmt: skip
    assert "trained without a teacher on `a.tar`" in clip_summary(replace(card, teachers=[], attack=None))
    label = ClassifierCard(student="resnet8", made="distilled from `r` by gkl", teacher="r", data="cifar", run=facts)
    assert classifier_summary(label) == (
        "An image classifier, `resnet8`, distilled from `r` by gkl on `cifar` in 1,000 steps."
    )
    assert "secret" not in command_shown(card) and "--data" in command_shown(card)
