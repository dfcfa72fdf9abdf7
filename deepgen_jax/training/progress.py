"""Progress of a run, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType

from tqdm import tqdm

from deepgen_jax.terminal import Waiting, progress_bar
from deepgen_jax.training.tracking import Metric

#: Plain lines of a whole run.
_LINES = 20
#: Metric -> how it is shown.
_SHOWN = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "samples_per_second": "{:.3g} samples/s",
}


class Progress:
    """Shows steps, loss, learning rate, speed and the share of waiting for data; a context manager.

    Until the first step is done, it says that programs are being compiled. The time left is estimated from the steps
    after that one.
    """

    def __init__(self, total: int, start_step: int = 0) -> None:
        """``total`` optimiser steps, of which ``start_step`` are done."""
        self._total, self._step = total, start_step
        self._every = max(1, total // _LINES)
        self._began = time.monotonic()
        #: Step and time from which the speed is measured.
        self._first: tuple[int, float] | None = None
        self._bar: tqdm | None = None
        self._compiling = Waiting("compiling (first step)")

    def show(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """``step`` steps are done, the last with ``metrics``; called with ascending steps, not necessarily all."""
        if self._first is None:
            self._compiling.close()
            self._first = step, time.monotonic()
            self._bar = progress_bar(self._total, step, "steps")
            self._bar.set_description_str("", refresh=False)
        assert self._bar is not None
        text = "  ".join(_parts(metrics))
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step // self._every > self._step // self._every or step >= self._total:
            elapsed = tqdm.format_interval(time.monotonic() - self._began)
            seconds = self._left(step)
            left = "" if seconds is None else f", {tqdm.format_interval(seconds)} left"
            print(f"deepgen: step {step}/{self._total}  {text}  ({elapsed} elapsed{left})", file=sys.stderr, flush=True)
        self._step = step

    def _left(self, step: int) -> float | None:
        """Seconds left at the speed since the first step; None if no other was taken."""
        assert self._first is not None
        first, began = self._first
        return None if step == first else (time.monotonic() - began) / (step - first) * max(self._total - step, 0)

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        self._compiling.close()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parts(metrics: Mapping[str, Metric]) -> Iterator[str]:
    for name, form in _SHOWN.items():
        value = metrics.get(name)
        if isinstance(value, int | float):
            yield form.format(value)
    for name, value in metrics.items():
        group, _, rest = name.partition("/")
        if group == "reward" and rest.endswith("/mean") and "@" not in rest and isinstance(value, int | float):
            yield f"{rest.removesuffix('/mean')} {value:.3f}"
    data, whole = metrics.get("seconds/data"), metrics.get("seconds/step")
    if isinstance(data, int | float) and isinstance(whole, int | float) and whole > 0:
        yield f"data wait {data / whole:.0%}"
