"""recipes/semi_supervised.py: settings as published, a run by two processes, exact resume, mistakes in a line."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import disable_progress_bars
from helpers import lines_without_speed, run_script_in_ranks
from safetensors.torch import load_file, save_file
from small_sets import write_cifar

from gkl_vl import cli
from gkl_vl.models.cifar_zoo import ZOO
from gkl_vl.models.classifiers import load_classifier

RECIPE = Path(__file__).parents[1] / "recipes" / "semi_supervised.py"
CLASSES = 5
SUPERVISED = ["--data", "cifar", "--model", "resnet8", "--batch-size", "2", "--workers", "0", "--num-labels", "5"]
FLAGS = [*SUPERVISED, "--mu", "2", "--threshold", "0.25"]
disable_progress_bars()


def recipe():
    spec = importlib.util.spec_from_file_location("semi_supervised_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["semi_supervised_recipe"] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


USB = {
    "cifar100": ("vit_small_patch2_32", 32, "adamw", 5e-4, 0.5),
    "stl10": ("vit_base_patch16_96", 96, "adamw", 1e-4, 0.65),
    "eurosat": ("vit_small_patch2_32", 32, "adamw", 5e-5, 1.0),
    "cifar10": ("wrn_28_2", 32, "sgd", 0.03, 1.0),
}
"""Model, image_size, optimizer, lr and layer_decay of config/usb_cv and, for CIFAR-10, config/classic_cv."""


def test_the_presets_are_usbs_settings():
    presets = recipe().PRESETS
    labels = {name.partition("-")[0]: [] for name in presets}
    for name, preset in presets.items():
        data, _, count = name.partition("-")
        labels[data].append(int(count))
        assert preset.num_labels == int(count) and preset.model in ZOO and preset.wd == 5e-4
        assert (preset.model, preset.image_size, preset.optimizer, preset.lr, preset.layer_decay) == USB[data]
        length = (preset.steps, preset.warmup_steps, preset.batch_size, preset.mu, preset.ema_decay)
        assert length == ((2**20, 0, 64, 7, 0.999) if data == "cifar10" else (204_800, 5120, 8, 1, 0))
        assert preset.upside_down == (data == "eurosat")
        assert preset.unlabelled_split == ("unlabeled" if data == "stl10" else None)
    assert labels == {"cifar100": [200, 400], "cifar10": [10, 40, 250], "stl10": [40, 100], "eurosat": [20, 40]}
    expected = presets["cifar100-200"].expected
    assert expected["fixmatch with ikl"] == 70.00 and expected["mean-teacher with ikl"] == 70.05
    assert expected["flexmatch with hard"] == pytest.approx(73.24)
    assert presets["cifar10-40"].expected["fixmatch with hard"] == pytest.approx(91.67)


def test_a_method_brings_its_settings():
    module = recipe()

    def found(*flags):
        return module.find_preset(cli.parse(module.Config, ["--preset", "cifar100-200", "--steps", "1000", *flags]))

    preset, settings = found()
    assert (settings.threshold, settings.unlabelled_weight, settings.rampup_steps) == (0.95, 1, 0)
    gkl = settings.gkl
    assert (gkl.soft_ce_weight, gkl.wmse_weight, gkl.temperature) == (1, 0.1, 1)  # as released
    assert (preset.steps, preset.warmup_steps, preset.ema_decay) == (1000, 25, 0)
    preset, settings = found("--method", "mean-teacher", "--consistency", "mse")
    assert (settings.threshold, settings.unlabelled_weight, settings.rampup_steps) == (0, 50, 400)
    assert preset.ema_decay == 0.999
    flags = ["--method", "mean-teacher", "--consistency", "ikl", "--ema-decay", "0.9", "--wmse-weight", "2"]
    preset, settings = found(*flags)
    assert (settings.threshold, settings.rampup_steps, settings.gkl.wmse_weight) == (0.95, 0, 2.0)
    assert preset.ema_decay == 0.9


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """CIFAR-like parquet, with a split of more images without labels."""
    folder = tmp_path_factory.mktemp("semi")
    write_cifar(folder / "cifar", {"train": 15, "test": 10, "unlabeled": 4}, classes=CLASSES, unlabelled="unlabeled")
    np.save(folder / "idx.npy", np.array([14, 0, 1, 2, 3]))
    np.save(folder / "other.npy", np.array([0, 1, 2, 3, 49_999]))
    (folder / "beyond.txt").write_text("0 0\n1 1\n2 2\n3 3\n4 9\n")
    return folder


def test_two_processes_write_one_run(place):
    flags = [*FLAGS, "--method", "flexmatch", "--class-prior", "--unlabelled-split", "unlabeled", "--steps", "6"]
    out = run_script_in_ranks(RECIPE, *flags, "--output-dir", "run", "--eval-every-steps", "3", folder=place)
    run = place / "run"
    there = {"config.json", "labelled.txt", "results.jsonl", "checkpoints", "model", "report.png", "report.html"}
    assert {path.name for path in run.iterdir()} == there
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [(r["step"], r["dataset"]) for r in records if "model" in r] == [(3, "cifar:test"), (6, "cifar:test")]
    training = [record for record in records if "train/loss" in record][-1]
    assert {"train/ce", "train/consistency", "train/mask_rate", "train/pseudo_label_acc1"} <= set(training)
    assert load_classifier(f"local-dir:{run / 'model'}").num_classes == CLASSES
    assert "trained by flexmatch with gkl on 5 labels" in (run / "model" / "README.md").read_text()
    assert "5 labels and 19 images without" in out and "Load the student" in out
    states = [load_file(run / "checkpoints" / "step_00000006" / f"memory_{rank}.safetensors") for rank in range(2)]
    assert torch.equal(*(state["last_pseudo_label"] for state in states))  # all ranks know of all images


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def call(place, monkeypatch, run_script):
    """call(*flags) -> (exit code, stdout, stderr) in this process."""
    monkeypatch.chdir(place)

    def call(*flags: str) -> tuple[int, str, str]:
        return run_script(RECIPE, *flags)

    return call


ARMS = [("supervised", "gkl"), ("fixmatch", "hard"), ("fixmatch", "kl"), ("fixmatch", "ikl"), ("flexmatch", "gkl")]
ARMS += [("mean-teacher", "mse"), ("mean-teacher", "ikl"), ("mean-teacher", "gkl")]


@pytest.mark.parametrize("method, term", ARMS)
def test_every_method_starts_from_one_command(call, place, method, term):
    flags = ["--method", method, "--consistency", term, "--steps", "2", "--preset", "cifar100-200"]
    code, out, error = call(
        *(SUPERVISED if method == "supervised" else FLAGS), *flags, "--output-dir", f"{method}-{term}"
    )
    assert code == 0, error
    assert (f"by {method} with {term} · 5 labels and 15 images" in out) == (method != "supervised")
    published = {("supervised", "gkl"), ("fixmatch", "hard"), ("fixmatch", "kl"), ("fixmatch", "ikl")}
    published |= {("mean-teacher", "mse"), ("mean-teacher", "ikl")}
    assert ("Published for cifar100-200 by" in out) == ((method, term) in published)


def test_the_labels_of_a_run_can_be_those_of_another_or_usbs(call, place):
    code, _, error = call(*FLAGS, "--steps", "1", "--labelled", "idx.npy", "--output-dir", "usb")
    assert code == 0, error
    written = (place / "usb" / "labelled.txt").read_text()
    assert written == "14 4\n0 0\n1 1\n2 2\n3 3\n"
    code, _, error = call(*FLAGS, "--steps", "1", "--labelled", "usb/labelled.txt", "--output-dir", "again")
    assert code == 0 and (place / "again" / "labelled.txt").read_text() == written, error


def test_weights_of_other_classes_are_where_a_model_starts(call, place):
    start = ZOO["resnet8"](1000).state_dict()
    save_file(start, place / "start.safetensors")
    flags = [*SUPERVISED, "--method", "supervised", "--steps", "1", "--lr", "0", "--ema-decay", "0"]
    code, _, error = call(*flags, "--weights", "start.safetensors", "--output-dir", "tuned")
    assert code == 0, error
    tuned = load_file(place / "tuned" / "model" / "model.safetensors")
    assert torch.equal(tuned["layer1.0.conv1.weight"], start["layer1.0.conv1.weight"])
    assert tuned["fc.weight"].shape == (CLASSES, 64)


@pytest.mark.parametrize("method", ["flexmatch", "mean-teacher"])
def test_a_resumed_run_is_the_one_that_was_never_stopped_bit_for_bit(call, place, method):
    """With thresholds, a prior, and an average that teaches."""
    flags = [*FLAGS, "--method", method, "--class-prior", "--ema-decay", "0.8", "--steps", "8"]
    flags += ["--checkpoint-every-steps", "3", "--eval-every-steps", "3", "--output-dir", method]
    assert call(*flags)[0] == 0
    checkpoints = sorted((place / method / "checkpoints").iterdir())
    assert [c.name for c in checkpoints] == [f"step_{step:08d}" for step in (3, 6, 8)]
    want = load_file(place / method / "model" / "model.safetensors")
    records = lines_without_speed(place / method / "results.jsonl")
    for checkpoint in checkpoints[:2]:
        code, _, error = call(*flags, "--resume", str(checkpoint))
        assert code == 0, error
        got = load_file(place / method / "model" / "model.safetensors")
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
        assert lines_without_speed(place / method / "results.jsonl") == records


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "cifar10-25"], "unknown --preset 'cifar10-25', did you mean 'cifar10-250'"),
        (["--preset", "stl10-40"], "has no split 'unlabelled'"),
        (["--num-labels", "4"], "--num-labels 4 is fewer than the 5 classes of cifar:train: at least one of each"),
        (["--num-labels", "20"], "--num-labels 20 is 4 a class, cifar:train has 3 of class 0: take fewer"),
        (["--labelled", "other.npy"], "names image 49999, cifar:train has 0 to 14: it is of another data set"),
        (["--labelled", "beyond.txt"], "has the label 9, the 5 classes of cifar:train end at 4"),
        (
            ["--labelled", "idx.npy", "--num-labels", "10"],
            "--num-labels 10, but --labelled 'idx.npy' names 5: give one",
        ),
        (["--mu", "0"], "--mu 0 leaves the batch of unlabelled images empty: at least 1, or --method supervised"),
        (["--method", "mean-teacher", "--ema-decay", "0"], "--ema-decay 0 leaves it none"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--model", "wrn_28_3"], "unknown classifier 'wrn_28_3'"),
        (["--weights", "none.pth"], "weights 'none.pth' are no file"),
        (["--images", "16"], "16 images of cifar:train: it has 15"),
        (["--consistency", "soft"], "--consistency"),
    ],
)
def test_a_mistake_is_one_line(call, place, flags, message):
    split = ["--unlabelled-split", "unlabelled"] if "stl10-40" in flags else []
    code, _, error = call(*FLAGS, "--output-dir", "never", *flags, *split)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1, error
    assert not (place / "never").exists()


def test_data_that_a_preset_has_not_is_asked_for(call):
    code, _, error = call("--preset", "stl10-40", "--output-dir", "never")
    assert code == 2 and "--preset stl10-40 has no data of its own: give --data" in error
