"""Scores that a judge gives to single images."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.base import Missing, RewardSample
from deepgen_jax.rewards.client import ClientConfig
from deepgen_jax.rewards.judge import answer_of, check_template, filled
from deepgen_jax.rewards.pointwise import PointwiseJudgeReward

TEMPLATE = (
    "Rate how well this image shows what the prompt asks for, and how good it looks.\n"
    "Prompt: {prompt}\n"
    "Reply with one number from {low} to {high} inside <answer></answer>."
)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


class JudgeScoreReward(PointwiseJudgeReward):
    """The number that a judge gives, scaled from low..high to 0..1.

    The reply must be one number, or hold one ``<answer>`` with nothing but a number in it. Anything else, and a number
    out of range, is no score.

    Args:
      url, model, max_tokens, quality, client: of the `Judge`.
      low, high: worst and best number.
      template: the question; ``{prompt}``, ``{low}`` and ``{high}`` stand for their values.
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
        return filled(self._template, sample.prompt)

    def parse(self, reply: str, sample: RewardSample) -> float | Missing:
        answer = answer_of(reply) if "<answer" in reply.lower() else reply.strip()
        if answer is None or not _NUMBER.fullmatch(answer):
            return Missing("no number in the reply")
        value = float(answer)
        if not self.low <= value <= self.high:
            return Missing("number out of range")
        return (value - self.low) / (self.high - self.low)
