"""Base of rewards by a judge that looks at one image at a time."""

from __future__ import annotations

import abc
import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from deepgen_jax.rewards.base import Missing, Reward, RewardSample, Scores
from deepgen_jax.rewards.client import ClientConfig, RequestFailed
from deepgen_jax.rewards.judge import Judge
from deepgen_jax.rewards.replies import excerpt


class PointwiseJudgeReward(Reward):
    """A judge's reply about each image, turned into a score.

    Args:
      url, model, max_tokens, quality, client: of the `Judge`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        max_tokens: int = 1024,
        quality: int = 95,
        client: ClientConfig | Mapping[str, Any] | None = None,
    ) -> None:
        self._judge = Judge(url, model, max_tokens, quality, client)

    @abc.abstractmethod
    def question(self, sample: RewardSample) -> str | Missing:
        """The question about the image, or the reason for not asking."""

    @abc.abstractmethod
    def parse(self, reply: str, sample: RewardSample) -> float | Missing:
        """The score that a reply, or its `replies.excerpt`, means."""

    async def score(self, samples: Sequence[RewardSample]) -> Scores:
        return Scores.of(await asyncio.gather(*(self._one(sample) for sample in samples)))

    def counts(self) -> Counter[str]:
        return self._judge.client.counts.copy()

    async def close(self) -> None:
        await self._judge.client.close()

    async def _one(self, sample: RewardSample) -> float | Missing:
        question = self.question(sample)
        if isinstance(question, Missing):
            return question
        image = await asyncio.to_thread(self._judge.data_url, sample.image)

        def read(reply: str) -> str | Missing:
            score = self.parse(reply, sample)
            return score if isinstance(score, Missing) else excerpt(reply)

        try:
            reply = await self._judge.ask(question, [image], read)
        except RequestFailed as failure:
            return Missing(str(failure))
        return reply if isinstance(reply, Missing) else self.parse(str(reply), sample)
