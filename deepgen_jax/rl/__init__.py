"""Reinforcement learning (MR-GRPO): advantages and losses."""

from deepgen_jax.rl import advantages, losses

__all__ = ["advantages", "losses"]
