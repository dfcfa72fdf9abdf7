"""Released weights -> a model folder, and back.

``import deepgen_jax.convert`` is light: the functions load what they need on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import Report, convert
    from .exporting import export
    from .quantizing import quantize

__all__ = ["Report", "convert", "export", "quantize"]

_MODULES = {"Report": "conversion", "convert": "conversion", "export": "exporting", "quantize": "quantizing"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"deepgen_jax.convert.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'deepgen_jax.convert' has no attribute {name!r}")
