"""Helpers of several test files: running a function in several processes, comparing results files."""

import json
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path

TIMEOUT_SECONDS = 120.0

# Every rank is a fresh process, forked from a single-threaded server that has imported the slow modules once.
# `spawn` would import torch in each process; a pool would keep state between tests.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.nn",
        "torch._dynamo",
        "accelerate",
        "open_clip",
        "pytest",
        "hypothesis",
        "beartype",
    ]
)
GRACE_SECONDS = 0.5  # wait for the tracebacks of other ranks after the first failure


class RankFailed(AssertionError):
    """A process raised, exited or timed out; the message contains its traceback."""


def run_ranks(function: Callable, world_size: int, *args, timeout_seconds: float = TIMEOUT_SECONDS) -> list:
    """Returns `[function(rank, world_size, *args) for each rank]`, each run in a process of one gloo group.

    `function` must be defined at module level of a test file; its arguments and result are pickled (detach tensors).
    Shapes of gkl_vl are checked in the processes too. Raises: RankFailed with the tracebacks.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = pickle.dumps((function, args))
        pairs = [PROCESSES.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            PROCESSES.Process(
                target=rank_main,
                args=(rank, world_size, Path(folder, "rendezvous"), task, sys.path, dict(os.environ), sender),
            )
            for rank, (_, sender) in enumerate(pairs)
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


def rank_main(rank, world_size, rendezvous, task, path, environment, sender) -> None:
    try:
        sys.path[:] = path
        os.environ.clear()
        os.environ |= environment | rank_environment(rank, world_size)
        message = pickle.dumps((True, in_group(rank, world_size, rendezvous, task)))
    except BaseException:
        message = pickle.dumps((False, f"raised\n{traceback.format_exc()}"))
    sender.send_bytes(message)


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


def in_group(rank: int, world_size: int, rendezvous: Path, task: bytes):
    import torch
    from jaxtyping import install_import_hook
    from torch import distributed

    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    install_import_hook("gkl_vl", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
    function, args = pickle.loads(task)  # imports the test file, and with it gkl_vl
    distributed.init_process_group(
        "gloo",
        init_method=rendezvous.as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    result = function(rank, world_size, *args)
    distributed.destroy_process_group()
    return result


def lines_without_speed(results: Path) -> list[dict]:
    """The records of results.jsonl without speeds, which differ between runs."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    return [{key: value for key, value in record.items() if "per_second" not in key} for record in records]
