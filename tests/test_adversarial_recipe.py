"""recipes/adversarial.py: settings as published, a run by two processes, exact resume, mistakes in a line."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import disable_progress_bars
from helpers import lines_without_speed, run_script_in_ranks
from safetensors.torch import load_file
from small_sets import write_cifar

from gkl_vl.models.cifar_zoo import ZOO
from gkl_vl.models.classifiers import load_classifier

RECIPE = Path(__file__).parents[1] / "recipes" / "adversarial.py"
CLASSES = 5
FLAGS = ["--data", "cifar", "--model", "resnet8", "--batch-size", "4", "--workers", "0", "--robust-images", "6"]
FLAGS += ["--epochs", "2"]
NATURAL = [*FLAGS, "--method", "natural"]
FLAGS += ["--budget", "low"]
disable_progress_bars()


def recipe():
    spec = importlib.util.spec_from_file_location("adversarial_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["adversarial_recipe"] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


def test_the_presets_are_the_published_settings():
    """The last row of the table of published settings, the scripts' flags, and their text below the table."""
    presets = recipe().PRESETS
    for name, gamma, raised in (("cifar100-basic", 0.4, 1), ("cifar10-basic", 0.2, 0)):
        preset = presets[name]
        assert (preset.epochs, preset.batch_size, preset.lr, preset.wd) == (200, 128, 0.2, 5e-4)
        assert (preset.model, preset.ema_decay, preset.ema_epoch) == ("wrn_34_10", 0.9996, 150)
        gkl, ikl = preset.methods["gkl"], preset.methods["ikl"]
        for found, of_method in ((gkl, (gamma, 1)), (ikl, (ikl.gkl.gamma, 4))):
            assert (found.gkl.soft_ce_weight, found.gkl.wmse_weight, found.attack_wmse_weight) == (4, 20, raised)
            assert (found.gkl.gamma, found.gkl.weight_temperature, found.class_prior) == (*of_method, True)
            assert (found.awp_gamma, found.awp_epoch, found.epsilon, found.norm) == (0.005, 10, 8 / 255, "linf")
            assert found.label_smoothing == 0 and found.budget == "high"
    second = presets["cifar100-autoaugment"]
    gkl = second.methods["gkl"]
    assert (second.second_view, gkl.second_view_weight) == ("autoaugment", 0.5)
    assert (gkl.gkl.gamma, gkl.gkl.weight_temperature) == (1, 4)
    for name, weights in (("cifar100-synthesized", (5, 12)), ("cifar10-synthesized", (3, 10))):
        preset = presets[name]
        gkl = preset.methods["gkl"]
        assert (gkl.gkl.soft_ce_weight, gkl.gkl.wmse_weight) == weights
        assert gkl.awp_gamma == 0 and gkl.label_smoothing == 0.1
        assert preset.model == "wrn_28_10_silu" and preset.fraction and gkl.epochs == preset.epochs
    for preset in presets.values():
        assert preset.model in ZOO and set(preset.methods) == {"natural", "trades", "ikl", "gkl"}
        assert all(settings.method == method for method, settings in preset.methods.items())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """CIFAR-like parquet, and synthesized images."""
    folder, random = tmp_path_factory.mktemp("adversarial"), np.random.default_rng(0)
    write_cifar(folder / "cifar", {"train": 16, "test": 10}, classes=CLASSES)
    image = random.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "more.npz", image=image, label=np.arange(9) % CLASSES)
    return folder


def test_two_processes_write_one_run(place):
    flags = [*FLAGS, "--synthesized", "more.npz", "--fraction", "0.5", "--second-view", "autoaugment"]
    out = run_script_in_ranks(RECIPE, *flags, "--output-dir", "run", "--eval-every-epochs", "1", folder=place)
    run = place / "run"
    there = {"config.json", "results.jsonl", "checkpoints", "model", "report.png", "report.html"}
    assert {p.name for p in run.iterdir()} == there
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    measured = [(r["step"], r["dataset"].partition(":")[0]) for r in records if "model" in r]
    assert measured == [(2, "cifar"), (2, "pgd20"), (4, "cifar"), (4, "pgd20")]
    training = [record for record in records if "train/loss" in record][-1]
    assert {"train/ce", "train/robust", "train/batch_acc1", "train/batch_robust_acc1"} <= set(training)
    assert load_classifier(f"local-dir:{run / 'model'}").num_classes == CLASSES
    assert "against attacks within `8/255` in linf" in (run / "model" / "README.md").read_text()
    assert "Load the student" in out and "Published for cifar10-basic by gkl: 85.31 %" in out


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def call(place, monkeypatch, run_script):
    """call(*flags) -> (exit code, stdout, stderr) in this process."""
    monkeypatch.chdir(place)

    def call(*flags: str) -> tuple[int, str, str]:
        return run_script(RECIPE, *flags)

    return call


@pytest.mark.parametrize("method", ["natural", "trades", "ikl"])
def test_every_method_runs(call, place, method):
    flags = NATURAL if method == "natural" else [*FLAGS, "--method", method]
    flags = [*flags, "--epochs", "1", "--norm", "l2", "--epsilon", "0.5", "--second-view", "cutout"]
    code, out, error = call(*flags, "--output-dir", method)
    assert code == 0, error
    assert ("l2 0.5" in out) == (method != "natural")
    config = json.loads((place / method / "config.json").read_text())
    assert (config["method"], config["epsilon"]) == (method, "0.5")


def test_a_resumed_run_is_the_one_that_was_never_stopped_bit_for_bit(call, place):
    """With perturbed weights, a prior, and an average that begins on the way."""
    flags = [*FLAGS, "--epochs", "4", "--checkpoint-every-epochs", "1", "--eval-every-epochs", "1"]
    flags += ["--keep-checkpoints", "0"]
    assert call(*flags, "--output-dir", "whole")[0] == 0
    checkpoints = sorted((place / "whole" / "checkpoints").iterdir())
    assert [c.name for c in checkpoints] == [f"step_{step:08d}" for step in (4, 8, 12, 16)]
    want = load_file(place / "whole" / "model" / "model.safetensors")
    records = lines_without_speed(place / "whole" / "results.jsonl")
    for checkpoint in (checkpoints[0], checkpoints[2]):
        code, _, error = call(*flags, "--output-dir", "whole", "--resume", str(checkpoint))
        assert code == 0, error
        got = load_file(place / "whole" / "model" / "model.safetensors")
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
        assert lines_without_speed(place / "whole" / "results.jsonl") == records
    averaged = load_file(checkpoints[2] / "ema.safetensors")
    assert averaged["n_averaged"] == 0 and load_file(checkpoints[3] / "ema.safetensors")["n_averaged"] == 4


def test_an_average_is_exported_with_statistics_of_its_own(place):
    """Of the run above: BatchNorm's statistics in the export are those that its weights give."""
    exported = load_classifier(f"local-dir:{place / 'whole' / 'model'}")
    stored = load_file(sorted((place / "whole" / "checkpoints").iterdir())[-1] / "ema.safetensors")
    weights = {name.removeprefix("module.model.model."): tensor for name, tensor in stored.items()}
    trained = load_file(sorted((place / "whole" / "checkpoints").iterdir())[-1] / "model.safetensors")
    state = exported.model.state_dict()
    assert torch.equal(state["conv1.weight"], weights["conv1.weight"])
    assert not torch.equal(state["bn1.running_mean"], trained["model.model.bn1.running_mean"])
    exported.model.train()
    for module in exported.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    from gkl_vl.data.labelled import in_memory, open_labelled
    from gkl_vl.data.views import MemoryViews

    train = MemoryViews(images=in_memory(open_labelled(str(place / "cifar"), "train")), seed=0)
    (images,) = train.batches(iter([(0, torch.arange(16))]))
    exported.model(exported.prepare(images))
    torch.testing.assert_close(exported.model.state_dict()["bn1.running_mean"], state["bn1.running_mean"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "cifar10-basik"], "unknown --preset 'cifar10-basik', did you mean 'cifar10-basic'"),
        (["--preset", "cifar10-synthesized"], "cifar10-synthesized trains on synthesized images as well: give --synth"),
        (["--epsilon", "8"], "an epsilon of 8 is no radius in linf for pixels in [0, 1]: write 8/255"),
        (["--epsilon", "0"], "an epsilon of 0 is no radius"),
        (["--epsilon", "8/0"], "an epsilon of '8/0' is no number"),
        (["--epsilon", "eight"], "an epsilon of 'eight' is no number: write 8/255"),
        (["--model", "wrn_16_3"], "unknown classifier 'wrn_16_3'"),
        (["--epochs", "0"], "--epochs 0 must be at least 1"),
        (["--robust-images", "0"], "--robust-images 0 must be at least 1"),
        (["--synthesized", "none.npz", "--fraction", "0.5"], "'none.npz' does not exist"),
        (["--synthesized", "more.npz", "--fraction", "1"], "a fraction of 1"),
        (["--synthesized", "more.npz"], "a fraction of 0"),
        (["--images", "17"], "17 images of cifar:train: it has 16"),
        (["--batch-size", "64"], "16 images do not fill a batch of 64"),
    ],
)
def test_a_mistake_is_one_line(call, place, flags, message):
    code, _, error = call(*FLAGS, "--output-dir", "never", *flags)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1, error
    assert not (place / "never").exists()
