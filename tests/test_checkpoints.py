"""A damaged or foreign checkpoint is never resumed from, and a run that is requested to stop leaves a whole one."""

import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from helpers import run_ranks
from test_engine import Loader, net, run_fit

from gkl_vl.errors import Stopped, UserError
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.engine import FitConfig, moving_average
from gkl_vl.training.stopping import StopRequest

CONFIG = FitConfig(steps=4, checkpoint_every_steps=2, log_every_steps=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text('{"run_id": "mine"}')
    run_fit(folder, config=CONFIG)
    return folder


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def of_another_step(file: Path) -> None:
    shutil.copy(file.parents[1] / "step_00000002" / file.name, file)


def with_manifest(**changes):
    def change(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("model.safetensors", flip_a_bit, "has a damaged model.safetensors"),
        ("model.safetensors", of_another_step, "has a damaged model.safetensors"),
        ("optimizer.bin", lambda file: file.write_bytes(file.read_bytes()[:-1]), "has a damaged optimizer.bin"),
        ("random_states_0.pkl", Path.unlink, "lacks random_states_0.pkl"),
        (
            "memory_1.safetensors",
            lambda file: file.write_bytes(b""),
            "holds memory_1.safetensors, which is not its own",
        ),
        ("loop.json", lambda file: file.write_text("[]"), "has a damaged loop.json"),
        ("loop.json", with_manifest(files=None), "has no checksums in loop.json"),
        ("loop.json", with_manifest(run_id="other"), "is of another run than its folder"),
    ],
)
def test_a_damaged_checkpoint_is_left_out_and_refused_by_name(trained, tmp_path, capsys, name, damage, words):
    shutil.copytree(trained, tmp_path / "run")
    run = RunFolder(tmp_path / "run", is_main=True)
    newest = run.find_checkpoint("latest")
    assert newest.name == "step_00000004"
    damage(newest / name)
    assert run.find_checkpoint("latest").name == "step_00000002"
    assert f"step_00000004' {words}: it is left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"step_00000004' {words}: resume from another"):
        run.find_checkpoint(str(newest))
    shutil.rmtree(run.checkpoints / "step_00000002")
    with pytest.raises(UserError, match="holds no whole checkpoint: start in another"):
        run.find_checkpoint("latest")


def test_a_requested_stop_saves_and_the_resumed_run_equals_the_whole(trained, tmp_path):
    calls = iter([False, False, True])
    with pytest.raises(
        Stopped, match=r"with a checkpoint at step 3 of 4 in .*: continue with --output-dir .* --resume"
    ):
        run_fit(tmp_path, config=CONFIG, stop=lambda: next(calls))
    last = RunFolder(tmp_path, is_main=True).find_checkpoint("latest")
    assert last.name == "step_00000003"
    run_fit(tmp_path, config=CONFIG, checkpoint=last)
    weights = [folder / "checkpoints" / "step_00000004" / "model.safetensors" for folder in (tmp_path, trained)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_stop_at_the_last_step_ends_the_run_as_usual(tmp_path):
    calls = iter([False, False, False, True])
    run_fit(tmp_path, config=CONFIG, stop=lambda: next(calls))


SETTINGS = list(itertools.product([0.0, 0.5], [1, 2], ["no", "bf16"]))


def resume_each_setting(rank, world_size, folder):
    """Whether each of SETTINGS (decay of the average, batches per update, precision) resumes bit for bit."""
    equal = []
    for number, (decay, accum_steps, precision) in enumerate(SETTINGS):
        config = FitConfig(steps=3, checkpoint_every_steps=2, accum_steps=accum_steps)
        checkpoint, results = None, []
        for name in ("whole", "resumed"):
            PartialState._reset_state()
            AcceleratorState._reset_state()
            model = net()
            _, result, run = run_fit(
                Path(folder) / f"{number}-{name}",
                model=model,
                accelerator=Accelerator(cpu=True, mixed_precision=precision),
                make_loader=lambda position: Loader(position, slice(2 * rank, 2 * rank + 2)),
                config=config,
                average=moving_average(model, decay),
                is_main=rank == 0,
                checkpoint=checkpoint,
            )
            checkpoint = run.checkpoints / "step_00000002"
            results.append({name: tensor.clone() for name, tensor in result.state_dict().items()})
        equal.append(all(torch.equal(results[0][name], results[1][name]) for name in results[0]))
    return equal


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_setting_resumes_bit_for_bit(tmp_path, world_size):
    for equal in run_ranks(resume_each_setting, world_size, str(tmp_path)):
        assert dict(zip(SETTINGS, equal, strict=True)) == dict.fromkeys(SETTINGS, True)


def stop_on_rank_1(rank, world_size, folder):
    try:
        run_fit(
            Path(folder) / str(rank),
            accelerator=Accelerator(cpu=True),
            make_loader=lambda position: Loader(position, slice(2 * rank, 2 * rank + 2)),
            config=CONFIG,
            stop=lambda: rank == 1,
        )
    except Stopped as stopped:
        return str(stopped)


def test_all_ranks_stop_at_the_same_step(tmp_path):
    assert all("at step 1 of 4" in text for text in run_ranks(stop_on_rank_1, 2, str(tmp_path)))


def test_signals_and_the_time_limit_are_requests():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            stop = StopRequest(minutes=60)
            stop.listen()
            assert not stop()
            for _ in range(2):  # a launcher passes on what its own trainer has received already
                os.kill(os.getpid(), number)
                assert stop()
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)
    assert StopRequest(minutes=0)()


LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), flush=True)
child.wait()
"""
TRAINER = """
import os, time
from gkl_vl.training.stopping import end_with_launcher
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at the end of a parent is Linux's")
def test_a_trainer_ends_with_its_launcher():
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, TRAINER], env=environment, stdout=subprocess.PIPE, text=True
    )
    with launcher:
        trainer = os.pidfd_open(int(launcher.stdout.readline()))
        launcher.kill()
        launcher.wait()
    assert select.select([trainer], [], [], 20)[0]  # readable when the process has ended
    os.close(trainer)
