"""Public benchmarks: reading their inputs, laying out images as official scorers read them, scoring, reports."""

from deepgen_jax.evaluation import cvtg

__all__ = ["cvtg"]
