"""Output folders and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepgen_jax.errors import DeepGenError

#: Room left free on the disk beside what is written.
_SPARE_BYTES = 64 * 2**20


@contextlib.contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a path beside ``out`` to write a folder or a file to; it becomes ``out`` when the block ends well.

    Whatever else ends the block (an error, Ctrl-C, SIGTERM) removes what was written and leaves ``out`` as it was.

    Raises:
      DeepGenError: ``out`` exists and ``overwrite`` is False, or its parent cannot be written to.
    """
    out = out.absolute()
    if os.path.lexists(out) and not overwrite:
        raise DeepGenError(f"{out} exists; choose another --out or pass --overwrite")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise DeepGenError(f"{out.parent} cannot be written to ({error.strerror}); choose another --out") from None
    try:
        with _terminated_as_exception():
            yield partial
            _replace(partial, out)
    except BaseException as error:
        _remove(partial)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            what = error.filename or out
            raise DeepGenError(f"{what}: {error.strerror or error}; nothing was written") from error
        raise


def _replace(partial: Path, out: Path) -> None:
    """Renames ``partial`` to ``out``; an ``out`` that is there is put aside first and removed last."""
    if not os.path.lexists(out):
        partial.rename(out)
        return
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


def require_space(path: Path, needed: int) -> None:
    """Raises unless the disk that ``path`` will be on has ``needed`` bytes to spare."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed + _SPARE_BYTES:
        raise DeepGenError(
            f"{path} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free; "
            "free some space or choose another --out"
        )
