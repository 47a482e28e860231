"""What holds for every test: no network, a cache of our own, two threads, fixed seeds, a fresh Accelerate."""

import os
import random
import runpy
import socket
import sys
import tempfile
from ipaddress import ip_address
from pathlib import Path

# Before anything that reads them at import. Programs that a test starts inherit them; the proxy that is
# not there keeps those programs off the network.
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
    """An OSError, so that the code under test meets what a machine without network gives it."""


def is_here(host: object) -> bool:
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
    """Connections and look-ups end at this machine."""

    def guard(method, host_of):
        def guarded(*args, **kwargs):
            host = host_of(*args)
            if not is_here(host):
                raise NetworkBlocked(f"a test wanted the network: {host}")
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
    """Accelerate keeps one state per process: the next test may ask for another precision."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="module")
def one_thread():
    """Two threads that meet after each of a thousand tiny operations take many times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script(path, *flags) -> (exit code, stdout, stderr) of a script in this process, where its folder may be
    chosen before."""

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
