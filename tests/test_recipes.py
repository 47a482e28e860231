"""The documented commands run, and every mistake at a flag ends in one line and exit code 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_pairs import good, write_shard

from gkl_vl.hub import ModelCard, export_clip
from gkl_vl.towers import load_clip

HOUSE = Path(__file__).parents[1]
RECIPE = HOUSE / "recipes" / "clip_kd.py"
# As accelerate_configs/cpu.yaml says: two processes on CPUs are torchrun's, and Accelerate has to be told.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def python(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher of another size of embedding, and a shard."""
    folder = tmp_path_factory.mktemp("recipes")
    write_shard(folder / "pairs.tar", [good(i) for i in range(24)])
    config = {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 48, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    }
    text = {"context_length": 24, "vocab_size": 4096, "hf_tokenizer_name": "gkl-vl/clip-bpe-4096"}
    config["text_cfg"] = text | {"width": 16, "heads": 2, "layers": 1}
    (folder / "tiny.json").write_text(json.dumps(config))
    card = ModelCard(
        student="tiny", teacher=None, license="mit", datasets=[], command="none", commit=None, steps=0, seed=0
    )
    export_clip(clip=load_clip(str(folder / "tiny.json")), folder=folder / "teacher", card=card, transformers=False)
    return folder


@pytest.fixture(scope="module")
def run(place) -> Path:
    """Two steps with every term on, by two processes."""
    flags = ["--teacher", f"local-dir:{place}/teacher", "--train-data", place / "pairs.tar", "--steps", "2"]
    flags += ["--batch_size", "4", "--mimicry_weight", "10", "--gamma", "0.5", "--workers", "0", "--output-dir", "run"]
    flags += ["--train-data", f"{place}/pairs.tar::{place}/pairs.tar"]
    done = python("-m", "torch.distributed.run", "--nproc_per_node", "2", RECIPE, *flags, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "create_model_and_transforms" in done.stdout and "student emoji-student" in done.stdout
    return place / "run"


def test_two_processes_write_one_run(run):
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "results.jsonl", "checkpoints", "model", "report.png"}
    (record,) = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert record["step"] == 2
    terms = {"loss", "contrastive", "soft_ce", "wmse", "mimicry", "agreement@1", "grad_norm", "lr", "skipped"}
    assert {f"train/{name}" for name in terms} <= set(record)
    loop = json.loads((run / "checkpoints" / "step_00000002" / "loop.json").read_text())
    assert len(loop["positions"]) == 2
    config = json.loads((run / "config.json").read_text())
    assert config["gamma"] == 0.5 and config["command"].startswith("accelerate launch")


def test_the_exported_student_needs_nothing_of_this_project(run):
    script = """
import sys, open_clip, torch
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:model")
tokens = open_clip.get_tokenizer("local-dir:model")(["a cat"])
assert model.encode_text(tokens).shape == (1, 128) and not any(name.startswith("gkl_vl") for name in sys.modules)
"""
    done = python("-c", script, cwd=run)
    assert done.returncode == 0, done.stderr


def test_plain_accelerate_launch_runs_on_the_bundled_data(place):
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", RECIPE]
    flags = ["--teacher", "none", "--steps", "2", "--batch-size", "8", "--workers", "0", "--output-dir", "bundled"]
    done = python(*launch, *flags, cwd=place)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (place / "bundled" / "results.jsonl").read_text().splitlines()]
    evaluated = {record["dataset"]: record for record in records if "model" in record}
    assert set(evaluated) == {"emoji", "emoji_unseen"}
    assert {"acc1", "acc5", "mean_per_class_recall", "image_retrieval_recall@1"} <= set(evaluated["emoji"])
    assert "emoji  acc1" in done.stdout and "report.png" in done.stdout


def test_help_explains_at_most_thirty_flags(place):
    done = python(RECIPE, "--help", cwd=place)
    assert done.returncode == 0
    flags = re.findall(r"^│\s+(?:-h, )?(--[a-z0-9-]+)", done.stdout, flags=re.MULTILINE) or re.findall(
        r"(?<!\S)(--[a-z][a-z0-9-]+)(?= )", done.stdout
    )
    listed = set(flags) - {"--help"}
    assert {"--teacher", "--student", "--train-data", "--gamma", "--resume"} <= listed
    config = (HOUSE / "recipes" / "clip_kd.py").read_text()
    body = config[config.index("class Config:") : config.index("\ndef main(")]
    fields = re.findall(r"^    ([a-z_0-9]+): .*\n    \"\"\"", body, flags=re.MULTILINE)
    every = re.findall(r"^    ([a-z_0-9]+): ", body, flags=re.MULTILINE)
    assert fields == every and len(fields) <= 30  # each has its explanation


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--bath-size", "4"], "--batch-size"),
        (["--student", "ViT-Q"], "unknown model 'ViT-Q'"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--steps", "3", "--epochs", "2"], "--steps 3 and --epochs 2 say the same twice"),
        (["--epochs", "2", "--train-data", "{place}/pairs.tar"], "--epochs needs the size of"),
        (["--train-data", "{place}/pairs.tar"], "--train-data needs --steps or --epochs"),
        (["--train-data", "{place}/missing.tar", "--steps", "1"], "does not exist"),
        (["--push-to-hub", "nobody"], "has no owner: write org/name"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(place, flags, message):
    flags = [flag.format(place=place) for flag in flags]
    done = python(RECIPE, "--teacher", "none", *flags, "--workers", "0", cwd=place)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_nothing_to_resume_is_one_line_and_code_2(tmp_path):
    done = python(RECIPE, "--teacher", "none", "--resume", "latest", cwd=tmp_path)
    assert done.returncode == 2 and "there is no runs/clip_kd-* folder here" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_debug_shows_where(place):
    done = python(RECIPE, "--teacher", "none", "--student", "ViT-Q", "--debug", cwd=place)
    assert done.returncode == 2 and "Traceback" in done.stderr
