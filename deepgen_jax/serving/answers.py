"""Answers to image requests: collected into one JSON object, or streamed as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deepgen_jax.errors import DeepGenError
from deepgen_jax.serving import pictures
from deepgen_jax.serving.batcher import Batcher, Done, Event, Failed, Preview, Ticket
from deepgen_jax.serving.errors import APIError, invalid
from deepgen_jax.serving.jobs import Checked, Job
from deepgen_jax.serving.metrics import Metrics
from deepgen_jax.serving.parameters import Parameters

#: Seconds of silence on a stream before a comment is sent, so that proxies keep it open.
_KEEP_ALIVE_SECONDS = 10.0


class Answer:
    """One request's images as they arrive.

    Attributes:
      tickets: of the images, in their order.
      metrics: of the service.
      log: what the access log says of the request.
    """

    def __init__(
        self,
        parameters: Parameters,
        jobs: Sequence[tuple[Job, Checked]],
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.parameters = parameters
        self.tickets: list[Ticket] = []
        self.log: dict[str, Any] = {}
        self._job, self._checked = jobs[0]
        self._count = len(jobs)
        self.metrics, self._loop = metrics, loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def listen(self, event: Event) -> None:
        """Takes an event from the model's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def collect(self, batcher: Batcher, gone: asyncio.Future[None], deadline: float) -> dict[str, Any]:
        """Waits for all images.

        Args:
          gone: done when the client has left; what has not begun is then cancelled.
          deadline: seconds after which what has not begun is cancelled.

        Returns:
          the body of the answer.

        Raises:
          APIError: the model refused the request, failed, or did not begin in time.
          ClientDisconnect: the client left.
        """
        encoded: dict[Ticket, str] = {}
        async for event in self._watched(batcher, gone, deadline):
            if isinstance(event, Done):
                encoded[event.ticket] = await self._encoded(event, url=self.parameters.as_url)
        key = "url" if self.parameters.as_url else "b64_json"
        data = [{key: encoded[ticket], "seed": ticket.job.seed} for ticket in self.tickets]
        return {"created": int(time.time()), "data": data, **self._described(), "usage": self._usage(self._count)}

    async def events(
        self, batcher: Batcher, gone: asyncio.Future[None], deadline: float
    ) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events of the images; see `collect`."""
        prefix = "image_generation" if self.parameters.kind == "generation" else "image_edit"
        place = {ticket: k for k, ticket in enumerate(self.tickets)}
        common = {**self._described(), "quality": "auto"}
        async for event in self._watched(batcher, gone, deadline):
            text = await self._encoded(event)
            data = {"b64_json": text, "created_at": int(time.time()), **common, "seed": event.ticket.job.seed,
                    "image_index": place[event.ticket]}  # fmt: skip
            if isinstance(event, Preview):
                yield {"type": f"{prefix}.partial_image", "partial_image_index": event.index, **data}
            else:
                yield {"type": f"{prefix}.completed", **data, "usage": self._usage(1)}

    async def _watched(
        self, batcher: Batcher, gone: asyncio.Future[None], deadline: float
    ) -> AsyncIterator[Preview | Done]:
        """Events until every image is there; cancels what has not begun when the client leaves or time is up."""
        missing = set(self.tickets)
        end: float | None = self._loop.time() + deadline
        try:
            while missing:
                event = asyncio.ensure_future(self._events.get())
                timeout = None if end is None else max(0.0, end - self._loop.time())
                try:
                    await asyncio.wait((event, gone), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not event.done():
                        event.cancel()
                if event.done() and not event.cancelled():
                    received = event.result()
                    if isinstance(received, Failed):
                        raise _failure(received.error)
                    if isinstance(received, Done):
                        missing.discard(received.ticket)
                    yield received
                elif gone.done():
                    raise ClientDisconnect
                elif end is not None and self._loop.time() >= end:
                    if batcher.cancel(missing):
                        raise _overdue()
                    end = None  # all have begun
        finally:
            batcher.cancel(missing)
            first = self.tickets[0]
            self.log.update(images=self._count, queue_seconds=round(first.waited, 4), batch=first.batch)

    async def _encoded(self, event: Preview | Done, url: bool = False) -> str:
        start = time.monotonic()
        p = self.parameters
        data = await asyncio.to_thread(pictures.encode, event.image, p.format, p.compression)
        self.metrics.observe_phase("encode", time.monotonic() - start)
        return pictures.as_data_url(data, p.format) if url else pictures.base64_text(data)

    def _described(self) -> dict[str, Any]:
        size = f"{self._job.width}x{self._job.height}"
        return {"background": "opaque", "output_format": self.parameters.format, "size": size}

    def _usage(self, images: int) -> dict[str, Any]:
        text, pictures_in = self._checked.text_tokens, self._checked.image_tokens
        made = images * self._checked.output_tokens
        return {
            "input_tokens": text + pictures_in, "output_tokens": made, "total_tokens": text + pictures_in + made,
            "input_tokens_details": {"text_tokens": text, "image_tokens": pictures_in},
        }  # fmt: skip


def _failure(error: Exception) -> APIError:
    if isinstance(error, DeepGenError):
        return invalid(str(error), "prompt")
    if isinstance(error, TimeoutError):
        return _overdue()
    if isinstance(error, MemoryError):
        return APIError(500, str(error), "out_of_memory")
    return APIError(500, "The model failed; the server's log has the reason", "internal_error")


def _overdue() -> APIError:
    message = "The image was not begun within the deadline; try again later"
    return APIError(504, message, "deadline_exceeded", headers={"Retry-After": "5"})


def event_stream(answer: Answer, batcher: Batcher, deadline: float) -> Response:
    """The answer as ``text/event-stream``; an error after the start is sent as an event."""
    return _EventStream(answer, batcher, deadline)


class _EventStream(Response):
    media_type = "text/event-stream"

    def __init__(self, answer: Answer, batcher: Batcher, deadline: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer, self._batcher, self._deadline = answer, batcher, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_left(receive))
        lock = asyncio.Lock()

        async def write(text: str, more: bool = True) -> None:
            async with lock:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pulse = asyncio.ensure_future(_pulse(write))
        try:
            async for event in self._answer.events(self._batcher, gone, self._deadline):
                await write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n")
        except APIError as error:
            self._answer.metrics.failures.labels(error.code).inc()
            await write(f"event: error\ndata: {json.dumps(error.envelope)}\n\n")
        except (ClientDisconnect, OSError):
            self._answer.metrics.failures.labels("client_closed").inc()
            return
        finally:
            pulse.cancel()
            gone.cancel()
        await write("", more=False)


async def _pulse(write: Any) -> None:
    while True:
        await asyncio.sleep(_KEEP_ALIVE_SECONDS)
        await write(": keep-alive\n\n")


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
