"""Logs metrics and images of a run to files in its folder, TensorBoard, and Weights & Biases."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from deepgen_jax import files
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.outputs import save_image
from deepgen_jax.stores.jsonl import LineWriter, plain, truncate
from deepgen_jax.user_warnings import warn_user

if TYPE_CHECKING:
    from PIL.Image import Image

    from deepgen_jax.training.run_config import LogConfig

#: Value of a metric at one step: a number, a list such as one value per noise-level range, or None if missing.
Metric = float | Sequence[float | None] | None

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples-{}.jsonl"
PICTURES = "pictures"


@dataclass(frozen=True)
class RunInfo:
    """Description of the run for sinks.

    Attributes:
      folder: the run's folder; it exists.
      log: logging settings of the run.
      config: the whole resolved configuration, JSON-ready.
      start_step: number of optimiser steps done before; entries of later steps are discarded.
    """

    folder: Path
    log: LogConfig
    config: Mapping[str, Any]
    start_step: int


class Sink(Protocol):
    """A destination of metrics. To add one, write a class with `open` and add it to `SINKS`."""

    @classmethod
    def open(cls, run: RunInfo) -> Sink | None:
        """Opens the sink; None if the run does not use it."""

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Logs the metrics of a step; must not block on disk or network."""

    def picture(self, step: int, name: str, image: Image, path: Path) -> None:
        """Logs an image that has been saved as ``path``."""

    def close(self, failed: bool) -> None:
        """Flushes and closes; ``failed``: the run ended with an error."""


class JsonLines:
    """`metrics.jsonl`: one object per step with "step", "time" (Unix seconds) and the metrics."""

    def __init__(self, path: Path, start_step: int) -> None:
        truncate(path, start_step)
        self._lines = LineWriter(path)

    @classmethod
    def open(cls, run: RunInfo) -> JsonLines:
        return cls(run.folder / METRICS_FILE, run.start_step)

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        self._lines.write({"step": step, "time": round(time.time(), 3), **metrics})

    def picture(self, step: int, name: str, image: Image, path: Path) -> None:
        """Does nothing: the file is already saved."""

    def close(self, failed: bool) -> None:
        self._lines.close()


class TensorBoard:
    """Event files in RUN/tensorboard, written by tensorboardX in a background thread."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def open(cls, run: RunInfo) -> TensorBoard | None:
        if not run.log.tensorboard:
            return None
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            warn_user("no TensorBoard event files, tensorboardX is missing; pip install 'deepgen-jax[log]'")
            return None
        # Also hides steps of an attempt that ended before its first checkpoint.
        writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.start_step + 1)
        text = json.dumps(run.config, indent=2)
        writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), run.start_step)
        return cls(writer)

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        for name, value in _flat(metrics).items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image, path: Path) -> None:
        self._writer.add_image(f"pictures/{name}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run; its id is stored in the run's folder, so a resumed run continues it."""

    def __init__(self, wandb: Any, run: Any) -> None:
        self._wandb, self._run = wandb, run
        # Skip steps that W&B already has: it cannot delete them, and recomputed steps are identical.
        self._last = int(run.summary.get("step") or 0)

    @classmethod
    def open(cls, run: RunInfo) -> WandB | None:
        if not run.log.wandb:
            return None
        try:
            import wandb
        except ImportError as error:
            fix = "pip install 'deepgen-jax[log]', or leave log.wandb empty"
            raise DeepGenError(f"log.wandb names a project but wandb is missing; {fix}") from error
        id_file = run.folder / "wandb-id"
        if not id_file.exists():
            files.write_text(id_file, uuid.uuid4().hex[:8])
        try:
            handle = wandb.init(
                project=run.log.wandb,
                id=id_file.read_text().strip(),
                resume="allow",
                name=run.folder.absolute().name,
                dir=str(run.folder),
                config=dict(run.config),
            )
        except Exception as error:
            text = " ".join(str(error).split())
            fix = "log in with `wandb login`, or set WANDB_MODE=offline"
            raise DeepGenError(f"the W&B run cannot be started ({text}); {fix}") from error
        # A separate step axis: pictures and metrics of a step may come in any order.
        handle.define_metric("step", hidden=True)
        handle.define_metric("*", step_metric="step")
        return cls(wandb, handle)

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        if step > self._last:
            self._run.log({"step": step, **_flat(metrics)})

    def picture(self, step: int, name: str, image: Image, path: Path) -> None:
        if step > self._last:
            self._run.log({"step": step, f"pictures/{name}": self._wandb.Image(str(path))})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


#: All kinds of sinks; `deepgen plot` reads the output of the first.
SINKS: tuple[type[Sink], ...] = (JsonLines, TensorBoard, WandB)


class Tracker:
    """Sends metrics and images to the sinks; a context manager.

    Process 0 writes metrics and images. Each process writes the ids of the samples that it reads.
    """

    def __init__(
        self,
        folder: Path,
        log: LogConfig,
        config: Mapping[str, Any],
        start_step: int = 0,
        *,
        process_index: int = 0,
        process_count: int | None = None,
    ) -> None:
        """Opens the logs of the run in ``folder`` and discards entries of steps after ``start_step``.

        Args:
          folder: the run's folder.
          log: logging settings.
          config: the whole resolved configuration, JSON-ready.
          start_step: number of optimiser steps done before.
          process_index, process_count: index of this process and number of processes; by default JAX's count.

        Raises:
          DeepGenError: a file cannot be written, or W&B is requested but unavailable.
        """
        self.folder = folder
        self._process_index = process_index
        self._sinks: list[Sink] = []
        self._samples: LineWriter | None = None
        self._open = ExitStack()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeepGenError(f"folder {folder} cannot be made: {error.strerror or error}") from error
        self._truncate_samples(start_step, jax.process_count() if process_count is None else process_count)
        try:
            if log.sample_ids:
                path = folder / SAMPLES_FILE.format(process_index)
                self._samples = self._open.enter_context(LineWriter(path))
            if process_index == 0:
                self._open_sinks(RunInfo(folder, log, config, start_step))
        except BaseException:
            self.close(failed=True)
            raise

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Logs the metrics of a step; non-finite values are null in the file and omitted elsewhere."""
        for sink in self._sinks:
            sink.log(step, metrics)

    def sample_ids(self, step: int, ids: Sequence[str]) -> None:
        """Logs the ids of the samples that this process read for a step, if enabled."""
        if self._samples is not None:
            self._samples.write({"step": step, "ids": list(ids)})

    def picture(self, step: int, name: str, image: Image) -> None:
        """Saves an image as RUN/pictures/NAME-STEP.png and logs it to the sinks."""
        if self._process_index != 0:
            return
        path = self.folder / PICTURES / f"{name}-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        save_image(image, path, {"step": step})
        for sink in self._sinks:
            sink.picture(step, name, image, path)

    def close(self, failed: bool = False) -> None:
        """Closes all sinks even if one fails to close; ``failed``: the run ended with an error."""
        with self._open:
            for sink in self._sinks:
                self._open.callback(sink.close, failed)
            self._sinks = []
            self._samples = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _open_sinks(self, run: RunInfo) -> None:
        for kind in SINKS:
            sink = kind.open(run)
            if sink is not None:
                self._sinks.append(sink)

    def _truncate_samples(self, start_step: int, process_count: int) -> None:
        # An earlier attempt may have had more processes; their files are distributed over the current ones.
        for path in sorted(self.folder.glob(SAMPLES_FILE.format("*"))):
            host = path.stem.rpartition("-")[2]
            if host.isdecimal() and int(host) % process_count == self._process_index:
                truncate(path, start_step)


def _flat(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Finite values only; item 3 of a list is named "name/03"."""
    flat: dict[str, float] = {}
    for name, value in plain(metrics).items():
        items = {f"{name}/{i:02d}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        flat |= {key: item for key, item in items.items() if item is not None}
    return flat
