"""The label recipes: settings as published, a run of each by two processes, exact resume, mistakes in a line."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import disable_progress_bars
from helpers import lines_without_speed, run_script_in_ranks
from PIL import Image
from safetensors.torch import load_file, save_file
from small_sets import write_cifar

from gkl_vl.models.classifiers import load_classifier

HOUSE = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
disable_progress_bars()  # imported here, `datasets` does not hear what the scripts tell it

# The table of published settings: soft CE, wMSE, gamma, T, T2, class prior, warm-up.
PUBLISHED = {
    ("cifar_kd", "resnet56-resnet20"): (1, 4, 0.2, 4, 4, True, 20),
    ("cifar_kd", "resnet110-resnet32"): (1, 4, 0.1, 4, 4, False, 20),
    ("cifar_kd", "resnet32x4-resnet8x4"): (1, 16, 0.05, 4, 4, True, 20),
    ("cifar_kd", "wrn_40_2-wrn_16_2"): (3, 20, 0.3, 4, 4, False, 20),
    ("cifar_kd", "wrn_40_2-wrn_40_1"): (1, 12, 0.3, 4, 4, False, 20),
    ("cifar_kd", "vgg13-vgg8"): (1, 8, 0.2, 4, 4, True, 20),
    ("cifar_kd", "resnet32x4-ShuffleV1"): (1, 8, 0.0, 4, 4, True, 20),
    ("cifar_kd", "wrn_40_2-ShuffleV1"): (1, 8, 0.0, 4, 4, False, 20),
    ("cifar_kd", "resnet32x4-ShuffleV2"): (3, 12, 0.1, 4, 4, True, 20),
    ("cifar_kd", "vgg13-MobileNetV2"): (4, 12, 0.1, 4, 4, True, 20),
    ("cifar_kd", "ResNet50-MobileNetV2"): (1, 8, 0.05, 4, 4, True, 20),
    ("imagenet_kd", "resnet34-resnet18"): (1, 0.5, 0.6, 1, 1, True, 5),
    ("imagenet_kd", "resnet50-mobilenetv1"): (4, 1, 0.5, 1, 1, True, 5),
    ("imagenet_lt_kd", "resnext101-resnet18"): (4, 4, 0.3, 1, 1, True, 0),
    ("imagenet_lt_kd", "resnext101-resnet50"): (4, 4, 0.3, 1, 1, True, 0),
}
# Epochs, batch, weight decay, milestones.
SCHEDULES = {
    "cifar_kd": (240, 64, 5e-4, (150, 180, 210)),
    "imagenet_kd": (100, 512, 1e-4, (30, 60, 90)),
    "imagenet_lt_kd": (90, 128, 5e-4, ()),
}
LIGHT = ("Mobile", "Shuffle")


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(f"the_recipe_{name}", HOUSE / "recipes" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_presets_are_the_published_settings():
    ours = {(name, pair): found for name in SCHEDULES for pair, found in recipe(name).PAIRS.items()}
    assert set(ours) == set(PUBLISHED)
    for (name, pair), expected in PUBLISHED.items():
        found = ours[name, pair]
        gkl = found.methods["gkl"]
        loss = gkl.gkl
        temperatures = (loss.temperature, loss.weight_temperature)
        got = (loss.soft_ce_weight, loss.wmse_weight, loss.gamma, *temperatures, gkl.class_prior, gkl.warmup_epochs)
        assert got == expected, pair
        assert gkl.ce_weight == 1
        assert (found.epochs, found.batch_size, found.wd, found.milestones) == SCHEDULES[name], pair
        light = any(word in pair for word in LIGHT)
        assert found.lr == {"cifar_kd": 0.01 if light else 0.05, "imagenet_kd": 0.2, "imagenet_lt_kd": 0.05}[name]


def test_every_pair_names_models_that_there_are():
    for name in SCHEDULES:
        for pair in recipe(name).PAIRS.values():
            if ":" not in pair.student:
                assert load_classifier(pair.student, num_classes=3).num_classes == 3
            if ":" not in pair.teacher:
                assert pair.teacher_weights is None and load_classifier(pair.teacher, num_classes=3)
            assert {"gkl", "kd", "kd-ls", "dkd", "dist"} == set(pair.methods)


# ---- runs --------------------------------------------------------------------------------------------------------

NUM_CLASSES = 5


def draw(count: int, size: int) -> list[Image.Image]:
    random = np.random.default_rng(size)
    return [Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """CIFAR-like parquet, an image folder with lists, and teachers."""
    folder = tmp_path_factory.mktemp("label_recipes")
    write_cifar(folder / "cifar", {"train": 40, "test": 20}, classes=NUM_CLASSES)
    for split, count in (("train", 20), ("val", 10)):
        for number, image in enumerate(draw(count, 40)):
            path = folder / "images" / split / f"c{number % NUM_CLASSES}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        lines = [
            f"{p.relative_to(folder / 'images')} {p.parent.name[1:]}"
            for p in sorted(folder.glob(f"images/{split}/*/*"))
        ]
        (folder / f"{split}.txt").write_text("\n".join(lines[: 17 if split == "train" else 10]) + "\n")
    torch.manual_seed(0)
    for name in ("resnet8", "timm:resnet10t"):
        state = load_classifier(name, num_classes=NUM_CLASSES).model.state_dict()
        save_file(state, folder / f"{name.removeprefix('timm:')}.safetensors")
    torch.save({"model": state}, folder / "teacher.pth")
    return folder


LABELS_ALONE = ["--pair", "resnet56-resnet20", "--data", "cifar", "--student", "resnet8", "--batch-size", "8"]
CIFAR = [*LABELS_ALONE, "--teacher", "resnet8", "--teacher-weights", "resnet8.safetensors"]
SMALL = ["--teacher", "timm:resnet10t", "--student", "timm:resnet10t", "--batch-size", "4", "--workers", "0"]
SMALL += ["--teacher-weights", "resnet10t.safetensors"]
RUNS = {
    "cifar_kd": [*CIFAR, "--steps", "5", "--imbalance", "2"],
    "imagenet_kd": ["--pair", "resnet34-resnet18", "--data", "images", "--steps", "2", *SMALL]
    + ["--stored-views", "2", "--stored-top-k", "2"],
    "imagenet_lt_kd": [
        "--pair",
        "resnext101-resnet18",
        "--data",
        "train.txt",
        "--eval-data",
        "val.txt",
        "--root",
        "images",
    ]
    + ["--steps", "2", *SMALL],
}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_write_one_run(place, name):
    script = HOUSE / "recipes" / f"{name}.py"
    out = run_script_in_ranks(script, *RUNS[name], "--output-dir", f"run_{name}", folder=place)
    run = place / f"run_{name}"
    there = {"config.json", "results.jsonl", "checkpoints", "model", "report.png", "report.html"}
    assert {p.name for p in run.iterdir()} == there
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    by_model = {record["model"]: record for record in records if "model" in record}
    assert {"acc1", "acc5", "mean_per_class_recall"} <= set(by_model["student"]) and "teacher" in by_model
    assert ("few_acc1" in by_model["student"]) == (name != "imagenet_kd")  # its classes are all alike
    training = [record for record in records if "train/loss" in record][-1]
    assert {"train/ce", "train/distillation", "train/agreement@1"} <= set(training)
    exported = load_classifier(f"local-dir:{run / 'model'}")
    assert exported.num_classes == NUM_CLASSES
    names = {"cifar_kd": [f"class {i}" for i in range(5)], "imagenet_kd": [f"c{i}" for i in range(5)]}
    assert exported.classnames == (tuple(names[name]) if name in names else None)  # a list has none
    assert "Load the student" in out and out.rstrip().endswith(f"Report: run_{name}/report.html")
    page = (run / "report.html").read_text()
    assert ">Loss<" in page and "<bdi>teacher</bdi>" in page and "Student against" not in page


@pytest.fixture
def call(place, monkeypatch, run_script):
    """call(recipe, *flags) -> (exit code, stdout, stderr) in this process."""
    monkeypatch.chdir(place)

    def call(name: str, *flags: str) -> tuple[int, str, str]:
        return run_script(HOUSE / "recipes" / f"{name}.py", *flags)

    return call


@pytest.mark.parametrize("method", ["ce", "kd", "kd-ls", "dkd", "dist", "dkl", "ikl"])
def test_every_method_runs_and_learns_something(call, place, method):
    flags = [*(LABELS_ALONE if method == "ce" else CIFAR), "--steps", "2", "--method", method]
    code, _, error = call("cifar_kd", *flags, "--output-dir", f"method_{method}")
    assert code == 0, error
    before = torch.load(place / "teacher.pth", weights_only=True)["model"]
    after = load_file(place / f"method_{method}" / "model" / "model.safetensors")
    assert before.keys() != after.keys() or any(not torch.equal(before[k], after[k]) for k in after)


def test_a_resumed_run_is_the_one_that_was_never_stopped_bit_for_bit(call, place):
    """Over the border of an epoch, with a class prior that has seen part of one."""
    flags = [*CIFAR, "--epochs", "3", "--eval-every-epochs", "1", "--checkpoint-every-epochs", "1"]
    assert call("cifar_kd", *flags, "--output-dir", "whole")[0] == 0
    checkpoints = sorted((place / "whole" / "checkpoints").iterdir())
    assert [c.name for c in checkpoints] == ["step_00000005", "step_00000010", "step_00000015"]
    want = load_file(place / "whole" / "model" / "model.safetensors")
    records, curves = lines_without_speed(place / "whole" / "results.jsonl"), curves_without_speed(place / "whole")
    assert len(curves) > 5
    code, _, error = call("cifar_kd", *flags, "--output-dir", "whole", "--resume", str(checkpoints[0]))
    assert code == 0, error
    got = load_file(place / "whole" / "model" / "model.safetensors")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    memory = load_file(checkpoints[1] / "memory_0.safetensors")
    assert memory["sums"].sum() > 0 and not torch.allclose(memory["prior"], torch.full_like(memory["prior"], 0.2))
    assert lines_without_speed(place / "whole" / "results.jsonl") == records
    assert curves_without_speed(place / "whole") == curves  # those of the whole run


def curves_without_speed(run: Path) -> list[str]:
    """The charts of report.html, but for that of the speed, which differs between runs."""
    charts = re.findall(r'<figure class="chart">.*?</figure>', (run / "report.html").read_text())
    return [chart for chart in charts if "images per second" not in chart]


def test_a_page_that_cannot_be_made_does_not_lose_the_run(call, place, monkeypatch):
    monkeypatch.setattr("gkl_vl.training.classifiers.make_page", lambda *_: [][0])
    flags = [*LABELS_ALONE, "--method", "ce", "--steps", "1", "--output-dir", "without_page"]
    code, out, error = call("cifar_kd", *flags)
    assert code == 0 and "report.html was not written (IndexError" in error and "Report:" not in out
    assert load_classifier(f"local-dir:{place / 'without_page' / 'model'}").num_classes == NUM_CLASSES


def test_a_test_split_that_lacks_a_class_is_scored_with_the_labels_of_training(call, place):
    """The teacher knows all images, in an order of its own. By place, the images of c2 would be those of c1."""
    colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (180, 180, 40), (30, 30, 30)]
    for split, labels in (("train", range(5)), ("test", (0, 2, 3, 4))):
        for label in labels:
            for number in range(2):
                path = place / "coloured" / split / f"c{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), colours[label]).save(path)
    order = [3, 0, 4, 1, 2]
    pixels = torch.tensor([colours[label] for label in order])[:, :, None, None].expand(5, 3, 32, 32) / 255
    torch.manual_seed(0)
    teacher = load_classifier("resnet8", num_classes=5)
    optimizer = torch.optim.Adam(teacher.model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(teacher.on_pixels()(pixels), torch.arange(5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    names = [f"c{label}" for label in order]
    config = {"library": "gkl-vl", "architecture": "resnet8", "num_classes": 5, "label_names": names}
    (place / "taught").mkdir()
    (place / "taught" / "config.json").write_text(json.dumps(config | {"mean": teacher.mean, "std": teacher.std}))
    save_file(teacher.model.state_dict(), place / "taught" / "model.safetensors")
    flags = ["--pair", "resnet56-resnet20", "--student", "resnet8", "--batch-size", "4", "--steps", "1"]
    flags += ["--data", "coloured", "--teacher", "local-dir:taught", "--output-dir", "lacking"]
    code, _, error = call("cifar_kd", *flags)
    assert code == 0, error
    records = [json.loads(line) for line in (place / "lacking" / "results.jsonl").read_text().splitlines()]
    assert [record["acc1"] for record in records if record.get("model") == "teacher"] == [1.0]
    assert load_classifier(f"local-dir:{place / 'lacking' / 'model'}").classnames == tuple(names)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--pair", "resnet56-resnet2O"], "unknown --pair 'resnet56-resnet2O', did you mean 'resnet56-resnet20'"),
        (["--teacher", "resnet20"], "do not fit 'resnet20'"),
        (["--teacher", "resnet8", "--teacher-weights", "teacher.pth"], "pass --allow-pickle if you trust it"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--stored-views", "2", "--stored-top-k", "0"], "--stored-top-k 0 must be at least 1"),
        (["--stored-views", "-1"], "--stored-views -1 must be at least 0"),
        (["--batch-size", "64"], "40 images do not fill a batch of 64"),
        (["--data", "nowhere/at/all.txt"], "name the other with --eval-data"),
        (["--imbalance", "0.5"], "--imbalance 0.5 must be at least 1"),
        (
            ["--class-prior", "True", "--steps", "5"],
            "--class-prior is collected in an epoch and used in the next, and 5 steps",
        ),
        (["--images", "41"], "41"),
        (["--output-dir", "whole"], "already holds a run: add --resume latest"),
    ],
)
def test_a_mistake_is_one_line(call, place, flags, message):
    (place / "whole").mkdir(exist_ok=True)
    (place / "whole" / "results.jsonl").touch()
    code, _, error = call("cifar_kd", *CIFAR, "--output-dir", "never", *flags)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1, error
    assert not (place / "never").exists()


def test_a_teacher_of_other_classes_and_a_teacher_without_weights_are_refused(call, place):
    save_file(load_classifier("resnet8", num_classes=7).model.state_dict(), place / "seven.safetensors")
    code, _, error = call("cifar_kd", *CIFAR, "--teacher-weights", "seven.safetensors", "--output-dir", "never")
    assert code == 2 and "are for 7 classes, the data has 5" in error
    code, _, error = call("cifar_kd", *LABELS_ALONE, "--output-dir", "never")
    assert code == 2 and "teacher 'resnet56' comes without weights: give --teacher-weights" in error
