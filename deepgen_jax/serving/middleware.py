"""Middleware of every request: id, bearer key, metrics and access log."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepgen_jax.errors import DeepGenError
from deepgen_jax.serving.errors import APIError
from deepgen_jax.serving.metrics import Metrics

#: Gets one record of each request but those of probes and scrapers.
AccessLog = Callable[[dict[str, Any]], None]

#: Routes that need no key: probes and scrapers have none.
_OPEN = ("/health", "/ready", "/metrics")
_ROUTES = ("/v1/images/generations", "/v1/images/edits", "/v1/models", *_OPEN)


def log_to_stderr(record: dict[str, Any]) -> None:
    """Writes a record as one line of JSON."""
    print(json.dumps(record), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Keys:
    """Accepted bearer keys, kept as SHA-256 digests."""

    digests: tuple[bytes, ...]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Reads a file with one key a line; empty lines and those that begin with # are passed over.

        Raises:
          DeepGenError: the file cannot be read, or holds no key.
        """
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise DeepGenError(f"key file {path} cannot be read: {reason}; write one key a line") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise DeepGenError(f"key file {path} holds no keys; write one a line")
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in keys))

    def accept(self, header: str) -> bool:
        """Whether an Authorization header carries one of the keys."""
        scheme, _, key = header.partition(" ")
        digest = hashlib.sha256(key.strip().encode(errors="surrogateescape")).digest()
        # All are compared, so that the time taken shows nothing.
        found = [hmac.compare_digest(digest, known) for known in self.digests]
        return scheme.lower() == "bearer" and any(found)


class Watch:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: AccessLog | None, keys: Keys | None) -> None:
        self._app, self._metrics, self._log, self._keys = app, metrics, log, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else f"req_{uuid.uuid4().hex}"
        start, status, sent = time.monotonic(), 0, 0

        async def watched(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            else:
                sent += len(message.get("body", b""))
            await send(message)

        path = scope["path"]
        try:
            if self._keys is not None and path not in _OPEN and not self._keys.accept(headers.get("authorization", "")):
                refused = APIError(401, "The API key is missing or not accepted; send 'Authorization: Bearer KEY'",
                                   "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
                self._metrics.failures.labels(refused.code).inc()
                response = JSONResponse(refused.envelope, status_code=refused.status, headers=refused.headers)
                await response(scope, receive, watched)
            else:
                await self._app(scope, receive, watched)
        except Exception:
            # Starlette answers 500 outside of this middleware.
            status = status or 500
            raise
        finally:
            seconds = time.monotonic() - start
            route = path if path in _ROUTES else "other"
            # Where nothing was sent, the client was gone.
            self._metrics.requests.labels(route, str(status or 499)).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            if self._log is not None and path not in _OPEN:
                record = {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "id": request_id,
                    "client": (scope.get("client") or ("",))[0], "method": scope["method"], "path": path,
                    "status": status or 499, "seconds": round(seconds, 4), "bytes": sent,
                    **scope.get("state", {}).get("log", {}),
                }  # fmt: skip
                self._log(record)
