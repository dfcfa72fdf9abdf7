"""The one exception whose text is meant for the person at the keyboard, and what others mean."""

from __future__ import annotations


class DeepGenError(ValueError):
    """Input that cannot be used: one line that names the thing and the mend.

    The command line prints the message after ``deepgen: error:`` and exits with status 2; library users see an
    ordinary ``ValueError``.
    """


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the host or a device had no room, however the error was wrapped; XLA says it in a RuntimeError."""
    while error is not None:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
