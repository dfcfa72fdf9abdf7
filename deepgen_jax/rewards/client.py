"""HTTP client of judges and remote rewards: limits, time-outs, retries and a cache of answers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from deepgen_jax.errors import DeepGenError, did_you_mean
from deepgen_jax.rewards.base import ScoringFailed, failure_reason
from deepgen_jax.rewards.cache import AnswerCache, request_key

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True)
class ClientConfig:
    """Limits, time-outs and retries of requests to a service.

    Attributes:
      concurrency: requests in flight, each on its own connection from the pool.
      connect_seconds: to open a connection.
      read_seconds: for one try, from sending the request to the end of the answer.
      total_seconds: for one request with all its tries and the waits between them.
      tries: most times that a request is sent.
      backoff_seconds: wait before the second try, doubled with every further one; the actual wait is random, from half
        of it to all of it.
      max_backoff_seconds: longest such wait. A server's ``Retry-After`` takes precedence, within ``total_seconds``.
      max_answer_mb: largest answer that is read, in MB.
      cache: file of answers, so that a resumed run gets the same ones; "" keeps them in memory alone.
      cache_entries: answers kept in memory, the most recently used.
      api_key_variable: environment variable that holds a bearer token; "" sends none.
    """

    concurrency: int = 32
    connect_seconds: float = 10.0
    read_seconds: float = 120.0
    total_seconds: float = 600.0
    tries: int = 5
    backoff_seconds: float = 0.5
    max_backoff_seconds: float = 30.0
    max_answer_mb: float = 4.0
    cache: str = ""
    cache_entries: int = 2**18
    api_key_variable: str = ""

    def __post_init__(self) -> None:
        for name in ("concurrency", "tries", "cache_entries"):
            if getattr(self, name) < 1:
                raise DeepGenError(f"client.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("connect_seconds", "read_seconds", "total_seconds", "max_answer_mb"):
            if not getattr(self, name) > 0:
                raise DeepGenError(f"client.{name} is {getattr(self, name)}; it must be above 0")
        if min(self.backoff_seconds, self.max_backoff_seconds) < 0:
            raise DeepGenError("client.backoff_seconds and client.max_backoff_seconds must not be negative")


class RequestFailed(ScoringFailed):
    """A request got no usable answer."""


class _TryFailed(Exception):
    """One try failed; ``after`` is the server's ``Retry-After`` in seconds, if any."""

    def __init__(self, reason: str, retry: bool, after: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.retry, self.after = reason, retry, after


class Client:
    """Posts JSON and gets JSON.

    Attributes:
      counts: "requests", of which "cached" and "failed"; "tries" sent, of which "retries"; "try failed: REASON".
    """

    def __init__(self, config: ClientConfig | Mapping[str, Any] | None = None) -> None:
        """Sets up; connections open on first use.

        Args:
          config: settings, or their values by name.

        Raises:
          DeepGenError: a setting is unknown or cannot be used, or httpx is not installed.
        """
        self.config = config if isinstance(config, ClientConfig) else _config(config or {})
        self.counts: Counter[str] = Counter()
        self._cache = AnswerCache(self.config.cache, self.config.cache_entries)
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._headers = _headers(self.config.api_key_variable)
        self._http: httpx.AsyncClient | None = None
        _httpx()

    async def post(
        self,
        url: str,
        payload: Mapping[str, Any],
        parse: Callable[[Any], Any],
        keep: Callable[[Any], bool] = lambda result: True,
    ) -> Any:
        """Sends a request; retries after 429, 5xx, time-outs, lost connections and unreadable answers.

        Args:
          url: of the service.
          payload: the request, JSON-ready; it alone is the key of the cache.
          parse: turns the answer's JSON into the result, JSON-ready as well; raises ValueError if it cannot.
          keep: whether a result may be kept in the cache.

        Raises:
          RequestFailed: all tries failed, the time is up, or the server refuses the request.
        """
        self.counts["requests"] += 1
        key = request_key(payload)
        if (answer := self._cache.get(key)) is not None:
            self.counts["cached"] += 1
            return answer
        try:
            async with self._slots, asyncio.timeout(self.config.total_seconds):
                answer = await self._retry(url, payload, parse)
        except TimeoutError:
            self.counts["failed"] += 1
            raise RequestFailed("no answer in time") from None
        except RequestFailed:
            self.counts["failed"] += 1
            raise
        if keep(answer):
            self._cache.put(key, answer)
        return answer

    async def close(self) -> None:
        """Closes connections and the cache's file."""
        if self._http is not None:
            await self._http.aclose()
            self._http = None
        self._cache.close()

    async def _retry(self, url: str, payload: Mapping[str, Any], parse: Callable[[Any], Any]) -> Any:
        body = json.dumps(payload).encode()
        backoff = self.config.backoff_seconds
        for number in range(1, self.config.tries + 1):
            self.counts["tries"] += 1
            self.counts["retries"] += number > 1
            try:
                return await self._try(url, body, parse)
            except _TryFailed as failure:
                self.counts[f"try failed: {failure.reason}"] += 1
                if not failure.retry or number == self.config.tries:
                    raise RequestFailed(failure.reason) from None
                wait = min(backoff, self.config.max_backoff_seconds) * random.uniform(0.5, 1)
                await asyncio.sleep(wait if failure.after is None else failure.after)
                backoff *= 2
        raise AssertionError("the last try returns or raises")

    async def _try(self, url: str, body: bytes, parse: Callable[[Any], Any]) -> Any:
        httpx = _httpx()
        if self._http is None:
            self._http = httpx.AsyncClient(
                headers=self._headers,
                # The semaphore keeps to the pool's size, so that no request waits for a connection.
                limits=httpx.Limits(
                    max_connections=self.config.concurrency, max_keepalive_connections=self.config.concurrency
                ),
                timeout=httpx.Timeout(self.config.read_seconds, connect=self.config.connect_seconds, pool=None),
            )
        try:
            # httpx's own limit is for each read: a server that trickles bytes would never reach it.
            async with (
                asyncio.timeout(self.config.read_seconds),
                self._http.stream("POST", url, content=body) as response,
            ):
                status, headers = response.status_code, response.headers
                answer = await self._body(response) if status == 200 else b""
        except (httpx.TimeoutException, TimeoutError):
            raise _TryFailed("timeout", retry=True) from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise DeepGenError(f"{url} is not the address of a service ({error}); write http://HOST:PORT/...") from None
        except httpx.TransportError:
            raise _TryFailed("connection error", retry=True) from None
        if status != 200:
            retry = status == 429 or status >= 500
            after = _retry_after(headers.get("retry-after")) if retry else None
            raise _TryFailed(f"HTTP {status}", retry, after)
        try:
            return parse(json.loads(answer))
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
            raise _TryFailed("unreadable answer", retry=True) from None

    async def _body(self, response: httpx.Response) -> bytes:
        """The body of an answer, read up to its limit."""
        limit = int(self.config.max_answer_mb * 10**6)
        # The request asks for no compression; a small compressed body could expand to any size.
        if response.headers.get("content-encoding", "identity") != "identity":
            raise _TryFailed("compressed answer", retry=False)
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > limit:
                raise _TryFailed("answer too large", retry=False)
        return bytes(body)


def _config(values: Mapping[str, Any]) -> ClientConfig:
    known = [field.name for field in dataclasses.fields(ClientConfig)]
    for name in values:
        if name not in known:
            raise DeepGenError(f"client: unknown option {name!r}{did_you_mean(name, known)}")
    try:
        return ClientConfig(**values)
    except TypeError as error:
        raise DeepGenError(f"client: an option has the wrong type ({failure_reason(error)})") from None


def _headers(variable: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if variable:
        token = os.environ.get(variable)
        if not token:
            raise DeepGenError(f"the environment variable {variable} is not set; it must hold the service's token")
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _retry_after(text: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, which holds seconds or a date; None if it is unreadable."""
    if text is None:
        return None
    try:
        return max(float(text), 0.0) if text.strip().isdigit() else _seconds_until(text)
    except ValueError:
        return None


def _seconds_until(date: str) -> float:
    return max(parsedate_to_datetime(date).timestamp() - time.time(), 0.0)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise DeepGenError("judges and remote rewards need httpx; run pip install 'deepgen-jax[rewards]'") from error
    return httpx
