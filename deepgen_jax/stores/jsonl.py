"""Logs of one JSON object a line, each with a "step", in ascending order."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import write_error


class LineWriter:
    """Appends objects to a file, flushed one by one; a context manager."""

    def __init__(self, path: Path) -> None:
        """Opens ``path``, which is made where it does not exist.

        Raises:
          DeepGenError: it cannot be written.
        """
        self.path = path
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._error(error) from error

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one line; numbers that are not finite become null, as JSON has none."""
        try:
            self._file.write(json.dumps(plain(values), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Writes what a full disk has held back; the file is closed in any case.

        Raises:
          DeepGenError: it cannot be written.
        """
        try:
            self._file.close()
        except OSError as error:
            raise self._error(error) from error

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _error(self, error: OSError) -> DeepGenError:
        return write_error(self.path, error)


def plain(value: Any) -> Any:
    """``value`` with arrays as lists, scalars of any library as floats, and None for what is not finite."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) or getattr(value, "shape", None):
        return [plain(item) for item in value]
    number = float(value)
    return number if math.isfinite(number) else None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log that may be growing; incomplete lines, such as the last one after a kill, are skipped.

    Raises:
      OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for line in file:
            entry = _parsed(line)
            if entry is not None:
                yield entry


def last_line(path: Path) -> dict[str, Any] | None:
    """The newest whole line of a log, found from its end; None if there is none."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            if not end:
                return None
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                while end:
                    start = view.rfind(b"\n", 0, end - 1) + 1
                    entry = _parsed(view[start:end])
                    if entry is not None:
                        return entry
                    end = start
    except OSError:
        return None
    return None


def truncate(path: Path, last_step: int) -> None:
    """Removes entries of steps after ``last_step`` and a half-written end; does nothing where there is no file.

    Lines are read from the end and the file is truncated in place, so that the time does not grow with the log and an
    interruption leaves it either truncated or untouched.

    Raises:
      DeepGenError: the file cannot be changed.
    """
    try:
        with path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            if not end:
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                whole = True
                while end:
                    start = view.rfind(b"\n", 0, end - 1) + 1
                    entry = _parsed(view[start:end])
                    if entry is not None and entry["step"] <= last_step:
                        whole = view[end - 1 : end] == b"\n"
                        break
                    end = start
            file.truncate(end)
            if not whole:
                file.seek(end)
                file.write(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise DeepGenError(f"{path} cannot be cut to step {last_step}: {error.strerror or error}") from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
