"""`report.png` shows the records of a run, also incomplete ones, and does not change matplotlib's global state;
the closing table has the exact numbers and is at most 100 columns wide."""

import math
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
import pytest
from matplotlib.figure import Figure

from gkl_vl.report.figures import SheetItem, draw_pseudo_labels, draw_report, pseudo_labels
from gkl_vl.report.tables import results_table, shorten

RED = PIL.Image.new("RGB", (64, 64), (255, 0, 0))
TRAINING = [
    {
        "step": step,
        "train/loss": 5 / (step + 1),
        "train/contrastive": 3 / (step + 1),
        "train/mimicry": 0.001,
        "train/kl": 0.0,
    }
    for step in range(0, 100, 10)
]
STUDENT = [{"step": step, "model": "student", "dataset": "emoji", "acc1": step / 300} for step in (0, 50, 100)]
TEACHER = [{"step": 0, "model": "teacher", "dataset": "emoji", "acc1": 0.5, "acc5": float("nan")}]
RIGHT = SheetItem(RED, "grinning face", [("grinning face", 0.8), ("ghost", 0.1), ("alien", 0.05)])
WRONG = SheetItem(RED, "grinning face", [("ghost", 0.8), ("alien", 0.1), ("robot", 0.05)])
GREEN_BAR, GREY_BAR, RED_PIXEL = (172, 238, 187), (208, 215, 222), (255, 0, 0)


def draw(folder: Path, records: list[dict], sheet: list[SheetItem], title: str = "a run") -> np.ndarray:
    draw_report(path=folder / "report.png", records=records, sheet=sheet, title=title)
    assert [path.name for path in folder.iterdir()] == ["report.png"]
    return np.asarray(PIL.Image.open(folder / "report.png").convert("RGB"))


def count(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((pixels == colour).all(-1).sum())


def test_images_names_and_bars_are_drawn(tmp_path: Path):
    pixels = draw(tmp_path, TRAINING + TEACHER + STUDENT, [RIGHT, WRONG, RIGHT])
    assert pixels.shape == (780, 1400, 3)
    assert count(pixels, RED_PIXEL) == 3 * 88 * 88
    # The longest bar is 0.8 of a track; letters cover a part of it.
    assert count(pixels, GREEN_BAR) > 2 * 0.5 * 0.8 * 259 * 19
    assert count(pixels, GREY_BAR) > 0.5 * 0.8 * 259 * 19


def test_green_means_right(tmp_path: Path):
    assert count(draw(tmp_path, TRAINING, [WRONG]), GREEN_BAR) == 0
    second = SheetItem(RED, "alien", WRONG.top)
    assert (
        0 < count(draw(tmp_path, TRAINING, [second]), GREEN_BAR) < count(draw(tmp_path, TRAINING, [RIGHT]), GREEN_BAR)
    )


def test_twelve_images_fit_and_a_thirteenth_is_left_out(tmp_path: Path):
    assert count(draw(tmp_path, TRAINING, [RIGHT] * 13), RED_PIXEL) == 12 * 88 * 88


@pytest.mark.parametrize(
    "records",
    [
        [],
        TRAINING,
        TRAINING[:1],
        STUDENT,
        STUDENT[:1],
        TEACHER,
        TRAINING + STUDENT,
        TRAINING + TEACHER + STUDENT,
        [{"step": 3, "train/loss": float("nan")}],
        [{"step": 3, "train/loss": -2.0, "train/contrastive": 50.0}],
        [{"step": 3, "model": "student", "dataset": "coco", "image_retrieval_recall@5": 0.3}],
        [{"step": 3, "model": "student", "dataset": f"set{k}", "acc1": 0.1 * k} for k in range(7)],
    ],
)
def test_incomplete_records_are_drawn(tmp_path: Path, records: list[dict]):
    pixels = draw(tmp_path, records, [])
    # Nothing is drawn over the edges.
    assert (pixels[:, -12:] == 255).all()
    assert (pixels[-8:] == 255).all()


def test_the_teacher_is_drawn_only_when_there_is_one(tmp_path: Path):
    def blue(records: list[dict]) -> int:
        pixels = draw(tmp_path, records, []).astype(int)[390:]
        return int((pixels[..., 2] - pixels[..., 0] > 60).sum())

    assert blue(TRAINING + STUDENT + TEACHER) > blue(TRAINING + STUDENT) + 600  # a line of 1288 pixels


def test_a_term_that_is_off_has_no_curve(tmp_path: Path):
    def without(term: str) -> list[dict]:
        return [{key: value for key, value in row.items() if key != term} for row in TRAINING]

    full = draw(tmp_path, TRAINING, [])
    assert np.array_equal(full, draw(tmp_path, without("train/kl"), []))
    assert not np.array_equal(full, draw(tmp_path, without("train/mimicry"), []))


@pytest.mark.parametrize("term", ["distillation", "robust"])
def test_terms_of_other_recipes_are_drawn_as_well(tmp_path: Path, term: str):
    rows = [{"step": step, "train/loss": 3.0, "train/ce": 2.0, f"train/{term}": 1.0} for step in (10, 20)]
    without = [{key: value for key, value in row.items() if key != f"train/{term}"} for row in rows]
    assert not np.array_equal(draw(tmp_path, rows, []), draw(tmp_path, without, []))


def test_names_of_any_kind_stay_in_their_place(tmp_path: Path):
    names = ["a_{very}$long$ name " * 5, "“ここ”ボタン", "grinning 😀 face\nsecond line", "", "W" * 60]
    sheet = [SheetItem(RED.convert("RGBA"), name, [(name, 1.0), ("x$", 0.0)]) for name in names]
    pixels = draw(tmp_path, [row | {"dataset": "set_$x$ " * 9} for row in STUDENT + TEACHER], sheet, title="$t_ " * 90)
    assert (pixels[:, -12:] == 255).all()


def test_transparent_and_odd_images_are_shown_on_white(tmp_path: Path):
    clear = PIL.Image.new("RGBA", (31, 77), (255, 0, 0, 0))
    palette = RED.convert("P")
    pixels = draw(tmp_path, [], [SheetItem(clear, "a", [("b", 0.5)]), SheetItem(palette, "a", []), WRONG])
    assert count(pixels, RED_PIXEL) == 2 * 88 * 88


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw(tmp_path, TRAINING, [])
    before = (tmp_path / "report.png").read_bytes()

    def full_disk(_, path: Path, **__) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space left"):
        draw_report(path=tmp_path / "report.png", records=STUDENT, sheet=[], title="a run")
    assert (tmp_path / "report.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_matplotlibs_global_state_is_left_alone(tmp_path: Path):
    before = dict(matplotlib.rcParams)
    draw(tmp_path, TRAINING + STUDENT, [RIGHT])
    assert dict(matplotlib.rcParams) == before
    code = "import sys, gkl_vl.report.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


TEACHER_ROW = {
    "model": "teacher",
    "name": "emoji-teacher",
    "image_parameters": 12_000_000,
    "parameters": 15_000_000,
    "ms_per_image": 6.0,
    "results": {
        "emoji": {"acc1": 0.4, "acc5": math.nan},
        "unseen": {"acc1": 0.0, "image_retrieval_recall@5": 0.3},
    },
}
STUDENT_ROW = {
    "model": "student",
    "name": "local-dir:a/very/long/path/to/some/student",
    "image_parameters": 2_000_000,
    "parameters": 5_000_000,
    "ms_per_image": 1.5,
    "results": {"emoji": {"acc1": 0.3, "acc5": math.nan}, "unseen": {"acc1": 0.1}},
}


def test_the_table_compares_student_and_teacher():
    lines = [" ".join(line.split()) for line in results_table([TEACHER_ROW, STUDENT_ROW]).splitlines()]
    assert lines[0] == "teacher emoji-teacher student local-dir:a/…"
    assert set(lines[1]) == {"-"}
    assert lines[2:] == [
        "image tower, parameters 12,000,000 2,000,000 6.0x smaller",
        "all parameters 15,000,000 5,000,000 3.0x smaller",
        "ms per image 6.00 1.50 4.0x faster",
        "emoji acc1 40.0 % 30.0 % 75 % kept",
        "unseen acc1 0.0 % 10.0 %",
        "unseen image_retrieval_recall@5 30.0 % –",
    ]


def test_the_table_is_aligned_and_narrow():
    long = {"a data set with a very long name indeed": {"text_retrieval_recall@1000_of_everything": 0.123}}
    rows = [row | {"results": row["results"] | long} for row in (TEACHER_ROW, STUDENT_ROW)]
    lines = results_table(rows).splitlines()
    assert max(len(line) for line in lines) <= 100
    student_ends = {line.index("%", line.index("%") + 1) for line in lines if line.count("%") >= 2}
    assert len(student_ends) == 1


def test_a_run_without_a_teacher_has_one_column():
    lines = [" ".join(line.split()) for line in results_table([STUDENT_ROW]).splitlines()]
    assert lines[2:] == [
        "image tower, parameters 2,000,000",
        "all parameters 5,000,000",
        "ms per image 1.50",
        "emoji acc1 30.0 %",
        "unseen acc1 10.0 %",
    ]


def test_shorten_counts_the_ellipsis():
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"
    assert shorten("two\n  lines", 20) == "two lines"


# ---- pseudo-labels


def test_pseudo_labels_are_pooled_and_an_empty_batch_has_no_weight():
    given = [(10, 0.0, 0.0), (20, 0.25, 1.0), (30, 0.75, 0.5), (40, 0.5, 0.0), (50, 0.0, 0.0)]
    logged = [{"step": s, "train/mask_rate": m, "train/pseudo_label_acc1": a} for s, m, a in given]
    first, second = pseudo_labels([*logged, {"step": 50, "model": "student"}], windows=2)
    assert first == pytest.approx({"step": 30, "mask_rate": 100 / 3, "acc1": 62.5})
    assert second == pytest.approx({"step": 50, "mask_rate": 25, "acc1": 0})
    (empty,) = pseudo_labels(logged[:1], windows=2)
    assert empty["mask_rate"] == 0 and math.isnan(empty["acc1"])
    assert pseudo_labels(TRAINING, windows=3) == []


def test_a_run_with_pseudo_labels_shows_them_at_the_right(tmp_path: Path):
    blue = (0, 114, 178)
    pseudo = [{"step": s, "train/mask_rate": s / 100, "train/pseudo_label_acc1": 0.5} for s in range(0, 100, 10)]
    with_them, without = (draw(tmp_path, TRAINING + STUDENT + more, []) for more in (pseudo, []))
    right = (slice(None), slice(770, 1400))
    assert count(with_them[right], blue) > 2000
    assert count(with_them, blue) > count(without[:, :700], blue)


def test_a_picture_of_several_settings_has_a_row_of_each(tmp_path: Path):
    points = [{"step": s, "mask_rate": s / 2, "acc1": math.nan if s == 0 else 50.0} for s in range(0, 100, 10)]
    draw_pseudo_labels(path=tmp_path / "p.png", runs={"40 labels": {"kl": points, "gkl": points}, "250": {"kl": []}})
    pixels = np.asarray(PIL.Image.open(tmp_path / "p.png").convert("RGB"))
    assert pixels.shape == (840, 1200, 3)
    assert count(pixels[:420], (213, 94, 0)) > 500 and count(pixels[420:], (213, 94, 0)) == 0
