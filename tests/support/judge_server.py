"""A judge behind a real HTTP server, whose answers and faults a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What a request is answered with.

    Attributes:
      text: content of the judge's message, or the raw body if ``raw``.
      status: HTTP status.
      headers: further headers.
      hang: never answer; the connection closes when the server does.
    """

    text: str = "<answer>Image 1 is better</answer>"
    status: int = 200
    raw: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    hang: bool = False


class JudgeServer:
    """Serves ``decide(number of the request, its JSON) -> Reply`` on a free port, until `stop`."""

    def __init__(self, decide: Callable[[int, Any], Reply], port: int = 0) -> None:
        self.decide = decide
        self.requests: list[Any] = []
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.start(port)

    def start(self, port: int = 0) -> None:
        self.ended.clear()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.requests)
            # The client's port tells its connections apart.
            headers = {**dict(handler.headers), "X-Port": handler.client_address[1]}
            self.requests.append((handler.path, headers, body))
            reply = self.decide(number, body)
        try:
            if reply.hang:
                self.ended.wait(30)
                handler.close_connection = True
                return
            message = {"choices": [{"message": {"role": "assistant", "content": reply.text}}]}
            data = reply.text.encode() if reply.raw else json.dumps(message).encode()
            handler.send_response(reply.status)
            for name, value in (("Content-Length", str(len(data))), *reply.headers):
                handler.send_header(name, value)
            if self.ended.is_set():
                handler.send_header("Connection", "close")
                handler.close_connection = True
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            handler.close_connection = True

    def stop(self) -> None:
        """Listens no more; answers under way are finished, then their connections close."""
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> JudgeServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
