"""Text accuracy of what a vision-language model reads in an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepgen_jax.rewards.base import Missing, RewardSample
from deepgen_jax.rewards.client import ClientConfig
from deepgen_jax.rewards.ocr import NO_TEXT, target_text, text_accuracy
from deepgen_jax.rewards.pointwise import PointwiseJudgeReward
from deepgen_jax.rewards.replies import single_answer

# The wanted text is not in the question, since a judge that knows it tends to read it.
QUESTION = (
    "Read all text in this image. Reply with exactly that text inside <answer></answer>, "
    "and with nothing between them if there is no text."
)


class OCRJudgeReward(PointwiseJudgeReward):
    """`text_accuracy` of the text inside the ``<answer>`` of a judge's reply; without one there is no score.

    Args:
      url, model, max_tokens, quality, client: of the `Judge`.
      question: what it is asked.
    """

    def __init__(
        self,
        url: str,
        model: str,
        question: str = QUESTION,
        max_tokens: int = 1024,
        quality: int = 95,
        client: ClientConfig | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(url, model, max_tokens, quality, client)
        self._question = question

    def question(self, sample: RewardSample) -> str | Missing:
        return NO_TEXT if target_text(sample.prompt) is None else self._question

    def parse(self, reply: str, sample: RewardSample) -> float | Missing:
        text = single_answer(reply)
        return Missing("no <answer> in the reply") if text is None else text_accuracy(text, sample.prompt)
