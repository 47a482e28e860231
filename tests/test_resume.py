"""A run that was stopped, or killed at the worst moment, goes on as the run that was never stopped, bit for bit."""

import errno
import json
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import test_recipes
import torch
from accelerate import Accelerator
from helpers import RankFailed, Script, run_apart
from safetensors.torch import load_file
from test_pairs import good, write_shard

from gkl_vl.objectives import clip as objectives

HOUSE = Path(__file__).parents[1]
RECIPE = HOUSE / "recipes" / "clip_kd.py"
call = test_recipes.call  # the fixture
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


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "step_00000006/optimizer.bin")


def after(call: int, function: Callable, action: Callable[[], None]) -> Callable:
    """`function`, with `action` at the end of its so-many-th call."""
    calls = count(1)

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(calls) == call:
            action()
        return result

    return wrapped


def run_and_stop(script: Script, at: str) -> tuple[int, str, str]:
    """Runs the recipe, with a SIGKILL of its own process, or a full disk, where a test wants it."""
    if at == "in the middle of a write":  # the second checkpoint has its model, and no loop.json yet
        Accelerator.save_state = after(2, Accelerator.save_state, kill)
    if at == "on a full disk":
        Accelerator.save_state = after(2, Accelerator.save_state, full_disk)
    if at == "in the middle of a step":
        objectives.image_text_loss = after(5, objectives.image_text_loss, kill)
    return script.run()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "tiny.json").write_text(json.dumps(MODEL))
    write_shard(folder / "0.tar", [good(i) for i in range(20)])
    write_shard(folder / "1.tar", [good(i) for i in range(20, 40)])
    return folder


def flags_of(place: Path, output: str, *flags: str) -> list[str]:
    own = ["--student", f"{place}/tiny.json", "--train-data", f"{place}/{{0..1}}.tar"]
    return [*COMMON, *own, "--output-dir", f"{place}/{output}", *flags]


def recipe(place: Path, output: str, *flags: str, at: str = "never") -> tuple[int, str]:
    """Exit code and stderr of the recipe in a process of its own."""
    code, _, error = run_apart(run_and_stop, Script(RECIPE, flags_of(place, output, *flags), place), at)
    return code, error


def state(folder: Path) -> dict:
    last = folder / "checkpoints" / "step_00000006"
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {
        "model": load_file(last / "model.safetensors"),
        "ema": load_file(last / "ema.safetensors"),
        "exported": load_file(folder / "model" / "open_clip_model.safetensors"),
        "optimizer": torch.load(last / "optimizer.bin", weights_only=True)["state"],
        "positions": json.loads((last / "loop.json").read_text())["positions"],
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


@pytest.fixture(scope="module")
def whole(place):
    """whole(workers): the run that was never stopped."""
    states = {}

    def whole(workers: str) -> dict:
        if workers not in states:
            code, error = recipe(place, f"whole-{workers}", "--workers", workers)
            assert code == 0, error
            states[workers] = state(place / f"whole-{workers}")
        return states[workers]

    return whole


def names_of_checkpoints(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob(pattern))


@pytest.mark.parametrize(
    "moment, workers",
    [
        ("in the middle of a write", "0"),
        ("in the middle of a step", "0"),
        ("in the middle of a step", "1"),
        ("on a full disk", "0"),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(place, whole, moment, workers):
    name = f"{moment}-{workers}".replace(" ", "-")
    if moment == "on a full disk":
        code, error = recipe(place, name, "--workers", workers, at=moment)
        assert code == 2 and "no space left on the disk at step_00000006/optimizer.bin" in error
        assert len(error.strip().splitlines()) == 1
    else:
        with pytest.raises(RankFailed, match="exited without a result"):
            recipe(place, name, "--workers", workers, at=moment)
    assert names_of_checkpoints(place / name, "step_*") == ["step_00000003"]
    assert (moment == "in the middle of a step") == (not names_of_checkpoints(place / name, "writing_*"))
    code, error = recipe(place, name, "--workers", workers, "--resume", "latest")
    assert code == 0, error
    assert_bitwise(state(place / name), whole(workers))
    assert names_of_checkpoints(place / name, "*") == ["step_00000003", "step_00000006"]


def test_the_comparison_notices_another_seed(place, whole):
    code, error = recipe(place, "seed", "--workers", "0", "--seed", "1")
    assert code == 0, error
    with pytest.raises(AssertionError):
        assert_bitwise(state(place / "seed"), whole("0"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "already holds a run: add --resume latest"),
        (["--resume", "latest", "--lr", "0.5"], "--lr 0.5 (was None): use the same flags"),
        (["--resume", "nowhere"], "--resume 'nowhere' is not a checkpoint folder"),
    ],
)
def test_what_cannot_be_resumed_is_one_line_and_harms_nothing(place, whole, call, flags, message):
    before = whole("0")
    code, _, told = call(*flags_of(place, "whole-0", "--workers", "0", *flags))
    assert code == 2 and message in told and len(told.strip().splitlines()) == 1
    assert_bitwise(state(place / "whole-0"), before)


def test_a_run_without_a_checkpoint_cannot_be_resumed(place, whole, call, tmp_path):
    whole("0")
    (tmp_path / "config.json").write_bytes((place / "whole-0" / "config.json").read_bytes())
    code, _, told = call(*flags_of(place, "whole-0", "--workers", "0", "--resume", "latest"), "--output-dir", tmp_path)
    assert code == 2 and "holds no whole checkpoint: start in another --output-dir" in told


def test_a_place_that_cannot_be_written_is_refused_before_training(place, call):
    (place / "a-file").write_text("")
    code, _, told = call(*flags_of(place, "a-file/run", "--workers", "0"))
    assert code == 2 and "a-file' is a file: name another" in told and "cannot be made" in told
