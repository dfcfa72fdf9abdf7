"""Where the metrics and pictures of a run go: files in its folder, TensorBoard, Weights & Biases."""

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

#: A metric of one step: a number, or several such as one for each range of noise levels; None where there is none.
Metric = float | Sequence[float | None] | None

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples-{}.jsonl"
PICTURES = "pictures"


@dataclass(frozen=True)
class RunInfo:
    """Information for sinks about the run.

    Attributes:
      folder: the run's folder; it exists.
      log: the run's settings.
      config: the whole resolved configuration, JSON-ready.
      start_step: optimiser steps that were done before; later ones that were logged are discarded.
    """

    folder: Path
    log: LogConfig
    config: Mapping[str, Any]
    start_step: int


class Sink(Protocol):
    """One place where metrics go. A new one is a class with `open`, added to `SINKS`."""

    @classmethod
    def open(cls, run: RunInfo) -> Sink | None:
        """The sink, ready to log; None where the run does not ask for it."""

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Takes the metrics of a step; must not wait for a disk's or network's answer."""

    def picture(self, step: int, name: str, image: Image, path: Path) -> None:
        """Takes a picture that has been saved as ``path``."""

    def close(self, failed: bool) -> None:
        """Flushes; ``failed`` says whether the run ends with an error."""


class JsonLines:
    """`metrics.jsonl`: one object a step with "step", "time" (seconds since 1970) and the metrics."""

    def __init__(self, path: Path, start_step: int) -> None:
        truncate(path, start_step)
        self._lines = LineWriter(path)

    @classmethod
    def open(cls, run: RunInfo) -> JsonLines:
        return cls(run.folder / METRICS_FILE, run.start_step)

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        self._lines.write({"step": step, "time": round(time.time(), 3), **metrics})

    def picture(self, step: int, name: str, image: Image, path: Path) -> None:
        """The file is enough."""

    def close(self, failed: bool) -> None:
        self._lines.close()


class TensorBoard:
    """Event files in RUN/tensorboard, written by a thread of tensorboardX."""

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
        # A folder may hold steps of an attempt that ended before its first checkpoint; they are hidden as well.
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
    """A Weights & Biases run; its id is kept in the run's folder, so that a resumed run continues it."""

    def __init__(self, wandb: Any, run: Any) -> None:
        self._wandb, self._run = wandb, run
        # Steps that are there already come out the same again; W&B cannot forget them.
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


#: Every kind of sink; the first is what `deepgen plot` reads.
SINKS: tuple[type[Sink], ...] = (JsonLines, TensorBoard, WandB)


class Tracker:
    """Hands metrics and pictures to the sinks; a context manager.

    Only process 0 writes metrics and pictures. Each process writes the ids of the samples that it reads.
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
        """Opens the logs of the run in ``folder``, and drops what they say of steps after ``start_step``.

        Args:
          folder: of the run.
          log: what is asked for.
          config: the whole resolved configuration, JSON-ready.
          start_step: optimiser steps that were done before.
          process_index, process_count: which of how many processes this is; by default their number is JAX's.

        Raises:
          DeepGenError: a file cannot be written, or W&B is asked for and not to be had.
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
        """Logs the metrics of a step; what is not finite becomes null in the file and is left out elsewhere."""
        for sink in self._sinks:
            sink.log(step, metrics)

    def sample_ids(self, step: int, ids: Sequence[str]) -> None:
        """Notes which samples this process read for a step, where the run asks for it."""
        if self._samples is not None:
            self._samples.write({"step": step, "ids": list(ids)})

    def picture(self, step: int, name: str, image: Image) -> None:
        """Saves a picture as RUN/pictures/NAME-STEP.png and shows it in the sinks."""
        if self._process_index != 0:
            return
        path = self.folder / PICTURES / f"{name}-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        save_image(image, path, {"step": step})
        for sink in self._sinks:
            sink.picture(step, name, image, path)

    def close(self, failed: bool = False) -> None:
        """Closes every sink, also when one of them fails to; ``failed`` says whether the run ends with an error."""
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
        # An earlier attempt may have had more processes; each of their files falls to one of ours.
        for path in sorted(self.folder.glob(SAMPLES_FILE.format("*"))):
            host = path.stem.rpartition("-")[2]
            if host.isdecimal() and int(host) % process_count == self._process_index:
                truncate(path, start_step)


def _flat(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Finite numbers alone; item 3 of a list is called "name/03"."""
    flat: dict[str, float] = {}
    for name, value in plain(metrics).items():
        items = {f"{name}/{i:02d}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        flat |= {key: item for key, item in items.items() if item is not None}
    return flat
