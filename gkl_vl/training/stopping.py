"""Requests to stop a run at its next step, with a checkpoint: signals and a time limit.

SLURM sends SIGTERM before it takes a preempted job's machines away, and with `--signal` another signal, such as
SIGUSR1, at a chosen time before the limit of the job.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this process was requested to stop. `listen` starts to count signals.

    Args:
        minutes: time limit, from now on; None = none.
    """

    def __init__(self, minutes: float | None = None):
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._signalled = False

    def __call__(self) -> bool:
        """Whether a signal has arrived or the time is over."""
        return self._signalled or (self._deadline is not None and time.monotonic() > self._deadline)

    def listen(self) -> None:
        """From here on SIGTERM and SIGUSR1 are requests, however often they come: a launcher passes on what a cluster
        has sent to its trainer as well. Ctrl-C and SIGKILL end the process. `cli.run` restores the handler of SIGTERM.
        """
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
            return
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self._signalled = True


def end_with_launcher() -> None:
    """Requests SIGTERM for this process when its launcher ends, which would otherwise leave it running. Linux only.

    `accelerate launch` of one process does not pass signals on; it dies of them.
    """
    launched = any(name.startswith("ACCELERATE_") for name in os.environ)
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
