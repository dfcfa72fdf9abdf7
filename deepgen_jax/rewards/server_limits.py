"""Limits of the reward server: what one request may hold, and what all of them may hold together."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from deepgen_jax.errors import DeepGenError


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a server; a request beyond them is refused with a status of 4xx, or 503 where it may be sent again.

    All requests together hold at most twice the bytes and twice the pixels of one.

    Attributes:
      body_bytes: largest request.
      pixels: of all images of a request.
      samples: of a request.
      connections: open at once.
      request_seconds: to send a request, from its first byte or the previous answer to its last byte.
      wait_seconds: for other requests to end, where they hold the memory.
      score_seconds: to score a request.
    """

    body_bytes: int = 128 * 10**6
    pixels: int = 64 * 10**6
    samples: int = 4096
    connections: int = 64
    request_seconds: float = 120.0
    wait_seconds: float = 30.0
    score_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise DeepGenError(f"the server's limit {name} is {value}; it must be above 0")


class Busy(Exception):
    """Other requests hold too much."""


class Budget:
    """An amount that threads share, such as bytes of memory."""

    def __init__(self, total: int) -> None:
        self._left = total
        self._changed = threading.Condition()

    @contextmanager
    def take(self, amount: int, wait_seconds: float) -> Iterator[None]:
        """Holds ``amount`` within the block.

        Raises:
          Busy: it is not free within ``wait_seconds``.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._left >= amount, wait_seconds):
                raise Busy
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()


class Deadlines:
    """Points in time by which work must be done, by any key; safe to use from several threads."""

    def __init__(self) -> None:
        self._deadlines: dict[object, float] = {}
        self._lock = threading.Lock()

    def set(self, key: object, seconds: float | None) -> None:
        """Sets a deadline ``seconds`` from now; None removes it."""
        with self._lock:
            if seconds is None:
                self._deadlines.pop(key, None)
            else:
                self._deadlines[key] = time.monotonic() + seconds

    def pop_expired(self) -> list[object]:
        """Keys whose deadline has passed; they are removed."""
        now = time.monotonic()
        with self._lock:
            expired = [key for key, deadline in self._deadlines.items() if deadline < now]
            for key in expired:
                del self._deadlines[key]
        return expired
