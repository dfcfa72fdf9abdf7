"""Rewards of generated images: `registry` finds them by name, `mixture` computes several at once."""

from deepgen_jax.rewards import ocr, preference
from deepgen_jax.rewards.base import Missing, Reward, RewardSample, Scores
from deepgen_jax.rewards.registry import RewardConfig, make, register

__all__ = ["Missing", "Reward", "RewardConfig", "RewardSample", "Scores", "make", "ocr", "preference", "register"]
