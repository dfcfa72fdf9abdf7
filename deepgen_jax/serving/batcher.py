"""A bounded queue that turns jobs from many requests into batches of one shape.

One thread runs the model. Jobs of equal buckets share a batch; generation and edits wait in separate queues. A batch
starts when it is full, or when its oldest job has waited for the batch window; while the model is busy, jobs gather.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from deepgen_jax.errors import DeepGenError, is_out_of_memory
from deepgen_jax.serving.jobs import KINDS, Engine, Job, Kind
from deepgen_jax.serving.metrics import Metrics
from deepgen_jax.serving.settings import ServeConfig

_log = logging.getLogger("deepgen_jax.serving")


class QueueFull(Exception):
    """No room for a request; ``seconds`` is when to try again."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full; try again in {seconds:.0f} s")
        self.seconds = seconds


class Closing(Exception):
    """The service is shutting down and accepts nothing new."""


@dataclass(frozen=True)
class Preview:
    """An intermediate image, uint8 [H, W, 3]."""

    ticket: Ticket
    index: int
    image: np.ndarray


@dataclass(frozen=True)
class Done:
    """A finished image, uint8 [H, W, 3]."""

    ticket: Ticket
    image: np.ndarray


@dataclass(frozen=True)
class Failed:
    """A job without an image: the model refused it (`DeepGenError`), or something broke."""

    ticket: Ticket
    error: Exception


Event = Preview | Done | Failed
Listener = Callable[[Event], None]


@dataclass(eq=False)
class Ticket:
    """A job in the queue.

    Attributes:
      number: order of arrival.
      arrived: when it was queued, seconds of `time.monotonic`.
      deadline: when it is dropped unless it has begun, of the same clock.
      state: "queued", "running", "finished" or "cancelled".
      waited: seconds in the queue, once it runs.
      batch: jobs of its batch, once it runs.
    """

    job: Job
    bucket: Hashable
    listener: Listener
    number: int
    arrived: float
    deadline: float
    state: Literal["queued", "running", "finished", "cancelled"] = "queued"
    waited: float = 0.0
    batch: int = 0


@dataclass
class _Queue:
    """Waiting jobs of one kind by bucket, oldest first."""

    buckets: dict[Hashable, deque[Ticket]] = field(default_factory=dict)
    depth: int = 0


class Batcher:
    """Runs an engine in a thread; `submit` and `cancel` may be called from any thread."""

    def __init__(self, engine: Engine, config: ServeConfig, metrics: Metrics) -> None:
        """Starts the thread; `close` ends it."""
        self.engine, self.config, self.metrics = engine, config, metrics
        self.rows = engine.row_sizes(config.max_batch)
        self._queues: dict[Kind, _Queue] = {kind: _Queue() for kind in KINDS}
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._closing = False
        #: Largest batch of a bucket that was found not to fit into memory otherwise.
        self._limits: dict[Hashable, int] = {}
        self._seconds_per_image = 1.0
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[tuple[Job, Hashable]], listener: Listener) -> list[Ticket]:
        """Queues the images of one request, all or none.

        Args:
          jobs: with their buckets, all of one kind.
          listener: called from the model's thread; gets one `Done` or `Failed` for each job that is not cancelled.

        Raises:
          QueueFull: they would exceed the queue's bound.
          Closing: `close` was called.
        """
        kind = jobs[0][0].kind
        with self._changed:
            if self._closing:
                raise Closing
            queue = self._queues[kind]
            # A request larger than the whole queue is accepted while nothing waits.
            if queue.depth and queue.depth + len(jobs) > self.config.max_queue:
                raise QueueFull(max(1.0, queue.depth * self._seconds_per_image))
            now = time.monotonic()
            tickets = [
                Ticket(job, bucket, listener, next(self._numbers), now, now + self.config.deadline)
                for job, bucket in jobs
            ]
            for ticket in tickets:
                queue.buckets.setdefault(ticket.bucket, deque()).append(ticket)
            self._count(kind, len(tickets))
            self._changed.notify()
        return tickets

    def cancel(self, tickets: Iterable[Ticket]) -> int:
        """Takes jobs that have not begun out of the queue; returns how many those were."""
        cancelled = 0
        with self._changed:
            for ticket in tickets:
                if ticket.state == "queued":
                    self._remove(ticket)
                    ticket.state = "cancelled"
                    cancelled += 1
        return cancelled

    def close(self, wait: bool = True) -> None:
        """Accepts nothing new; what is queued is still run. With ``wait``, returns when all of it is finished."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if wait:
            self._thread.join()

    @property
    def depth(self) -> int:
        """Images that wait."""
        with self._changed:
            return sum(queue.depth for queue in self._queues.values())

    def _count(self, kind: Kind, change: int) -> None:
        self._queues[kind].depth += change
        self.metrics.queue_depth.labels(kind).set(self._queues[kind].depth)

    def _remove(self, ticket: Ticket) -> None:
        buckets = self._queues[ticket.job.kind].buckets
        buckets[ticket.bucket].remove(ticket)
        if not buckets[ticket.bucket]:
            del buckets[ticket.bucket]
        self._count(ticket.job.kind, -1)

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._run(batch)

    def _next(self) -> list[Ticket] | None:
        """Waits for a batch; None once closed and empty."""
        with self._changed:
            while True:
                now = time.monotonic()
                best: deque[Ticket] | None = None
                soonest: float | None = None
                for queue in self._queues.values():
                    for waiting in queue.buckets.values():
                        head = waiting[0]
                        due = head.arrived + self.config.batch_window
                        if len(waiting) >= self._most(head.bucket) or due <= now or self._closing:
                            if best is None or head.number < best[0].number:
                                best = waiting
                        elif soonest is None or due < soonest:
                            soonest = due
                if best is not None:
                    most = self._most(best[0].bucket)
                    chosen = list(itertools.islice(best, most))
                    for ticket in chosen:
                        self._remove(ticket)
                        ticket.state = "running"
                        ticket.waited = now - ticket.arrived
                    return chosen
                if self._closing:
                    return None
                self._changed.wait(None if soonest is None else max(0.0, soonest - now))

    def _most(self, bucket: Hashable) -> int:
        return self._limits.get(bucket, self.rows[-1])

    def _run(self, batch: list[Ticket]) -> None:
        """Runs a batch, in parts where it does not fit into memory or a job of it is refused."""
        now = time.monotonic()
        late = [ticket for ticket in batch if ticket.deadline < now]
        for ticket in late:
            self._finish(ticket, Failed(ticket, TimeoutError("the deadline passed before the image was begun")))
        batch = [ticket for ticket in batch if ticket.state == "running"]
        if not batch:
            return
        rows = next(size for size in self.rows if size >= len(batch))
        for ticket in batch:
            ticket.batch = len(batch)
        kind = batch[0].job.kind

        def on_preview(place: int, index: int, image: np.ndarray) -> None:
            if place < len(batch):
                self._tell(batch[place], Preview(batch[place], index, image))

        self.metrics.running.set(len(batch))
        start = time.monotonic()
        try:
            images = self.engine.run([ticket.job for ticket in batch], rows, on_preview, self.metrics.observe_phase)
        except Exception as error:
            # The thread must outlive any failure of a batch: later requests depend on it.
            self._recover(batch, rows, error)
            return
        finally:
            self.metrics.running.set(0)
        seconds = time.monotonic() - start
        self._seconds_per_image += 0.2 * (seconds / len(batch) - self._seconds_per_image)
        self.metrics.batch_size.labels(kind).observe(len(batch))
        self.metrics.images.labels(kind).inc(len(batch))
        for ticket, image in zip(batch, images, strict=True):
            self.metrics.observe_phase("queue", ticket.waited)
            self._finish(ticket, Done(ticket, image))

    def _recover(self, batch: list[Ticket], rows: int, error: Exception) -> None:
        if is_out_of_memory(error):
            if rows > self.rows[0]:
                smaller = max(size for size in self.rows if size < rows)
                self._limits[batch[0].bucket] = smaller
                _log.warning("out of memory for a batch of %d; batches of %d from now on", rows, smaller)
                for start in range(0, len(batch), smaller):
                    self._run(batch[start : start + smaller])
                return
            job = batch[0].job
            error = MemoryError(f"out of memory for an image of {job.width}x{job.height}; ask for a smaller size")
        elif len(batch) > 1:
            # The job at fault is found by running each alone; the others get their images.
            for ticket in batch:
                self._run([ticket])
            return
        elif not isinstance(error, DeepGenError):
            _log.error("an image failed", exc_info=error)
        for ticket in batch:
            self._finish(ticket, Failed(ticket, error))

    def _finish(self, ticket: Ticket, event: Done | Failed) -> None:
        ticket.state = "finished"
        self._tell(ticket, event)

    def _tell(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.listener(event)
        except RuntimeError as error:
            # The listener's event loop is closed: the request has ended.
            _log.warning("an image is dropped, its request has ended (%s)", error)
