"""Warnings for users: what is worth knowing but no error, such as a size that was rounded.

Library code calls `warn_user`, which issues an ordinary Python warning of category `DeepGenWarning`; the command line
shows each different one once, as ``deepgen: note: ...`` on stderr.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any


class DeepGenWarning(UserWarning):
    """Category of these warnings, so that a program can silence or collect them with `warnings`."""


def warn_user(message: str, stacklevel: int = 2) -> None:
    """Warns with ``message``; ``stacklevel`` counts from the function that calls this one."""
    warnings.warn(message, DeepGenWarning, stacklevel=stacklevel + 1)


@contextlib.contextmanager
def collect_warnings(show: Callable[[str], None]) -> Iterator[None]:
    """Within the block, passes each different warning to ``show`` once; other warnings are shown as usual.

    Pillow's warnings are dropped: what they report (broken metadata, large pictures) is either harmless or an error
    with a message from this package.
    """
    seen: set[str] = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        warnings.simplefilter("always", DeepGenWarning)
        usual = warnings.showwarning

        def showwarning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
            if not issubclass(category, DeepGenWarning):
                usual(message, category, *args, **kwargs)
            elif str(message) not in seen:
                seen.add(str(message))
                show(str(message))

        warnings.showwarning = showwarning
        yield
