"""Set-up of every test: no network, a temporary cache, two threads, fixed seeds, a reset Accelerate state."""

import os
import random
import runpy
import socket
import sys
import tempfile
from ipaddress import ip_address
from pathlib import Path

# Set before the imports that read them. Subprocesses of a test inherit them; the proxy does not exist, so that
# subprocesses have no network either.
CACHE = tempfile.TemporaryDirectory(prefix="gkl_vl_tests_")
JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HUB = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "TORCH_HOME")
for name in [*JOB, *HUB, *(name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_")))]:
    os.environ.pop(name, None)
os.environ |= {
    "XDG_CACHE_HOME": CACHE.name,
    "HF_HUB_OFFLINE": "1",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "localhost,127.0.0.1,::1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": str(min(2, int(os.environ.get("OMP_NUM_THREADS", "2")))),
}

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


class NetworkBlocked(ConnectionError):
    """A test used the network. A subclass of OSError, as on a machine without network."""


def is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Allows connections and name look-ups on this machine only."""

    def guard(method, host_of):
        def guarded(*args, **kwargs):
            host = host_of(*args)
            if not is_local(host):
                raise NetworkBlocked(f"a test tried to reach the network: {host}")
            return method(*args, **kwargs)

        return guarded

    def host_of_connect(sock, address):
        return address[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(socket.socket.connect, host_of_connect))
        patch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex, host_of_connect))
        patch.setattr(socket, "getaddrinfo", guard(socket.getaddrinfo, lambda host, *rest: host))
        yield


@pytest.fixture(autouse=True)
def same_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Resets the state that Accelerate keeps per process: the next test may use another precision."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="module")
def one_thread():
    """One thread for a module of many tiny operations, which the synchronisation of two slows down many times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Returns run_script(path, *flags) -> (exit code, stdout, stderr), which runs a script in this process, in the
    current folder."""

    def run_script(path: Path, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [path.name, *map(str, flags)])
        code = 0
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_script
