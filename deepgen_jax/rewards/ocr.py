"""Text-rendering reward: how much of the text that a prompt asks for is recognised in its image."""

from __future__ import annotations

import math
from collections.abc import Iterable

from deepgen_jax.errors import DeepGenError


def target_text(prompt: str) -> str | None:
    """Text between the first two double quotes of a prompt; None where it quotes nothing or only white space."""
    pieces = prompt.split('"', 2)
    if len(pieces) < 3 or not pieces[1].strip():
        return None
    return pieces[1]


def text_accuracy(recognised: str | Iterable[tuple[str, float]], prompt: str) -> float:
    """1 - min(edit distance, len) / len of the quoted text, which counts as exact wherever it is contained.

    Case and white space do not matter.

    Args:
      recognised: recognised text, or (text, confidence) lines; lines of confidence 0 are ignored, the others joined.
      prompt: the image's prompt; the text between its first two double quotes is wanted.

    Returns:
      0..1, or NaN (a missing reward) where the prompt quotes nothing.

    Raises:
      DeepGenError: rapidfuzz is not installed.
    """
    target = target_text(prompt)
    if target is None:
        return math.nan
    if not isinstance(recognised, str):
        recognised = "".join(text for text, confidence in recognised if confidence > 0)
    found, wanted = _normalised(recognised), _normalised(target)
    if wanted in found:
        return 1.0
    return 1.0 - min(_edit_distance(found, wanted), len(wanted)) / len(wanted)


def _normalised(text: str) -> str:
    return "".join(text.split()).lower()


def _edit_distance(first: str, second: str) -> int:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise DeepGenError("the OCR reward needs rapidfuzz; run pip install 'deepgen-jax[rewards]'") from error
    return Levenshtein.distance(first, second)
