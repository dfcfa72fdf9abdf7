"""Rewards of generated images."""

from deepgen_jax.rewards import ocr, preference

__all__ = ["ocr", "preference"]
