"""Rewards of generated images; `registry` lists them, `mixture` runs several at once."""

from deepgen_jax.rewards import ocr, preference
from deepgen_jax.rewards.base import Missing, Reward, RewardSample, Scores
from deepgen_jax.rewards.registry import RewardConfig, make

__all__ = ["Missing", "Reward", "RewardConfig", "RewardSample", "Scores", "make", "ocr", "preference"]
