"""A server of local rewards, behind the JSON protocol of `protocol`; `http` is its client.

``GET /health`` answers ``{"status": "ok", "rewards": {NAME: {"needs_group": true or false}}}``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from deepgen_jax import __version__
from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.background import BackgroundLoop
from deepgen_jax.rewards.base import Reward, failure_reason
from deepgen_jax.rewards.protocol import read_request, write_answer
from deepgen_jax.rewards.registry import suggestion

#: Largest request unless set otherwise.
MAX_BODY_BYTES = 256 * 2**20
#: A connection that is silent for so long is closed.
_IDLE_SECONDS = 60.0


class RewardServer:
    """Serves rewards from threads of this process.

    Attributes:
      address: (host, port) that it listens on.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], host: str = "127.0.0.1", port: int = 0, max_body: int = MAX_BODY_BYTES
    ) -> None:
        """Listens; `serve` answers.

        Args:
          rewards: by the name that clients ask for.
          host: address of the interface; "0.0.0.0" for all.
          port: 0 takes a free one.
          max_body: largest request in bytes.

        Raises:
          DeepGenError: the address cannot be listened on.
        """
        self.rewards = dict(rewards)
        self.max_body = max_body
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
        """Ends `serve`."""
        self._http.shutdown()

    def close(self, patience: float = 30.0) -> None:
        """Listens no more, waits at most ``patience`` seconds for the answers under way, and closes the rewards."""
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
        """Keeps account of the answers under way."""
        with self._changed:
            self._busy += change
            self._changed.notify_all()


class _Server(ThreadingHTTPServer):
    # Idle connections must not hold up the end; answers under way are waited for by RewardServer.close.
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], owner: RewardServer) -> None:
        self.owner = owner
        super().__init__(address, handler)


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

    def do_GET(self) -> None:
        self._answer_with(self._health if self._path() == "/health" else self._wrong_path)

    def do_POST(self) -> None:
        self._answer_with(self._score if self._path() == "/score" else self._wrong_path)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is written for a request that goes well."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Errors that the base class finds, such as an unknown method, are JSON, too."""
        self._send(code, {"error": message or self.responses.get(code, ("error",))[0]})

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
            except Exception as error:
                status, answer = 500, {"error": failure_reason(error)}
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
        owner = self.server.owner
        try:
            name, samples = read_request(json.loads(self._body(owner.max_body)))
        except DeepGenError as error:
            raise _Refused(400, str(error)) from None
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"the body is no JSON ({failure_reason(error)})") from None
        if name not in owner.rewards:
            raise _Refused(404, f"unknown reward {name!r}; {suggestion(name, owner.rewards)}")
        return write_answer(owner.background.submit(owner.rewards[name].score(samples)).result())

    def _body(self, limit: int) -> bytes:
        text = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not text:
            raise _Refused(411, "send the body with its Content-Length")
        if not text.isdigit():
            raise _Refused(400, "the Content-Length is no number")
        if int(text) > limit:
            raise _Refused(413, f"the body has {text} bytes; send at most {limit}")
        body = self.rfile.read(int(text))
        if len(body) < int(text):
            raise _Refused(400, "the body ends before its Content-Length")
        return body

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status >= 400:
            # What is left of the body that was refused must not be taken for the next request.
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(data)
