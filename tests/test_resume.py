"""A run that was stopped, or killed at the worst moment, goes on as the run that was never stopped, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pairs import good, write_shard

HOUSE = Path(__file__).parents[1]
RECIPE = HOUSE / "recipes" / "clip_kd.py"
# patch_dropout draws from torch's generator at every step: a resume that forgot the RNG would show
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.5,
    },
    "text_cfg": {
        "context_length": 12, "vocab_size": 4096, "hf_tokenizer_name": "gkl-vl/clip-bpe-4096",
        "width": 16, "heads": 2, "layers": 1,
    },
}  # fmt: skip
COMMON = ["--teacher", "none", "--steps", "6", "--warmup", "2", "--batch-size", "8", "--ema-decay", "0.5"]
COMMON += ["--checkpoint-every-steps", "3"]

# The recipe, with a SIGKILL of its own process where a test wants it.
DRIVER = """
import os, runpy, signal, sys
import accelerate
from gkl_vl import checkpoint, objectives

where, recipe = sys.argv[1], sys.argv[2]
sys.argv = sys.argv[2:]
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
calls = {"save": 0, "step": 0}

def counted(name, limit, function, before):
    def wrapped(*args, **kwargs):
        calls[name] += 1
        if before and calls[name] == limit:
            kill()
        result = function(*args, **kwargs)
        if calls[name] == limit:
            kill()
        return result
    return wrapped

if where == "in the middle of a write":  # the second checkpoint has its model, and no loop.json yet
    accelerate.Accelerator.save_state = counted("save", 2, accelerate.Accelerator.save_state, before=False)
if where == "in the middle of a step":
    objectives.image_text_loss = counted("step", 5, objectives.image_text_loss, before=False)
runpy.run_path(recipe, run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "tiny.json").write_text(json.dumps(MODEL))
    write_shard(folder / "0.tar", [good(i) for i in range(20)])
    write_shard(folder / "1.tar", [good(i) for i in range(20, 40)])
    (folder / "driver.py").write_text(DRIVER)
    return folder


def recipe(place: Path, output: str, *flags: str, kill: str = "never") -> subprocess.CompletedProcess:
    command = [sys.executable, place / "driver.py", kill, RECIPE, *COMMON, "--student", place / "tiny.json"]
    command += ["--train-data", f"{place}/{{0..1}}.tar", "--output-dir", place / output, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)


def state(folder: Path) -> dict:
    last = folder / "checkpoints" / "step_00000006"
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {
        "model": load_file(last / "model.safetensors"),
        "ema": load_file(last / "ema.safetensors"),
        "exported": load_file(folder / "model" / "open_clip_model.safetensors"),
        "optimizer": torch.load(last / "optimizer.bin", weights_only=True)["state"],
        "loop": json.loads((last / "loop.json").read_text()),
        "records": [{k: v for k, v in r.items() if k != "train/images_per_second"} for r in records],
    }


def assert_bitwise(got, want, path=""):
    if isinstance(want, dict):
        assert got.keys() == want.keys(), path
        for key in want:
            assert_bitwise(got[key], want[key], f"{path}/{key}")
    elif isinstance(want, torch.Tensor):
        assert torch.equal(got, want), path
    else:
        assert got == want, path


@pytest.fixture(scope="module", params=["0", "2"], ids=["no worker", "two workers"])
def whole(place, request):
    """The run that was never stopped, and its --workers."""
    done = recipe(place, f"whole-{request.param}", "--workers", request.param)
    assert done.returncode == 0, done.stderr
    return state(place / f"whole-{request.param}"), request.param


@pytest.mark.parametrize("moment", ["in the middle of a write", "in the middle of a step"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(place, whole, moment):
    expected, workers = whole
    name = f"{moment}-{workers}".replace(" ", "-")
    done = recipe(place, name, "--workers", workers, kill=moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = sorted(path.name for path in (place / name / "checkpoints").glob("step_*"))
    assert kept == ["step_00000003"]
    done = recipe(place, name, "--workers", workers, "--resume", "latest")
    assert done.returncode == 0, done.stderr
    assert_bitwise(state(place / name), expected)


def test_the_comparison_notices_another_seed(place, whole):
    expected, workers = whole
    done = recipe(place, f"seed-{workers}", "--workers", workers, "--seed", "1")
    assert done.returncode == 0, done.stderr
    with pytest.raises(AssertionError):
        assert_bitwise(state(place / f"seed-{workers}"), expected)


def test_what_cannot_be_resumed_is_one_line_and_harms_nothing(place):
    done = recipe(place, "refusals", "--workers", "0")
    assert done.returncode == 0, done.stderr
    before = state(place / "refusals")
    for flags, message in [
        ([], "already holds a run: add --resume latest"),
        (["--resume", "latest", "--lr", "0.5"], "--lr 0.5 (was None): use the same flags"),
        (["--resume", "nowhere"], "--resume 'nowhere' is not a checkpoint folder"),
    ]:
        done = recipe(place, "refusals", "--workers", "0", *flags)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    loop = place / "refusals" / "checkpoints" / "step_00000006" / "loop.json"
    loop.write_text(json.dumps(before["loop"] | {"positions": before["loop"]["positions"] * 2}))
    done = recipe(place, "refusals", "--workers", "0", "--resume", "latest")
    assert done.returncode == 2 and "was written by 2 processes, now there are 1" in done.stderr
    loop.write_text(json.dumps(before["loop"]))
    assert_bitwise(state(place / "refusals"), before)


def test_a_place_that_cannot_be_written_is_refused_before_training(place):
    (place / "a-file").write_text("")
    done = recipe(place, "a-file/run", "--workers", "0")
    assert done.returncode == 2 and "cannot be made" in done.stderr and "name another" in done.stderr
