"""The state of a running service: the model while it loads, serves and stops."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator

from deepgen_jax.serving.batcher import Batcher
from deepgen_jax.serving.errors import APIError
from deepgen_jax.serving.jobs import Engine
from deepgen_jax.serving.metrics import Metrics
from deepgen_jax.serving.settings import ServeConfig

_log = logging.getLogger("deepgen_jax.serving")


class Service:
    """Loads the engine in a thread, then runs a `Batcher` over it.

    Attributes:
      state: "loading", "ready", "stopping" or "failed".
      names: values of ``model`` that requests may give; the first is the engine's.
      created: Unix time at which the model was loaded.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        config: ServeConfig,
        metrics: Metrics,
        names: tuple[str, ...] = (),
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.config, self.metrics, self.names = config, metrics, names
        self.state = "loading"
        self.created = int(time.time())
        self._load, self._on_failure = load, on_failure
        self._engine: Engine | None = None
        self._batcher: Batcher | None = None
        self._uploads = 0
        self._thread = threading.Thread(target=self._open, name="load-model", daemon=True)

    def start(self) -> None:
        """Begins to load the model."""
        self._thread.start()

    async def stop(self) -> None:
        """Finishes what was accepted, then ends the model's thread."""
        self.state = "stopping"
        self.metrics.ready.set(0)
        if self._batcher is not None:
            await asyncio.to_thread(self._batcher.close)

    def engine_or_refuse(self) -> tuple[Engine, Batcher]:
        """The model and its queue.

        Raises:
          APIError: 503 while the model is not ready.
        """
        if self.state == "stopping":
            raise self.shutting_down()
        if self._engine is None or self._batcher is None:
            message = "The model cannot be loaded" if self.state == "failed" else "The model is loading; try again soon"
            raise APIError(503, message, "not_ready", headers={"Retry-After": "2"})
        return self._engine, self._batcher

    def shutting_down(self) -> APIError:
        """The answer to requests that come after the stop."""
        return APIError(503, "The server is shutting down; try another replica", "shutting_down",
                        headers={"Retry-After": "1"})  # fmt: skip

    @contextlib.contextmanager
    def upload(self) -> Iterator[None]:
        """Counts a request whose body is being read.

        Raises:
          APIError: 429 where too many are.
        """
        if self._uploads >= self.config.max_uploads:
            message = f"{self._uploads} requests are being read; try again in 1 s"
            raise APIError(429, message, "too_many_uploads", headers={"Retry-After": "1"})
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1

    def _open(self) -> None:
        try:
            engine = self._load()
            if self.config.warm:
                warm(engine, self.config.max_batch)
        except BaseException as error:
            # Whatever it is, it must reach the main thread, which waits in the event loop.
            self.state = "failed"
            if self._on_failure is None:
                _log.error("the model cannot be loaded", exc_info=error)
            else:
                self._on_failure(error)
            return
        names = (engine.info.name, *self.names, "deepgen")
        self.names = tuple(dict.fromkeys(names))
        self._engine, self._batcher = engine, Batcher(engine, self.config, self.metrics)
        self.created = int(time.time())
        if self.state == "loading":
            self.state = "ready"
            self.metrics.ready.set(1)


def warm(engine: Engine, max_batch: int) -> None:
    """Compiles the programs of the usual sizes for all batch sizes."""
    jobs, sizes = engine.usual_jobs(), engine.row_sizes(max_batch)
    start = time.monotonic()
    for rows in sizes:
        for job in jobs:
            job = dataclasses.replace(job, steps=min(job.steps, 2))
            engine.check(job)
            engine.run([job], rows, lambda *_: None, lambda *_: None)
            what = f"{job.kind} of {job.width}x{job.height}{' with a mask' if job.mask is not None else ''}"
            _log.info("compiled %s, batch %d (%.0f s)", what, rows, time.monotonic() - start)
