"""Data loader workers: they end with the process that started them, and their deaths are one-line errors."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import parent_process
from typing import Any

from torch.utils.data import DataLoader

from gkl_vl.errors import UserError, first_line


def end_with_parent(worker: int) -> None:
    """For DataLoader's `worker_init_fn`: exits this process when its parent has ended, however busy it is.

    DataLoader's own check runs only between two batches, so that a worker that never finishes one would stay. Signals
    that a cluster sends to all processes are left to the parent, which may want further batches for a last step.
    """
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # SIGUSR1 is not everywhere
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None  # a worker has one

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    sys.excepthook = _quiet_about_a_closed_connection


def _quiet_about_a_closed_connection(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    # multiprocessing's thread that hands tensors over reports a parent that was stopped in the middle of one by this
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)


def worker_batches(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader. Raises: UserError where a worker was killed or has no shared memory left."""
    try:
        yield from loader
    except RuntimeError as error:
        text = str(error)
        died = "DataLoader worker" in text and not text.startswith("Caught ")  # that is an exception in a worker
        if not died and "shared memory" not in text:
            raise
        raise UserError(
            f"a data worker ended ({first_line(error)}): it may have run out of memory, so lower --workers or "
            "--batch-size; in a container give more shared memory (docker run --shm-size)"
        ) from error
