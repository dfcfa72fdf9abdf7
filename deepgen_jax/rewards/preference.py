"""Preference reward: win rates from a judge that compares the images of a group in pairs."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from deepgen_jax.errors import DeepGenError

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_VERDICT = re.compile(r"\bimage\s+([12])\s+is\s+better\b", re.IGNORECASE)

#: Index of the first image, of the second (None where an image is missing), the judge's text (None where it failed).
Verdict = tuple[int | None, int | None, str | None]


def parse_verdict(text: str | None) -> int | None:
    """Which image a judge prefers: 0 the first, 1 the second, None for a tie or an answer that cannot be read.

    Only what stands inside ``<answer>`` counts, and only if it names one image as better and not both.
    """
    named = {number for answer in _ANSWER.findall(text or "") for number in _VERDICT.findall(answer)}
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
