"""Progress in bytes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the number of bytes done; the bar is shown on terminals only."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
