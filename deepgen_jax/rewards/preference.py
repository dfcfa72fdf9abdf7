"""Preference reward: win rates from a judge that compares the images of a group in pairs."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.base import Missing, Reward, RewardSample, Scores
from deepgen_jax.rewards.client import ClientConfig, RequestFailed
from deepgen_jax.rewards.judge import ANSWER, Judge, check_template, filled

_VERDICT = re.compile(r"\bimage\s+([12])\s+is\s+better\b", re.IGNORECASE)

#: Index of the first image, of the second (None where an image is missing), the judge's text (None where it failed).
Verdict = tuple[int | None, int | None, str | None]


def parse_verdict(text: str | None) -> int | None:
    """Which image a judge prefers: 0 the first, 1 the second, None for a tie or an answer that cannot be read.

    Only what stands inside ``<answer>`` counts, and only if it names one image as better and not both.
    """
    named = {number for answer in ANSWER.findall(text or "") for number in _VERDICT.findall(answer)}
    return int(named.pop()) - 1 if len(named) == 1 else None


def win_rates(n: int, verdicts: Iterable[Verdict]) -> np.ndarray:
    """Share of its comparisons that each of ``n`` images wins.

    A tie, or a missing or unreadable answer, is half a win for both. A pair with a missing index is skipped.

    Returns:
      float64 [n] in 0..1, rounded to three digits; 0 for an image that was never compared.

    Raises:
      DeepGenError: an index is not in 0..n-1.
    """
    wins, comparisons = np.zeros(n), np.zeros(n)
    for first, second, text in verdicts:
        if first is None or second is None:
            continue
        if not (0 <= first < n and 0 <= second < n):
            raise DeepGenError(f"verdict compares images {first} and {second} of a group of {n}")
        preferred = parse_verdict(text)
        for position, index in enumerate((first, second)):
            comparisons[index] += 1
            wins[index] += 0.5 if preferred is None else float(preferred == position)
    return np.round(wins / np.maximum(comparisons, 1), 3)


TEMPLATE = "Compare these two images based on the prompt: {prompt}\nWhich image is better?"


class PreferenceReward(Reward):
    """Win rate of an image against the others of its group (paper, appendix B).

    All pairs of a group go to a judge, which answers "Image 1 is better" or "Image 2 is better" inside ``<answer>``. A
    comparison without a reply is left out. A reply without an answer counts half to both as in `win_rates`, and is
    noted; but an image that got no answer at all has no score.

    Args:
      url, model, max_tokens, quality, client: of the `Judge`.
      both_orders: ask about each pair twice, with the images exchanged, since judges tend to favour a place.
      template: the question; ``{prompt}`` stands for the prompt.
    """

    needs_group = True

    def __init__(
        self,
        url: str,
        model: str = "UnifiedReward-Think",
        both_orders: bool = False,
        template: str = TEMPLATE,
        max_tokens: int = 2048,
        quality: int = 95,
        client: ClientConfig | Mapping[str, Any] | None = None,
    ) -> None:
        check_template(template)
        self.both_orders, self.template = both_orders, template
        self._judge = Judge(url, model, max_tokens, quality, client)

    async def score(self, samples: Sequence[RewardSample]) -> Scores:
        groups: dict[int, list[int]] = {}
        for place, sample in enumerate(samples):
            groups.setdefault(sample.group, []).append(place)
        notes: Counter[str] = Counter()
        results: list[float | Missing] = [Missing("")] * len(samples)
        scored = await asyncio.gather(*(self._group([samples[i] for i in places], notes) for places in groups.values()))
        for places, scores in zip(groups.values(), scored, strict=True):
            for place, score in zip(places, scores, strict=True):
                results[place] = score
        return Scores.of(results, notes)

    def counts(self) -> Counter[str]:
        return self._judge.client.counts.copy()

    async def close(self) -> None:
        await self._judge.client.close()

    async def _group(self, samples: Sequence[RewardSample], notes: Counter[str]) -> list[float | Missing]:
        if len(samples) < 2:
            return [Missing("there is no other image to compare with", permanent=True)] * len(samples)
        images = await asyncio.gather(*(asyncio.to_thread(self._judge.data_url, s.image) for s in samples))
        pairs = list(itertools.combinations(range(len(samples)), 2))
        if self.both_orders:
            pairs += [(second, first) for first, second in pairs]
        replies = await asyncio.gather(*(self._compare(samples[i].prompt, images[i], images[j]) for i, j in pairs))

        verdicts: list[Verdict] = []
        answered: set[int] = set()
        reasons: dict[int, Counter[str]] = {i: Counter() for i in range(len(samples))}
        for pair, reply in zip(pairs, replies, strict=True):
            if isinstance(reply, str):
                verdicts.append((*pair, reply))
            if isinstance(reply, str) and _has_answer(reply):
                answered.update(pair)
                continue
            reason = reply.reason if isinstance(reply, Missing) else "no <answer> in the reply"
            notes[reason] += 1
            for i in pair:
                reasons[i][reason] += 1
        rates = win_rates(len(samples), verdicts)
        return [float(rates[i]) if i in answered else Missing(reasons[i].most_common(1)[0][0]) for i in reasons]

    async def _compare(self, prompt: str, first: str, second: str) -> str | Missing:
        try:
            return await self._judge.ask(filled(self.template, prompt), [first, second], _has_answer)
        except RequestFailed as failure:
            return Missing(str(failure))


def _has_answer(reply: str) -> bool:
    return ANSWER.search(reply) is not None
