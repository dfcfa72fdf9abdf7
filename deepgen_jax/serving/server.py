"""Running the application: on the main thread until a signal, or in a background thread."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from deepgen_jax.errors import DeepGenError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
      DeepGenError: the address cannot be listened on.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DeepGenError(f"cannot listen on {host}:{port} ({reason}); choose another --host or --port") from error
    listener.listen(512)
    return listener


def address(listener: socket.socket) -> str:
    """``http://HOST:PORT`` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn without its signal handlers; `stop` ends it once what was accepted is answered."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_keep_alive=30,
                           h11_max_incomplete_event_size=64 * 1024, server_header=False)
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the caller."""
        yield

    def stop(self, at_once: bool = False) -> None:
        """Accepts no more connections and returns from `run` when the open requests are answered, or ``at_once``."""
        self.should_exit = True
        if at_once:
            self.force_exit = True


def serve_until_signal(server: Server, listener: socket.socket) -> int:
    """Serves on the main thread until SIGTERM or SIGINT; a second one gives up what is unfinished.

    Returns:
      the number of signals that were received.
    """
    received = 0

    def handle(signum: int, frame: Any) -> None:
        nonlocal received
        received += 1
        server.stop(at_once=received > 1)

    usual = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    return received


class BackgroundServer:
    """Context manager: an application on a free port of 127.0.0.1, in a thread.

    Attributes:
      url: ``http://127.0.0.1:PORT``.
    """

    def __init__(self, app: ASGIApp, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = Server(app)
        self._listener = listen(host, port)
        self.url = address(self._listener)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, name="http-server", daemon=True
        )

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.stop()
        self._thread.join()
        self._listener.close()


def log_to_stderr() -> None:
    """Warnings of the service, and what it compiles at the start, as plain lines."""
    logger = logging.getLogger("deepgen_jax.serving")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("deepgen: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
