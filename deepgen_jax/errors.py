"""User-facing error type, and what goes into its messages."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable


class DeepGenError(ValueError):
    """Unusable input: one line that names the problem, the place and the fix.

    The command line prints the message after ``deepgen: error:`` and exits with status 2; library users see an
    ordinary ``ValueError``.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ends an error about an unknown name: the closest known one, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"; did you mean {close[0]}?" if close else ";") + f" known: {', '.join(known) or 'none'}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class, at most 200 printable characters, to quote in a message."""
    text = next((line for line in str(error).splitlines() if line.strip()), "") or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the host or a device had no room, however the error was wrapped; XLA says it in a RuntimeError."""
    while error is not None:
        # TensorStore gives a full disk the same status.
        exhausted = "RESOURCE_EXHAUSTED" in str(error) and os.strerror(errno.ENOSPC) not in str(error)
        if isinstance(error, MemoryError) or exhausted:
            return True
        error = error.__cause__ or error.__context__
    return False
