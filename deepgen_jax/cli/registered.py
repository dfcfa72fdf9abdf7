"""What higher layers add to the registries of lower ones, which never name them; imported by commands that need it."""

from __future__ import annotations

from deepgen_jax.evaluation.registry import BENCHMARKS
from deepgen_jax.stores.model_folder import NANO

BENCHMARKS.register(NANO, "deepgen_jax.nano.benchmark:NanoBenchmark")

__all__ = ["BENCHMARKS"]
