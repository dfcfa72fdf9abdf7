"""CVTG-2K's text metrics (Du et al., 2025): word accuracy and normalised edit similarity of recognised words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from deepgen_jax.errors import DeepGenError


class WordScore(NamedTuple):
    """An image's counts: words asked for, words found as they are, and the sum of the words' similarities."""

    words: int
    found: int
    similarity: float


def scores(prompts: Sequence[str], recognised: Sequence[Sequence[str]]) -> dict[str, float]:
    """Word accuracy and NED over all words of all prompts.

    Args:
      prompts: texts whose single-quoted parts are to be rendered.
      recognised: what OCR read in each prompt's image: words or lines.

    Returns:
      ``word_accuracy``, found words / words, and ``ned``, the mean over words of 1 - Levenshtein distance / (longer
      length + 1e-5) to the recognised word that `difflib` finds closest; NaN where no prompt quotes a word.

    Raises:
      DeepGenError: not as many images as prompts, or rapidfuzz is not installed.
    """
    if len(prompts) != len(recognised):
        raise DeepGenError(f"{len(prompts)} prompts, but words of {len(recognised)} images; give one list a prompt")
    each = [score_words(prompt, read) for prompt, read in zip(prompts, recognised, strict=True)]
    words = sum(one.words for one in each)
    if not words:
        return {"word_accuracy": float("nan"), "ned": float("nan")}
    return {
        "word_accuracy": sum(one.found for one in each) / words,
        "ned": sum(one.similarity for one in each) / words,
    }


def target_words(prompt: str) -> list[str]:
    """Words of the single-quoted parts of a prompt, lower-cased."""
    return [word for part in re.findall(r"'(.*?)'", prompt) for word in part.lower().split()]


def score_words(prompt: str, recognised: Sequence[str]) -> WordScore:
    """An image's counts; see `scores`."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise DeepGenError("CVTG-2K's metrics need rapidfuzz; run pip install 'deepgen-jax[eval]'") from error
    read = [word for line in recognised for word in line.lower().split()] or [""]
    wanted = target_words(prompt)
    similarity = 0.0
    for word in wanted:
        closest = difflib.get_close_matches(word, read, n=1, cutoff=0)[0]
        similarity += 1 - Levenshtein.distance(word, closest) / (max(len(word), len(closest)) + 1e-5)
    return WordScore(len(wanted), sum(word in read for word in wanted), similarity)
