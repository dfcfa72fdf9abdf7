"""An HTTP server of local rewards, with the JSON protocol of `protocol`; `http` is its client.

``GET /health`` answers ``{"status": "ok", "rewards": {NAME: {"needs_group": true or false}}}``.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from deepgen_jax import __version__
from deepgen_jax.errors import DeepGenError, did_you_mean
from deepgen_jax.rewards.background import BackgroundLoop
from deepgen_jax.rewards.base import Reward, failure_place, failure_reason, is_expected
from deepgen_jax.rewards.protocol import RequestTooLarge, parse_request, write_answer
from deepgen_jax.rewards.server_limits import Budget, Busy, Deadlines, ServerLimits
from deepgen_jax.user_warnings import warn_user

#: A connection that is silent for so long is closed.
_IDLE_SECONDS = 60.0
#: Values of a request's JSON; images are a few long texts.
_MAX_VALUES = 10**6


class RewardServer:
    """Serves rewards from threads of this process, one per connection.

    Attributes:
      address: (host, port) that it listens on.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        host: str = "127.0.0.1",
        port: int = 0,
        limits: ServerLimits | None = None,
    ) -> None:
        """Listens; `serve` answers.

        Args:
          rewards: by the name that clients ask for.
          host: address of the interface; "0.0.0.0" for all.
          port: 0 takes a free one.
          limits: of requests and connections.

        Raises:
          DeepGenError: the address cannot be listened on.
        """
        self.rewards = dict(rewards)
        self.limits = limits = limits or ServerLimits()
        self.body_budget, self.pixel_budget = Budget(2 * limits.body_bytes), Budget(2 * limits.pixels)
        self.background = BackgroundLoop("rewards")
        self._busy = 0
        self._changed = threading.Condition()
        try:
            self._http = _Server((host, port), _Handler, self)
        except (OSError, OverflowError) as error:
            self.background.close()
            raise DeepGenError(f"cannot listen on {host}:{port} ({error}); choose another address or port") from error
        self.address: tuple[str, int] = self._http.server_address[:2]  # type: ignore[assignment]

    def serve(self) -> None:
        """Answers until `stop` is called from another thread."""
        self._http.serve_forever(poll_interval=0.1)

    def stop(self) -> None:
        """Stops `serve`."""
        self._http.shutdown()

    def close(self, patience: float = 30.0) -> None:
        """Stops listening, waits up to ``patience`` seconds for answers in progress, and closes the rewards."""
        self._http.server_close()
        with self._changed:
            self._changed.wait_for(lambda: self._busy == 0, timeout=patience)
        for reward in self.rewards.values():
            self.background.submit(reward.close()).result()
        self.background.close()

    def __enter__(self) -> RewardServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def count(self, change: int) -> None:
        """Counts the answers in progress."""
        with self._changed:
            self._busy += change
            self._changed.notify_all()


class _Server(ThreadingHTTPServer):
    # Idle connections must not delay the end; RewardServer.close waits for answers in progress.
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], owner: RewardServer) -> None:
        self.owner = owner
        self.deadlines = Deadlines()
        self._free = threading.Semaphore(owner.limits.connections)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for a connection, or refuses it."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        body = json.dumps({"error": "too many connections; try again later"})
        lines = ("HTTP/1.1 503 Service Unavailable", "Content-Type: application/json", f"Content-Length: {len(body)}")
        with contextlib.suppress(OSError):
            request.settimeout(1)
            request.sendall("\r\n".join((*lines, "Retry-After: 1", "Connection: close", "", body)).encode())
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.deadlines.set(request, None)
            self._free.release()

    def service_actions(self) -> None:
        """Ends connections that take too long to send a request; called several times a second."""
        for connection in self.deadlines.pop_expired():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is no error of the server."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = f"deepgen-reward-server/{__version__}"
    sys_version = ""
    timeout = _IDLE_SECONDS
    server: _Server

    def handle_one_request(self) -> None:
        self._deadline(self.server.owner.limits.request_seconds)
        super().handle_one_request()

    def do_GET(self) -> None:
        self._answer_with(self._health if self._path() == "/health" else self._wrong_path)

    def do_POST(self) -> None:
        self._answer_with(self._score if self._path() == "/score" else self._wrong_path)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers errors found by the base class, such as an unknown method, with JSON."""
        self._send(code, {"error": message or self.responses.get(code, ("error",))[0]})

    def _deadline(self, seconds: float | None) -> None:
        self.server.deadlines.set(self.request, seconds)

    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _answer_with(self, method: Any) -> None:
        owner = self.server.owner
        owner.count(1)
        try:
            try:
                status, answer = 200, method()
            except _Refused as refused:
                status, answer = refused.status, {"error": str(refused)}
            except Busy:
                status, answer = 503, {"error": "other requests use the server's memory; try again later"}
            except Exception as error:  # Rewards run code of others: one that fails must not end the server.
                status, answer = 500, {"error": failure_reason(error)}
                if not is_expected(error):
                    warn_user(f"a reward failed: {failure_reason(error)} ({failure_place(error)})")
            self._send(status, answer)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            owner.count(-1)

    def _wrong_path(self) -> dict[str, Any]:
        if self._path() in ("/health", "/score"):
            raise _Refused(405, "use GET /health and POST /score")
        raise _Refused(404, "unknown path; there are GET /health and POST /score")

    def _health(self) -> dict[str, Any]:
        rewards = self.server.owner.rewards
        return {"status": "ok", "rewards": {name: {"needs_group": r.needs_group} for name, r in rewards.items()}}

    def _score(self) -> dict[str, Any]:
        owner, limits = self.server.owner, self.server.owner.limits
        length = self._length(limits.body_bytes)
        with owner.body_budget.take(length, limits.wait_seconds):
            try:
                request = parse_request(_parse_json(self._body(length)), limits.pixels, limits.samples)
            except RequestTooLarge as error:
                raise _Refused(413, str(error)) from None
            except DeepGenError as error:
                raise _Refused(400, str(error)) from None
            if request.reward not in owner.rewards:
                raise _Refused(404, f"unknown reward {request.reward!r}{did_you_mean(request.reward, owner.rewards)}")
            with owner.pixel_budget.take(request.pixels, limits.wait_seconds):
                try:
                    samples = request.decode()
                except DeepGenError as error:
                    raise _Refused(400, str(error)) from None
                future = owner.background.submit(owner.rewards[request.reward].score(samples))
                try:
                    return write_answer(future.result(limits.score_seconds))
                except TimeoutError:
                    if future.done():
                        raise
                    future.cancel()
                    raise _Refused(504, f"the reward took more than {limits.score_seconds:g} s") from None

    def _length(self, limit: int) -> int:
        text = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not text:
            raise _Refused(411, "send the body with its Content-Length")
        if not (text.isascii() and text.isdigit()):
            raise _Refused(400, "the Content-Length is no number")
        if len(text) > 18 or int(text) > limit:
            raise _Refused(413, f"the body has {text[:20]} bytes; send at most {limit}")
        return int(text)

    def _body(self, length: int) -> bytes:
        body = self.rfile.read(length)
        self._deadline(None)
        if len(body) < length:
            raise _Refused(400, "the body ends before its Content-Length")
        return body

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status >= 400:
            if status == 503:
                self.send_header("Retry-After", "1")
            # The rest of a refused body must not be read as the next request.
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(data)


def _parse_json(body: bytes) -> Any:
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise RequestTooLarge(f"the request holds more than {_MAX_VALUES} values; send fewer")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DeepGenError(f"the body is no JSON ({failure_reason(error)})") from None
