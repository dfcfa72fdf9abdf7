"""Hides what Orbax logs of errors that it raises as well: users get one line."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


def hide() -> None:
    """Drops Orbax's warnings and errors from the log until :func:`show`."""
    logging.getLogger("absl").addFilter(_is_not_of_orbax)


def show() -> None:
    """Undoes :func:`hide`."""
    logging.getLogger("absl").removeFilter(_is_not_of_orbax)


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Drops them within the block."""
    hide()
    try:
        yield
    finally:
        show()


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING or "orbax" not in record.pathname
