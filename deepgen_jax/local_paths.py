"""Local paths: the type of settings that hold one, and the refusal of URLs wherever one is taken."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from deepgen_jax.errors import DeepGenError

#: Type of a configuration's field that holds a local path, for :func:`refuse_urls`.
LocalPath = Annotated[str, "local path"]
# Also "gs:/bucket", which pathlib makes of "gs://bucket".
_URL = re.compile(r"\s*([A-Za-z][\w+.-]+(?:::[\w+.-]+)*):/+")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, such as ``gs://bucket/name``; ``./gs:/name`` is a local path."""
    return _URL.match(os.fspath(path)) is not None


def refuse_url(path: str | os.PathLike[str], where: str) -> None:
    """Raises a DeepGenError where a local path is expected and ``path`` is a URL.

    Args:
      path: as the user gave it.
      where: begins the message, such as "--out" or "samples.images".
    """
    if is_url(path):
        url = os.fspath(path)
        if "://" not in url:
            url = url.replace(":/", ":///" if url.startswith("file") else "://", 1)
        raise DeepGenError(f"{where} is the URL {url}, but must be a local path; copy it to a disk or mount the store")


def refuse_urls(settings: Any, name: Callable[[str], str] = str) -> None:
    """:func:`refuse_url` for every field of type `Path` or `LocalPath` of a dataclass and of those inside it.

    Args:
      settings: a dataclass instance.
      name: what to call a field in the message, from its dotted name.
    """
    _refuse_urls(settings, "", name)


def _refuse_urls(settings: Any, prefix: str, name: Callable[[str], str]) -> None:
    hints = get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        values = value if isinstance(value, tuple | list) else (value,)
        for one in values:
            if dataclasses.is_dataclass(one) and not isinstance(one, type):
                _refuse_urls(one, f"{prefix}{field.name}.", name)
            elif isinstance(one, str | os.PathLike) and is_path_type(hints[field.name]):
                refuse_url(one, name(f"{prefix}{field.name}"))


def is_path_type(hint: Any) -> bool:
    """Whether a type hint is, or contains, `Path` or `LocalPath`."""
    if "local path" in getattr(hint, "__metadata__", ()) or (isinstance(hint, type) and issubclass(hint, Path)):
        return True
    return any(is_path_type(inner) for inner in get_args(hint))
