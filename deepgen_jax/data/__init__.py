"""Training data."""

from deepgen_jax.data import transforms

__all__ = ["transforms"]
