"""Helpers of several test files: running a function in several processes, comparing results files."""

import io
import json
import os
import pickle
import random
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing import connection, get_context, set_start_method
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

TIMEOUT_SECONDS = 120.0
GRACE_SECONDS = 0.5  # wait for the tracebacks of other ranks after the first failure


class RankFailed(AssertionError):
    """A process raised, exited or timed out; the message contains its traceback."""


@cache
def processes() -> ForkServerContext:
    """Every rank is a fresh process, forked from a server that has imported the slow modules once.

    `spawn` would import them in each process; a pool would keep state between tests.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    # Before Python 3.13 the server does not get this process's sys.path.
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with patch.dict(os.environ, PYTHONPATH=path):
        ensure_running()
    return context


def run_ranks(function: Callable, world_size: int, *args, timeout_seconds: float = TIMEOUT_SECONDS) -> list:
    """Returns `[function(rank, world_size, *args) for each rank]`, each run in a process of one gloo group.

    `function` must be defined at module level of a test file; its arguments and result are pickled (detach tensors).
    Shapes of gkl_vl are checked in the processes too. Raises: RankFailed with the tracebacks.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = Path(folder, "rendezvous")
        tasks = [pickle.dumps((rank, world_size, rendezvous, function, args)) for rank in range(world_size)]
        environments = [os.environ | rank_environment(rank, world_size) for rank in range(world_size)]
        return run_processes(in_group, tasks, environments, timeout_seconds)


def run_processes(main: Callable, tasks: list[bytes], environments: list[dict], timeout_seconds: float) -> list:
    """Returns `[main(task) for each task]`, each run in a fresh process with an environment of its own."""
    pairs = [processes().Pipe(duplex=False) for _ in tasks]
    ranks = [
        processes().Process(target=rank_main, args=(main, task, sys.path, environment, sender))
        for task, environment, (_, sender) in zip(tasks, environments, pairs, strict=True)
    ]
    try:
        for process, (_, sender) in zip(ranks, pairs, strict=True):
            process.start()
            sender.close()  # the child's end: if the child exits, the receiver raises EOFError
        return collect([receiver for receiver, _ in pairs], timeout_seconds)
    finally:
        for process in ranks:
            process.kill()
            process.join()
            process.close()
        for receiver, _ in pairs:
            receiver.close()


def collect(receivers: list[connection.Connection], timeout_seconds: float) -> list:
    rank_of = {receiver: rank for rank, receiver in enumerate(receivers)}
    results, failures = {}, []
    deadline = time.monotonic() + timeout_seconds
    while rank_of:
        ready = connection.wait(list(rank_of), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for receiver in ready:
            rank = rank_of.pop(receiver)
            succeeded, result = receive(receiver)
            if succeeded:
                results[rank] = result
                continue
            if not failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            failures.append(f"rank {rank} of {len(receivers)} {result}")
    if rank_of and not failures:
        failures = [f"ranks {list(rank_of.values())} did not finish within {timeout_seconds:g} s"]
    if failures:
        raise RankFailed("\n".join(failures))
    return [results[rank] for rank in range(len(receivers))]


def receive(receiver: connection.Connection) -> tuple[bool, object]:
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return False, "exited without a result"


def rank_main(main: Callable, task: bytes, path: list[str], environment: dict[str, str], sender) -> None:
    try:
        sys.path[:] = path
        os.environ.clear()
        os.environ |= environment
        set_up()
        message = pickle.dumps((True, main(task)))
    except BaseException:
        message = pickle.dumps((False, f"raised\n{traceback.format_exc()}"))
    sender.send_bytes(message)


def set_up() -> None:
    """In a fresh process: checked shapes, one thread, fixed seeds."""
    import preload  # noqa: F401  # in the server already, with it the checks of shapes
    import torch

    set_start_method(None, force=True)  # the platform's own for the processes that this one starts, as in a script
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)


def rank_environment(rank: int, world_size: int) -> dict[str, str]:
    """The variables that torchrun sets, which Accelerate reads; gloo uses the loopback interface."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }


def in_group(task: bytes):
    from torch import distributed

    rank, world_size, rendezvous, function, args = pickle.loads(task)  # imports the test file
    distributed.init_process_group(
        "gloo",
        init_method=rendezvous.as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    distributed.barrier()  # a rank that returns at once would close connections that others are still making
    result = function(rank, world_size, *args)
    if distributed.is_initialized():  # a script has left the group itself
        distributed.destroy_process_group()
    return result


def run_apart(function: Callable, *args):
    """Returns `function(*args)`, run in a fresh process that no launcher started. Raises: RankFailed as run_ranks."""
    (result,) = run_processes(call_pickled, [pickle.dumps((function, args))], [dict(os.environ)], TIMEOUT_SECONDS)
    return result


def call_pickled(task: bytes):
    function, args = pickle.loads(task)
    return function(*args)


@dataclass(frozen=True)
class Script:
    """A call of a script, as by `python path *flags` in `folder`."""

    path: Path
    flags: list[str]
    folder: Path

    def run(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        os.chdir(self.folder)
        sys.argv = [str(self.path), *self.flags]
        out, error = io.StringIO(), io.StringIO()
        code = 0
        with redirect_stdout(out), redirect_stderr(error):
            try:
                runpy.run_path(str(self.path), run_name="__main__")
            except SystemExit as stop:
                code = stop.code
        return code or 0, out.getvalue(), error.getvalue()


def script_in_rank(rank: int, world_size: int, script: Script) -> tuple[int, str, str]:
    return script.run()


def start_script(script: Script, report: Path) -> BaseProcess:
    """Starts a script in a process of its own; at its end it writes `[exit code, stdout, stderr]` to `report`."""
    process = processes().Process(target=report_on, args=(script, report))
    process.start()
    return process


def report_on(script: Script, report: Path) -> None:
    set_up()
    outcome = script.run()
    report.write_text(json.dumps(outcome))
    sys.exit(outcome[0])


def run_script_in_ranks(path: Path, *flags: object, folder: Path, world_size: int = 2) -> str:
    """Runs a script as torchrun does, without the seconds in which each process imports torch. Returns its stdout."""
    results = run_ranks(script_in_rank, world_size, Script(path, [str(flag) for flag in flags], folder))
    assert [code for code, _, _ in results] == [0] * world_size, results
    return "".join(out for _, out, _ in results)


def lines_without_speed(results: Path) -> list[dict]:
    """The records of results.jsonl without speeds, which differ between runs."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    return [{key: value for key, value in record.items() if "per_second" not in key} for record in records]
