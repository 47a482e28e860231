"""CLIP_benchmark's command line and ours give the same metrics, key by key, for the same model and data."""

import csv
import io
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_sets import colour_set, write_set

from gkl_vl.atomic import nan_for_null
from gkl_vl.evaluation.sets import ASSETS
from gkl_vl.models.clip import load_clip
from gkl_vl.models.pretrained import BUNDLED_TOKENIZER, BUNDLED_TOKENIZER_NAME

pytest.importorskip("clip_benchmark")
pytestmark = pytest.mark.usefixtures("one_thread")

EVAL = Path(__file__).parents[1] / "eval"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TEMPLATES = ["a photo of a {c}.", "a blurry photo of the {c}.", "{c}"]
FORMATS = ["png", "webp", "jpg", "jpeg"]

# Folder names of models and sets. Random weights cannot separate the bundled set's 1,658 classes: only the teacher is
# evaluated on it.
MODELS = ["teacher", "vit", "convnet"]
TASKS = {
    "zeroshot_classification": ["emoji", "like_cifar", "three_classes", "multilabel"],
    "zeroshot_retrieval": ["emoji_captions", "like_coco"],
}
CASES = [
    (task, dataset, model)
    for task, sets in TASKS.items()
    for dataset in sets
    for model in (["teacher"] if dataset.startswith("emoji") else MODELS)
]
SCRIPTS = {"zeroshot_classification": "zero_shot", "zeroshot_retrieval": "retrieval"}

# CLIP_benchmark averages hits in float32; metrics that it averages in double must agree to the last bits.
EXACT, FLOAT32 = 1e-12, 1e-6
TOLERANCE = {"acc1": EXACT, "acc5": EXACT, "mean_per_class_recall": EXACT}


class Results(NamedTuple):
    folder: Path
    theirs: dict[tuple[str, str, str], dict]
    """CLIP_benchmark's results by (task, dataset, model)."""


# ---- models and sets ---------------------------------------------------------------------------------------------


def random_clip(folder: Path, vision: dict, preprocess: dict) -> None:
    """A small CLIP with random weights in open_clip's format."""
    tokens = dict(context_length=24, vocab_size=4096, hf_tokenizer_name=BUNDLED_TOKENIZER_NAME)
    text = dict(**tokens, width=32, heads=2, layers=1)
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir()
    named = folder.parent / f"random-{folder.name}.json"
    named.write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(load_clip(str(named)).towers.model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    for file in BUNDLED_TOKENIZER.glob("*.json"):
        shutil.copy(file, folder)


def write_models(folder: Path) -> None:
    shutil.copytree(ASSETS / "teacher", folder / "teacher")
    random_clip(folder / "vit", dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8), {})
    random_clip(
        folder / "convnet",
        dict(image_size=64, timm_model_name="test_efficientnet", timm_pool="avg", timm_proj="linear"),
        dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3], interpolation="bilinear", resize_mode="squash"),
    )


def drawn(draw: np.random.Generator, ending: str, width: int, height: int) -> bytes:
    """Encodes a random colour with patches of other colours: images that a model with random weights separates."""
    patches = draw.integers(0, 256, (1, 1, 3)) + draw.integers(-90, 91, (4, 4, 3))
    image = Image.fromarray(patches.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, {"jpg": "jpeg"}.get(ending, ending))
    return file.getvalue()


def sharded(samples: list[dict[str, bytes]], shards: int) -> list[list[tuple[str, dict[str, bytes]]]]:
    named = [(f"s{index:07d}", members) for index, members in enumerate(samples)]
    size = -(-len(named) // shards)
    return [named[start : start + size] for start in range(0, len(named), size)]


def write_like_cifar(root: Path, draw: np.random.Generator) -> None:
    """32 px, ten classes of which one has no image, mixed formats, three shards."""
    samples = []
    for index in range(75):
        ending, label = FORMATS[index % 4], int(draw.integers(9))
        samples.append({ending: drawn(draw, ending, 32, 32), "cls": str(label).encode()})
    write_set(root, sharded(samples, 3), classnames=CLASSES, zeroshot_classification_templates=TEMPLATES)


def write_multilabel(root: Path, draw: np.random.Generator) -> None:
    """Any number of labels per image, in float32 as CLIP_benchmark's VOC 2007. One class has no image."""
    samples = []
    for _ in range(75):
        labels = (draw.random(10) < 0.3).astype(np.float32)
        labels[9] = 0
        npy = io.BytesIO()
        np.save(npy, labels)
        samples.append({"png": drawn(draw, "png", 48, 32), "npy": npy.getvalue()})
    lines = dict(classnames=CLASSES, zeroshot_classification_templates=TEMPLATES, dataset_type=["multilabel"])
    write_set(root, sharded(samples, 2), **lines)


def write_like_coco(root: Path, draw: np.random.Generator) -> None:
    """One to five captions per image; images are not square."""
    samples = []
    for index in range(83):
        words = [[CLASSES[c] for c in draw.integers(10, size=4)] for _ in range(1 + index % 5)]
        captions = "\n".join(f"{a} {index} near the {b}, a {c} and a {d}" for a, b, c, d in words)
        samples.append({"jpg": drawn(draw, "jpg", 40, 30), "txt": captions.encode()})
    write_set(root, sharded(samples, 2), dataset_type=["retrieval"])


def write_emoji(root: Path) -> None:
    """One unchanged shard of the bundled set."""
    shutil.copytree(ASSETS / "emoji", root, ignore=lambda _, names: {"train", "1.tar"} & set(names))
    (root / "test" / "nshards.txt").write_text("1\n")


def write_sets(folder: Path) -> None:
    draw = np.random.default_rng(0)
    write_like_cifar(folder / "like_cifar", draw)
    write_multilabel(folder / "multilabel", draw)
    write_like_coco(folder / "like_coco", draw)
    colour_set(folder / "three_classes", ["red", "green", "blue", "red", "blue"])
    write_emoji(folder / "emoji")
    write_emoji(folder / "emoji_captions")
    (folder / "emoji_captions" / "dataset_type.txt").write_text("retrieval\n")  # else it reads labels


# ---- the two command lines ---------------------------------------------------------------------------------------


def clip_benchmark(folder: Path, *flags: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clip_benchmark.cli", *flags],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """CLIP_benchmark on all cases, in one process per task, because each imports torch anew."""
    folder = tmp_path_factory.mktemp("beside_clip_benchmark")
    write_models(folder)
    write_sets(folder / "sets")
    names = [f"local-dir:{model}" for model in MODELS]
    for task, sets in TASKS.items():
        data = ["--dataset", *(f"wds/{name}" for name in sets), "--dataset_root", "sets/{dataset}"]
        model = ["--model", *names, "--pretrained", "none"]
        cost = ["--batch_size", "64", "--no_amp", "--num_workers", "0", "--quiet"]
        output = ["--recall_k", "1", "5", "10", "--output", "{task}-{dataset}-{model}.json"]
        clip_benchmark(folder, "eval", "--task", task, *data, *model, *cost, *output)
    theirs = {
        (task, dataset, model): json.loads((folder / f"{task}-{dataset}-local-dir:{model}.json").read_text())
        for task, dataset, model in CASES
    }
    return Results(folder, theirs)


@pytest.fixture
def ours(results, monkeypatch, capsys):
    """ours(task, dataset, model, output) -> the result of our script, also on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(results.folder)

    def ours(task: str, dataset: str, model: str, output: Path) -> dict:
        flags = ["--model", f"local-dir:{model}", "--dataset", f"wds/{dataset}", "--dataset_root", "sets/{dataset}"]
        flags += ["--batch_size", "64", "--num_workers", "0", "--output", str(output)]
        flags += ["--recall_k", "1", "5", "10"] if task == "zeroshot_retrieval" else []
        script = EVAL / f"{SCRIPTS[task]}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *flags])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            pytest.fail(f"{script.name} ended with code {stop.code}: {capsys.readouterr().err}")
        return json.loads(output.read_text())

    return ours


# ---- the tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "dataset", "model"), CASES)
def test_every_metric_is_clip_benchmarks(results, ours, tmp_path, task, dataset, model):
    theirs = results.theirs[task, dataset, model]
    own = ours(task, dataset, model, tmp_path / "ours.json")
    assert own["metrics"].keys() == theirs["metrics"].keys()
    for key, value in theirs["metrics"].items():
        expected = pytest.approx(value, rel=0, abs=TOLERANCE.get(key, FLOAT32), nan_ok=True)
        assert nan_for_null(own["metrics"][key]) == expected, key
    # A folder includes its weights: our `pretrained` is empty, where CLIP_benchmark requires a value.
    same = theirs.keys() - {"metrics", "pretrained"}
    assert {key: own[key] for key in same} == {key: theirs[key] for key in same}


def test_the_cases_cover_values_that_could_differ(results):
    """Every key has two or more values between 0 and 1, and acc5 is undefined somewhere: equal zeros prove little."""
    values = defaultdict(list)
    for result in results.theirs.values():
        for key, value in result["metrics"].items():
            values[key].append(value)
    assert len(values) == 10 and sum(map(math.isnan, values["acc5"])) == len(MODELS)
    for key, shares in values.items():
        assert len({share for share in shares if 0 < share < 1}) >= 2, key


def test_clip_benchmark_builds_one_table_of_both(results, ours, tmp_path):
    task, dataset, model = "zeroshot_classification", "like_cifar", "teacher"
    own = ours(task, dataset, model, tmp_path / "ours.json")
    theirs = results.folder / f"{task}-{dataset}-local-dir:{model}.json"
    clip_benchmark(tmp_path, "build", "ours.json", str(theirs), "--output", "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    for key, value in own["metrics"].items():
        assert float(first[key]) == value and float(second[key]) == pytest.approx(value, rel=0, abs=EXACT)
    assert first["dataset"] == second["dataset"] == f"wds/{dataset}"
    assert first["model_fullname"].strip() == f"local-dir:{model}"
