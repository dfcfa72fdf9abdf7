"""DeepGen 1.0 in JAX and Flax.

``import deepgen_jax as dg`` is light: submodules and ``DeepGenPipeline`` load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepgen_jax.inference.pipeline import DeepGenPipeline

__version__ = "0.1.0"
__all__ = ["DeepGenPipeline", "__version__"]

_SUBMODULES = ("config", "data", "evaluation", "flow", "inference", "models", "parallel", "rewards", "rl")


def __getattr__(name: str) -> Any:
    if name == "DeepGenPipeline":
        from deepgen_jax.inference.pipeline import DeepGenPipeline

        return DeepGenPipeline
    if name in _SUBMODULES:
        return importlib.import_module(f"deepgen_jax.{name}")
    raise AttributeError(f"module 'deepgen_jax' has no attribute {name!r}")
