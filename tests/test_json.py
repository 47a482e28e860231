"""What is written as JSON is strict JSON, null for numbers that are not finite, and is read back as it was; lines are
appended whole, and figures and tables take both spellings."""

import json
import math
import threading
from pathlib import Path

import pytest
import test_recipes
from small_sets import colour_set, write_cifar

from gkl_vl.atomic import append_line, json_text, leftovers, nan_for_null, read_json, read_lines, remove_folder
from gkl_vl.errors import UserError
from gkl_vl.evaluation.suite import read_line
from gkl_vl.models.classifiers import load_classifier
from gkl_vl.report.figures import draw_report, pseudo_labels
from gkl_vl.report.tables import metrics_by_dataset, results_table
from gkl_vl.training.checkpoint import RunFolder

HOUSE = Path(__file__).parents[1]
call = test_recipes.call  # the fixture
place = test_recipes.place
NAN = float("nan")


def strict(text: str):
    """As parsers of other languages read it. Raises: ValueError for NaN and Infinity."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null_at_any_depth():
    content = {"a": NAN, "b": [1.5, math.inf, (-math.inf, "nan")], "c": {"d": NAN, "e": None, "f": True, "g": 7}}
    text = json_text(content)
    expected = {"a": None, "b": [1.5, None, [None, "nan"]], "c": {"d": None, "e": None, "f": True, "g": 7}}
    assert strict(text) == expected and text.endswith("}\n")
    assert strict(json_text(content, indent=2)) == expected
    back = nan_for_null(strict(text))
    assert math.isnan(back["a"]) and math.isnan(back["b"][1]) and back["c"]["f"] is True


def test_a_record_of_a_run_comes_back_as_it_was(tmp_path):
    run = RunFolder(tmp_path, is_main=True)
    run.log({"step": 1, "model": "student", "dataset": "toy", "acc1": 0.5, "acc5": NAN})
    run.log({"step": 2, "train/loss": 0.1})
    for _ in range(2):  # also after a rewind, which writes the lines again
        assert [strict(line)["step"] for line in run.results.read_text().splitlines()] == [1, 2]
        first, _ = run.records()
        assert math.isnan(first["acc5"]) and first["acc1"] == 0.5
        run.rewind(2)


def test_a_line_that_a_kill_cut_short_swallows_no_other(tmp_path):
    file = tmp_path / "results.jsonl"
    append_line(file, {"step": 1})
    with file.open("a") as stream:
        stream.write('{"step": 2, "tr')
    assert read_lines(file) == [{"step": 1}]
    append_line(file, {"step": 3})
    assert file.read_text().splitlines() == ['{"step": 1}', '{"step": 2, "tr', '{"step": 3}']
    with pytest.raises(UserError, match="results.jsonl' line 2 is damaged .*: remove that line"):
        read_lines(file)


def test_writers_of_one_file_do_not_mix_their_lines(tmp_path):
    def write(number: int) -> None:
        for _ in range(20):
            append_line(tmp_path / "lines", {"n": number, "text": str(number) * 30_000})

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    lines = read_lines(tmp_path / "lines")
    assert len(lines) == 80 and all(line["text"] == str(line["n"]) * 30_000 for line in lines)


def test_a_damaged_object_is_named_with_the_remedy(tmp_path):
    (tmp_path / "x.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="x.json' is damaged .a JSON list in place of an object.: do this"):
        read_json(tmp_path / "x.json", remedy="do this")


def test_a_removed_folder_is_gone_or_a_leftover(tmp_path, monkeypatch):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_folder(tmp_path / "whole")
    monkeypatch.setattr("gkl_vl.atomic.shutil.rmtree", lambda *args, **kwargs: None)  # a kill after the rename
    remove_folder(tmp_path / "cut")
    assert not (tmp_path / "whole").exists() and not (tmp_path / "cut").exists()
    assert [path.name[:5] for path in leftovers(tmp_path)] == [".cut."]


@pytest.mark.parametrize("missing", [None, NAN])
def test_figures_and_tables_take_null_for_nan(tmp_path, missing):
    records = [
        {"step": 1, "train/loss": missing, "train/mask_rate": 0.5, "train/pseudo_label_acc1": missing},
        {"step": 2, "train/loss": 1.0, "train/mask_rate": missing, "train/pseudo_label_acc1": 0.5},
        {"step": 2, "model": "student", "dataset": "toy", "acc1": 0.5, "acc5": missing},
        {"step": 2, "model": "teacher", "dataset": "toy", "acc1": missing, "acc5": missing},
    ]
    draw_report(path=tmp_path / "report.png", records=records, sheet=[], title="x")
    assert all(math.isnan(point["acc1"]) for point in pseudo_labels(records, windows=2))
    rows = [
        {"model": role, "name": role, "parameters": 1, "results": metrics_by_dataset(records[2:], role)}
        for role in ("teacher", "student")
    ]
    table = results_table(rows)
    assert "50.0 %" in table and "acc5" not in table and "nan" not in table


def assert_strict(folder: Path, *names: str) -> None:
    """All JSON below a folder is strict, and these names are among the files."""
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl")]
    assert set(names) <= {path.name for path in files}
    for path in files:
        text = path.read_text()
        for part in text.splitlines() if path.suffix == ".jsonl" or path.name == "result.json" else [text]:
            strict(part)


@pytest.fixture
def sets(place):
    """A set of three classes, whose acc5 is nan, and one with captions."""
    if not (place / "three").exists():
        colour_set(place / "three" / "colours", ["red", "green", "blue", "red"])
        captions = colour_set(place / "three" / "captions", ["red", "green", "blue", "red"])
        (captions / "dataset_type.txt").write_text("retrieval")
    return f"{place}/three/{{dataset_cleaned}}"


@pytest.mark.usefixtures("one_thread")
def test_every_file_of_a_run_is_strict(place, sets, call):
    flags = ["--teacher", f"local-dir:{place}/teacher", "--train-data", f"{place}/pairs.tar", "--steps", "1"]
    flags += ["--student", f"{place}/tiny.json", "--batch-size", "4", "--workers", "0", "--output-dir", "run"]
    code, out, error = call(*flags, "--eval-data", "wds/colours", "--dataset-root", sets)
    assert code == 0, error
    assert_strict(Path("run"), "config.json", "results.jsonl", "loop.json", "open_clip_config.json")
    assert '"acc5": null' in Path("run/results.jsonl").read_text() and "nan" not in out
    evaluations = [record for record in RunFolder(Path("run"), is_main=False).records() if "model" in record]
    assert len(evaluations) == 3 and all(math.isnan(record["acc5"]) for record in evaluations)


EVALUATIONS = [
    ("zero_shot", ["--dataset", "wds/colours"]),
    ("retrieval", ["--dataset", "wds/captions"]),
    ("linear_probe", ["--dataset", "wds/colours", "--train_split", "test"]),
    ("suite", ["--collection", "wds/colours", "wds/captions", "--output", "results"]),
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("script, flags", EVALUATIONS, ids=[script for script, _ in EVALUATIONS])
def test_every_file_of_an_evaluation_is_strict(place, sets, tmp_path, monkeypatch, run_script, script, flags):
    monkeypatch.chdir(tmp_path)
    models = ["--model", f"local-dir:{place}/teacher", "--teacher", f"local-dir:{place}/teacher"]
    flags = [*flags, *models, "--dataset_root", sets, "--num_workers", "0"]
    for resume in ([], ["--resume"]) if script == "suite" else ([],):
        code, out, error = run_script(HOUSE / "eval" / f"{script}.py", *flags, *resume)
        assert code == 0, error
    files = list(tmp_path.rglob("*.json"))
    assert_strict(tmp_path)
    assert files and ("null" in "".join(file.read_text() for file in files))
    assert "nan" not in out.replace(str(tmp_path), "")
    if script == "suite":
        lines = [read_line(file) for file in files]
        assert any(math.isnan(line["metrics"].get("acc5", 0.0)) for line in lines)


@pytest.mark.usefixtures("one_thread")
def test_every_file_of_an_attack_is_strict_and_a_damaged_one_is_named(tmp_path, monkeypatch, run_script):
    from gkl_vl.export.cards import ClassifierCard, RunFacts
    from gkl_vl.export.hub import export_classifier

    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "cifar", {"test": 4}, classes=4)
    card = ClassifierCard(
        student="resnet8", made="made", teacher=None, data="x", run=RunFacts(command="", commit=None, steps=0, seed=0)
    )
    export_classifier(classifier=load_classifier("resnet8", num_classes=4), folder=tmp_path / "model", card=card)
    flags = ["--model", "local-dir:model", "--data", "cifar", "--attack", "pgd20", "--state-dir", "state"]
    code, _, error = run_script(HOUSE / "eval" / "autoattack.py", *flags)
    assert code == 0, error
    assert_strict(tmp_path, "results.jsonl", "settings.json", "batch_00000.json", "config.json")
    for name in ("batch_00000.json", "settings.json"):
        (tmp_path / "state" / name).write_text('{"batch"')
        code, _, error = run_script(HOUSE / "eval" / "autoattack.py", *flags)
        assert code == 2 and f"{name}' is damaged" in error and len(error.strip().splitlines()) == 1, error
