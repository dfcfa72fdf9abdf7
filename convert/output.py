"""Output folders and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepgen_jax import files, locks
from deepgen_jax.errors import DeepGenError


@contextlib.contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a path beside ``out`` to write a folder or a file to; it becomes ``out`` when the block ends well.

    An error, Ctrl-C or SIGTERM removes what was written and leaves ``out`` as it was.

    Raises:
      DeepGenError: ``out`` exists and ``overwrite`` is False, another process writes it, or its parent cannot be
        written to.
    """
    out = out.absolute()
    if os.path.lexists(out) and not overwrite:
        raise DeepGenError(f"{out} exists; choose another --out or pass --overwrite")
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeepGenError(f"{out.parent} cannot be written to ({error.strerror}); choose another --out") from None
    try:
        with _terminated_as_exception(), locks.locked_output(out), files.replacing(out) as partial:
            yield partial
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """SIGTERM raises SystemExit inside the block, so that cleaning up happens.

    Only the main thread can arrange it, and a program that handles the signal by itself is left to do so.
    """
    handled = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    if handled or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
