"""The one exception whose text is meant for the person at the keyboard."""

from __future__ import annotations


class DeepGenError(ValueError):
    """Input that cannot be used: one line that names the thing and the mend.

    The command line prints the message after ``deepgen: error:`` and exits with status 2; library users see an
    ordinary ``ValueError``.
    """
