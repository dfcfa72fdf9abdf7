"""Distance of an image's mean colour from a target: a cheap and smooth reward for testing whether a run learns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.base import LocalReward, RewardSample


class ColorTargetReward(LocalReward):
    """1 - mean over R, G, B of |mean of the image - target| / 255, in 0..1.

    Args:
      target: red, green and blue in 0..255.
    """

    def __init__(self, target: Sequence[float] = (255, 0, 0)) -> None:
        self.target = np.asarray(target, np.float64)
        if self.target.shape != (3,) or not ((self.target >= 0) & (self.target <= 255)).all():
            raise DeepGenError(f"target is {target}; give red, green and blue from 0 to 255")

    def score_one(self, sample: RewardSample) -> float:
        mean = sample.image.mean(axis=(0, 1), dtype=np.float64)
        return 1 - float(np.abs(mean - self.target).mean()) / 255
