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
from deepgen_jax.rewards.judge import Judge, check_template, fill_template
from deepgen_jax.rewards.replies import find_answers
from deepgen_jax.rewards.verdicts import Verdict, read_verdict

_RELEASED = re.compile(r"\bimage\s+([12])\s+is\s+better\b", re.IGNORECASE)

#: Index of the first image, of the second (None where an image is missing), the judge's text (None where it failed).
Comparison = tuple[int | None, int | None, str | None]


def parse_verdict(text: str | None) -> int | None:
    """The verdict by the released trainer's rule: 0 for the first image, 1 for the second, None for anything else.

    Only "Image 1 is better" or "Image 2 is better" inside ``<answer>`` counts, and only if one image is named so. The
    reward itself reads more wordings, see `verdicts.read_verdict`.
    """
    named = {number for answer in find_answers(text) for number in _RELEASED.findall(answer)}
    return int(named.pop()) - 1 if len(named) == 1 else None


def win_rates(n: int, verdicts: Iterable[Comparison]) -> np.ndarray:
    """Share of its comparisons that each of ``n`` images wins, by the released trainer's rule (`parse_verdict`).

    Any text without a verdict, or None, is half a win for both. A pair with a missing index is skipped.

    Returns:
      float64 [n] in 0..1, rounded to three digits; 0 for an image that was never compared.

    Raises:
      DeepGenError: an index is not in 0..n-1.
    """
    points = {0: 1.0, 1: 0.0, None: 0.5}
    return _rates(n, ((first, second, points[parse_verdict(text)]) for first, second, text in verdicts))


def _rates(n: int, comparisons: Iterable[tuple[int | None, int | None, float]]) -> np.ndarray:
    """As `win_rates`, of (first index, second index, the first image's share of the win)."""
    wins, number = np.zeros(n), np.zeros(n)
    for first, second, share in comparisons:
        if first is None or second is None:
            continue
        if not (0 <= first < n and 0 <= second < n):
            raise DeepGenError(f"verdict compares images {first} and {second} of a group of {n}")
        wins[first] += share
        wins[second] += 1 - share
        number[[first, second]] += 1
    return np.round(wins / np.maximum(number, 1), 3)


TEMPLATE = "Compare these two images based on the prompt: {prompt}\nWhich image is better?"


class PreferenceReward(Reward):
    """Win rate of an image against the others of its group (paper, appendix B).

    All pairs of a group go to a judge, whose replies `verdicts.read_verdict` reads. A comparison without a reply is
    left out. An unreadable reply is half a win for both, as in the released trainer. Both are counted by reason in
    ``Scores.notes``. An image without any readable reply has no score, nor has a group without one.

    Args:
      url, model, max_tokens, quality, client: of the `Judge`.
      both_orders: ask about each pair twice, with the images exchanged, since judges tend to favour a place.
      template: the question; ``{prompt}`` is replaced by the prompt.
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
        verdicts = await asyncio.gather(*(self._compare(samples[i].prompt, images[i], images[j]) for i, j in pairs))

        shares = {"first": 1.0, "second": 0.0, "tie": 0.5}
        comparisons: list[tuple[int, int, float]] = []
        readable: set[int] = set()
        reasons: dict[int, Counter[str]] = {i: Counter() for i in range(len(samples))}
        for pair, verdict in zip(pairs, verdicts, strict=True):
            if isinstance(verdict, _NoReply):
                reason = verdict.reason
            elif isinstance(verdict, Missing):
                comparisons.append((*pair, 0.5))
                reason = verdict.reason
            else:
                comparisons.append((*pair, shares[verdict]))
                readable.update(pair)
                continue
            notes[reason] += 1
            for i in pair:
                reasons[i][reason] += 1
        rates = _rates(len(samples), comparisons)
        return [float(rates[i]) if i in readable else Missing(reasons[i].most_common(1)[0][0]) for i in reasons]

    async def _compare(self, prompt: str, first: str, second: str) -> Verdict | Missing:
        try:
            answer = await self._judge.ask(fill_template(self.template, prompt), [first, second], read_verdict)
        except RequestFailed as failure:
            return _NoReply(str(failure))
        # A verdict from the cache may be the text of a reply, as earlier versions kept it.
        return answer if isinstance(answer, Missing) else read_verdict(str(answer))


class _NoReply(Missing):
    """The request for a comparison failed."""
