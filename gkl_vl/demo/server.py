"""The web server of the page: gradio's page, the images of the folder by number, and what a browser may load.

An image is served under its number in the index, as a JPEG that is drawn anew: no address holds a path.
"""

import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import uvicorn  # pyright: ignore[reportMissingImports]
from fastapi import FastAPI, Response  # pyright: ignore[reportMissingImports]
from starlette.middleware.trustedhost import TrustedHostMiddleware  # pyright: ignore[reportMissingImports]

from gkl_vl.data.sources import printable
from gkl_vl.demo.models import DemoModel
from gkl_vl.demo.page import CSS, build_page, quiet_theme
from gkl_vl.demo.search import Index, large, thumbnail
from gkl_vl.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost")
_HEADERS = {
    # The browser itself refuses whatever a version of gradio would fetch from other hosts.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def build_app(models: Sequence[DemoModel], index: Index | None, *, host: str) -> Any:
    """The page and its images as an ASGI application.

    Args:
        index: None = no folder to search.
        host: on a loopback host, requests under another name are refused: a site whose name leads to this machine could
            read the images otherwise.
    """
    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK) if host in LOOPBACK else ["*"])
    if index is not None:
        _add_images(app, index)
    gr.mount_gradio_app(
        app,
        build_page(models, index),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size="100mb",
        theme=quiet_theme(),
        css=CSS,
    )
    return _with_headers(app)


def _add_images(app: Any, index: Index) -> None:
    def names() -> list[str]:
        return [printable(name) for name in index.folder.names]

    def answer(draw: Callable[[Index, int], bytes], number: int) -> Any:
        if not 0 <= number < len(index.folder.names):
            return Response(status_code=404)
        try:
            return Response(draw(index, number), media_type="image/jpeg", headers={"cache-control": "no-store"})
        except UserError:
            return Response(status_code=404)

    def small(number: int) -> Any:
        return answer(thumbnail, number)

    def whole(number: int) -> Any:
        return answer(large, number)

    app.get("/names")(names)
    app.get("/thumbnail/{number}", response_model=None)(small)
    app.get("/image/{number}", response_model=None)(whole)


def _with_headers(app: Any) -> Any:
    """The application with `_HEADERS` in each of its responses."""
    headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]

    async def with_headers(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def send_with_headers(event: Any) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [*event["headers"], *headers]
            await send(event)

        await app(scope, receive, send_with_headers)

    return with_headers


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 = a free one.

    Raises: UserError for a port that is taken or is none, and a host that is not this machine's.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port} must be at least 0 and at most {2**16 - 1}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # socket repeats the address there
        raise UserError(
            f"{host}:{port} cannot be listened on ({reason}): give another --port, or --host 127.0.0.1"
        ) from error


def server_of(app: Any) -> uvicorn.Server:
    """A server of the application, to `run(sockets=[listen(...)])`. It ends with Ctrl-C, or when `should_exit`."""
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
