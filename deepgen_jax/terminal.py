"""Progress of long work, on stderr."""

from __future__ import annotations

import sys
import threading
from types import TracebackType

from tqdm import tqdm


def progress_bar(total: int, done: int, unit: str) -> tqdm:
    """A bar on stderr, shown only where that is a terminal; its description says "compiling" until it is replaced.

    Args:
      total, done: how many there are in all, and how many there were before.
      unit: what is counted, in the plural.
    """
    return tqdm(
        total=total,
        initial=done,
        desc="compiling ",
        unit=f" {unit}",
        bar_format=f"{{desc}}{{percentage:3.0f}}%|{{bar}}| {{n_fmt}}/{{total_fmt}} {unit} "
        "[{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]",
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    )


class Waiting:
    """Says that something long has begun: with a running clock on a terminal, one plain line elsewhere.

    A context manager; `close` removes the clock.
    """

    def __init__(self, text: str) -> None:
        """Shows ``text``, such as "compiling (first step)"."""
        self._closed = threading.Event()
        self._clock: tqdm | None = None
        if sys.stderr.isatty():
            self._clock = tqdm(bar_format=f"{text} {{elapsed}}", leave=False, dynamic_ncols=True)
            # A compiling program does not return to the interpreter's main thread for minutes.
            self._thread = threading.Thread(target=self._tick, args=(self._clock,), daemon=True)
            self._thread.start()
        else:
            print(f"deepgen: {text}", file=sys.stderr, flush=True)

    def _tick(self, clock: tqdm) -> None:
        while not self._closed.wait(1):
            clock.refresh()

    def close(self) -> None:
        """Removes the clock; may be called again."""
        if not self._closed.is_set():
            self._closed.set()
            if self._clock is not None:
                self._thread.join()
                self._clock.close()

    def __enter__(self) -> Waiting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
