"""Scores that a judge gives to single images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.base import Missing, RewardSample
from deepgen_jax.rewards.client import ClientConfig
from deepgen_jax.rewards.judge import check_template, fill_template
from deepgen_jax.rewards.pointwise import PointwiseJudgeReward
from deepgen_jax.rewards.ratings import read_score

TEMPLATE = (
    "Rate how well this image shows what the prompt asks for, and how good it looks.\n"
    "Prompt: {prompt}\n"
    "Reply with one number from {low} to {high} inside <answer></answer>."
)


class JudgeScoreReward(PointwiseJudgeReward):
    """The number that a judge gives (see `ratings.read_score`), scaled from low..high to 0..1.

    Args:
      url, model, max_tokens, quality, client: of the `Judge`.
      low, high: worst and best number.
      template: the question; ``{prompt}``, ``{low}`` and ``{high}`` are replaced by their values.
    """

    def __init__(
        self,
        url: str,
        model: str,
        low: float = 0.0,
        high: float = 10.0,
        template: str = TEMPLATE,
        max_tokens: int = 1024,
        quality: int = 95,
        client: ClientConfig | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(url, model, max_tokens, quality, client)
        check_template(template)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise DeepGenError(f"low {low} and high {high} are no range; low must be the smaller")
        self.low, self.high = low, high
        self._template = template.replace("{low}", f"{low:g}").replace("{high}", f"{high:g}")

    def question(self, sample: RewardSample) -> str:
        return fill_template(self._template, sample.prompt)

    def parse(self, reply: str, sample: RewardSample) -> float | Missing:
        value = read_score(reply, self.low, self.high)
        return value if isinstance(value, Missing) else (value - self.low) / (self.high - self.low)
