"""Compressibility: rewards small JPEG files, or large ones."""

from __future__ import annotations

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.base import LocalReward, RewardSample
from deepgen_jax.rewards.image_codec import encode

#: Kilobytes (1000 bytes) per unit of the reward.
_UNIT = 500


class JPEGReward(LocalReward):
    """``sign`` x size of the JPEG file in kB / 500.

    Args:
      sign: -1 rewards compressibility, +1 incompressibility.
      quality: of the JPEG file.
    """

    def __init__(self, sign: int = -1, quality: int = 95) -> None:
        if sign not in (-1, 1):
            raise DeepGenError(f"sign is {sign}; use -1 for compressibility or 1 for the opposite")
        self.sign, self.quality = sign, quality

    def score_one(self, sample: RewardSample) -> float:
        return self.sign * len(encode(sample.image, "JPEG", self.quality)) / 1000 / _UNIT
