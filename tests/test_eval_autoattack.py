"""eval/autoattack.py from the command line: the record and the table, equal with one process and with two; every user
error is one line and exit code 2."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_script_in_ranks
from PIL import Image
from safetensors.torch import load_file, save_file

from gkl_vl.models.classifiers import load_classifier
from gkl_vl.robustness.results import wilson_interval

HOUSE = Path(__file__).parents[1]
SCRIPT = HOUSE / "eval" / "autoattack.py"
CLASSES, EACH = 4, 3


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(one_thread, tmp_path_factory) -> Path:
    """A folder with images of 4 colours and a run whose resnet8 classifies them."""
    folder = tmp_path_factory.mktemp("place")
    draw = np.random.default_rng(0)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])
    images, labels = [], []
    for label in range(CLASSES):
        (folder / "data" / "test" / f"class{label}").mkdir(parents=True)
        for number in range(EACH):
            pixels = (colours[label] + draw.integers(-50, 51, (8, 8, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "data" / "test" / f"class{label}" / f"{number}.png")
            images.append(torch.from_numpy(pixels).permute(2, 0, 1))
            labels.append(label)
    torch.manual_seed(0)
    classifier = load_classifier("resnet8", num_classes=CLASSES)
    optimizer = torch.optim.Adam(classifier.model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(
            classifier.on_pixels()(torch.stack(images) / 255), torch.tensor(labels)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (folder / "runs" / "a" / "model").mkdir(parents=True)
    config = {"library": "gkl-vl", "architecture": "resnet8", "num_classes": CLASSES}
    config |= {"mean": classifier.mean, "std": classifier.std}
    (folder / "runs" / "a" / "model" / "config.json").write_text(json.dumps(config))
    save_file(classifier.model.state_dict(), folder / "runs" / "a" / "model" / "model.safetensors")
    return folder


@pytest.fixture
def call(place, tmp_path, monkeypatch, run_script):
    """call(*flags) -> (exit code, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str) -> tuple[int, str, str]:
        return run_script(SCRIPT, "--model", str(place / "runs" / "a"), "--data", str(place / "data"), *flags)

    return call


def records(file: str = "results.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_autoattack_of_a_run_writes_a_record_and_a_table(call, place):
    code, out, err = call("--epsilon", "128/255", "--batch-size", "8")
    assert (code, err) == (0, "")
    (record,) = records()
    assert (record["attack"], record["version"], record["norm"], record["epsilon"]) == (
        "autoattack",
        "standard",
        "linf",
        128 / 255,
    )
    assert (record["n"], record["seed"], record["draw"]) == (12, 0, "all 12")
    assert record["model"] == str(place / "runs" / "a") and record["dataset"] == f"{place / 'data'}:test"
    assert record["clean_acc1"] > 0.9 and record["robust_acc1"] == 0  # undefended
    assert list(record["after"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert record["robust_acc1_interval"] == list(wilson_interval(hits=0, n=12))
    assert record["target_classes"] == 3 and record["note"] is None and record["pyautoattack"]
    head, settings, *rows = out.splitlines()
    assert "128/255" in head and settings == "AutoAttack standard"
    assert "robust, after square        0.00 %   95 %: 0.00 % to 24.25 %" in rows
    assert rows[-1] == f"appended to results.jsonl; batches in {next(Path('runs').iterdir())}"


def test_data_take_the_order_of_the_models_classes(call, place, tmp_path):
    """The model's names are in an order of their own, and the data lack a class."""
    model = place / "runs" / "a" / "model"
    folders = ["zebra", "yak", "ant", "bee"]  # the names of class0 to class3
    for label, name in enumerate(folders):
        if name != "yak":
            shutil.copytree(place / "data" / "test" / f"class{label}", tmp_path / "named" / "test" / name)
    shutil.copytree(model, tmp_path / "run" / "model")
    file = tmp_path / "run" / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"label_names": folders}))
    flags = ["--model", str(tmp_path / "run"), "--data", str(tmp_path / "named"), "--attack", "pgd20"]
    code, _, err = call(*flags)
    assert (code, err) == (0, "") and records()[0]["clean_acc1"] > 0.85
    shutil.copytree(tmp_path / "named" / "test" / "ant", tmp_path / "named" / "test" / "cow")
    code, _, err = call(*flags)
    assert code == 2 and "has the class 'cow', which the model resnet8 lacks" in err and err.count("\n") == 1


@pytest.mark.parametrize("attack", ["pgd20", "pgd100", "cw"])
def test_pgd_is_marked_as_an_upper_bound(call, attack):
    code, out, err = call("--attack", attack, "--images", "8", "--seed", "2")
    assert (code, err) == (0, "")
    (record,) = records()
    assert record["note"] == "not AutoAttack: an upper bound" and record["note"] in out
    assert (record["n"], record["seed"], record["draw"]) == (8, 2, "8 of 12, evenly by class, seed 0")
    assert record["epsilon"] == 8 / 255


def test_the_usual_epsilon_depends_on_the_norm(call):
    assert call("--attack", "pgd20", "--norm", "l2")[0] == 0
    assert records()[0]["epsilon"] == 0.5


def test_masking_is_checked_on_demand(call):
    flags = ["--attack", "pgd20", "--check-masking", "--masking-images", "4", "--state-dir", "state"]
    code, out, err = call(*flags, "--epsilon", "0.3")
    assert (code, err) == (0, "")
    (record,) = records()
    assert list(record["masking"]) == ["apgd-ce", "square", "pgd100 at 0.3", "pgd100 at 0.5"]
    assert "masking, square" in out
    assert {path.name for path in Path().iterdir()} == {"results.jsonl", "state", "state-masking"}


def test_weights_by_name_are_the_model_of_the_run(call, place):
    weights = str(place / "runs" / "a" / "model" / "model.safetensors")
    assert call("--attack", "pgd20")[0] == 0
    assert call("--attack", "pgd20", "--model", "resnet8", "--weights", weights)[0] == 0
    first, second = records()
    assert first["model_sha256"] == second["model_sha256"] and second["pretrained"] == weights
    assert len(list(Path("runs").iterdir())) == 1  # the second call reused the batches of the first


def test_two_processes_append_the_same_record_as_one(call, place, tmp_path):
    flags = ["--attack", "apgd-ce", "--epsilon", "0.1", "--batch-size", "5"]
    assert call(*flags)[0] == 0
    flags += ["--model", place / "runs" / "a", "--data", place / "data", "--state-dir", "two"]
    run_script_in_ranks(SCRIPT, *flags, folder=tmp_path)
    one, two = ({k: v for k, v in record.items() if k != "seconds"} for record in records())
    assert one == two and 0 < one["robust_acc1"] < one["clean_acc1"]
    (state,) = Path("runs").iterdir()
    for file in sorted(state.glob("batch_*.json")):
        assert json.loads(file.read_text())["flags"] == json.loads((tmp_path / "two" / file.name).read_text())["flags"]


def error_of(call, *flags: str) -> str:
    code, out, err = call(*flags)
    assert code == 2 and out == "" and err.count("\n") == 1 and not Path("results.jsonl").exists()
    return err


def test_errors_are_one_line(call, place, tmp_path, monkeypatch):
    pgd = ["--attack", "pgd20"]
    assert "write 8/255 or 0.03" in error_of(call, *pgd, "--epsilon", "eight")
    assert "is no radius in linf" in error_of(call, *pgd, "--epsilon", "8")
    assert "an epsilon of 0 is no radius" in error_of(call, *pgd, "--epsilon", "0")
    assert "it has 12" in error_of(call, *pgd, "--images", "13")
    assert "--batch-size 0" in error_of(call, *pgd, "--batch-size", "0")
    assert "--masking-images 0" in error_of(call, *pgd, "--check-masking", "--masking-images", "0")
    assert "no split 'train'" in error_of(call, *pgd, "--split", "train")
    assert "has random weights" in error_of(call, *pgd, "--model", "resnet8")
    assert "unknown classifier" in error_of(call, *pgd, "--model", "resnet7", "--weights", "a.safetensors")
    assert "--version plus is a version of AutoAttack and does not apply to --attack pgd20" in error_of(
        call, *pgd, "--version", "plus"
    )
    assert "unknown placeholder" in error_of(call, *pgd, "--output", "{sets}.json")
    assert "--epsilon" in error_of(call, *pgd, "--epsilom", "8/255")
    for package in ("pyautoattack", "robustbench"):
        monkeypatch.setitem(sys.modules, package, None)
    assert "gkl-vl[attack]" in error_of(call)
    monkeypatch.delitem(sys.modules, "pyautoattack")
    assert "gkl-vl[robustbench]" in error_of(call, *pgd, "--model", "robustbench:Carmon2019Unlabeled")


def test_a_state_of_other_weights_is_refused(call, place, tmp_path):
    assert call("--attack", "pgd20", "--state-dir", "state")[0] == 0
    state = load_file(place / "runs" / "a" / "model" / "model.safetensors")
    name = next(name for name in state if name.endswith("weight"))
    save_file(state | {name: state[name] + 1e-3}, "other.safetensors")
    code, _, err = call(
        "--attack", "pgd20", "--state-dir", "state", "--model", "resnet8", "--weights", "other.safetensors"
    )
    assert code == 2 and "belongs to another evaluation: model_sha256" in err and err.count("\n") == 1
    assert len(records()) == 1
