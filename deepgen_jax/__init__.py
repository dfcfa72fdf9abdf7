"""DeepGen 1.0 in JAX and Flax.

``import deepgen_jax as dg`` is light: submodules and ``DeepGenPipeline`` load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepgen_jax.errors import DeepGenError
    from deepgen_jax.inference.pipeline import DeepGenPipeline
    from deepgen_jax.user_warnings import DeepGenWarning

__version__ = "0.1.0"
__all__ = ["DeepGenError", "DeepGenPipeline", "DeepGenWarning", "__version__"]

_SUBMODULES = (
    "config", "data", "errors", "evaluation", "files", "flow", "inference", "models", "parallel", "registry", "rewards",
    "rl", "stores", "training",
)  # fmt: skip
_NAMES = {
    "DeepGenError": "deepgen_jax.errors",
    "DeepGenPipeline": "deepgen_jax.inference.pipeline",
    "DeepGenWarning": "deepgen_jax.user_warnings",
}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"deepgen_jax.{name}")
    raise AttributeError(f"module 'deepgen_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
