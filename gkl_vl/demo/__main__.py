"""A page to try a student: zero-shot classification, and search in a folder of images by words or by an image.

    pip install 'gkl-vl[demo]'
    python -m gkl_vl.demo --model runs/NAME
    python -m gkl_vl.demo --model runs/NAME --teacher bundled --images ~/Pictures

The page is at http://127.0.0.1:7860, for this machine alone. It loads nothing from other hosts.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from threading import Event, Thread

from gkl_vl.cli import run
from gkl_vl.demo.folder import open_folder
from gkl_vl.demo.models import DemoModel, best_device, load_model
from gkl_vl.demo.search import Index, build, empty_index
from gkl_vl.errors import UserError, notice


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    """A run folder, an exported folder, hf-hub:org/repo, transformers:org/repo or `bundled`, the bundled teacher."""
    teacher: str | None = None
    """A model to show beside it, named as for --model."""
    images: str | None = None
    """Folder of images to search, at any depth."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 = all of this machine's: whoever reaches it sees the page and the images."""
    port: int = 7860
    """Port to listen on; 0 = a free one."""
    allow_pickle: bool = False
    """Allow weights stored as a pickle, which can execute code when they are read."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    require_gradio()
    folder = None if config.images is None else open_folder(config.images)
    with tempfile.TemporaryDirectory(prefix="gkl_vl_demo_") as uploads:
        os.environ |= gradio_environment(uploads)
        from gkl_vl.demo.server import LOOPBACK, build_app, listen, server_of

        with listen(config.host, config.port) as listening:
            models = load_models(config)
            index = None if folder is None else empty_index(folder, models)
            if config.host not in LOOPBACK:
                notice(f"whoever reaches {config.host} sees this page and its images")
            with building(index):
                server = server_of(build_app(models, index, host=config.host))
                host = f"[{config.host}]" if ":" in config.host else config.host
                print(f"http://{host}:{listening.getsockname()[1]} (Ctrl-C ends it)", flush=True)
                server.run(sockets=[listening])


def gradio_environment(uploads: str) -> dict[str, str]:
    """Settings that gradio reads from the environment.

    Args:
        uploads: folder of uploaded images. It is removed at the end, unlike gradio's own.
    """
    # Otherwise gradio summarises all calls so far, with pandas, after each call.
    return {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(2**31)}


def load_models(config: Config) -> list[DemoModel]:
    """The model, and the teacher where one is named."""
    device, allow_pickle = best_device(), config.allow_pickle
    models = [load_model(config.model, role="student", device=device, allow_pickle=allow_pickle)]
    if config.teacher is not None:
        models.append(load_model(config.teacher, role="teacher", device=device, allow_pickle=allow_pickle))
    return models


@contextmanager
def building(index: Index | None) -> Iterator[None]:
    """Context manager: `build` runs in a thread of its own, which ends with the block."""
    stop = Event()
    thread = Thread(target=build, args=[index, stop])
    if index is not None:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if index is not None:
            thread.join()  # left to itself, it would still compute while the interpreter ends, which aborts


def require_gradio() -> None:
    """Raises: UserError where gradio is not installed."""
    if find_spec("gradio") is None:
        raise UserError("the page needs gradio: pip install 'gkl-vl[demo]'")


if __name__ == "__main__":
    run(main, Config)
