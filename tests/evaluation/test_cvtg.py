"""CVTG-2K's word accuracy and NED against an independent implementation."""

from __future__ import annotations

import difflib
import math
import random

import numpy as np
import pytest

import deepgen_jax as dg
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.cvtg import target_words

WORDS = [
    "Open",
    "the",
    "door",
    "No.7",
    "café",
    "SALE",
    "50%",
    "a",
    "Kindness",
    "mind",
    "2049",
    "it",
    "北京",
    "re-start",
]


def levenshtein(a: str, b: str) -> int:
    """The textbook table."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
    return int(table[-1, -1])


def quoted(prompt: str) -> list[str]:
    """Words between the first and second, third and fourth, ... single quote."""
    return [word for part in prompt.split("'")[1::2] for word in part.lower().split()] if "'" in prompt else []


def independent(prompts: list[str], recognised: list[list[str]]) -> dict[str, float]:
    total = right = 0
    similarity = 0.0
    for prompt, lines in zip(prompts, recognised, strict=True):
        seen = " ".join(lines).lower().split() or [""]
        for word in quoted(prompt):
            total += 1
            right += any(word == other for other in seen)
            # difflib's own ranking, by ratio with the word first; the first of equals in its heap's order.
            (best,) = difflib.get_close_matches(word, seen, 1, 0)
            similarity += 1 - levenshtein(word, best) / (max(len(word), len(best)) + 1e-5)
    return {"word_accuracy": right / total, "ned": similarity / total}


def damaged(word: str, rng: random.Random) -> str:
    letters = list(word)
    for _ in range(rng.randrange(3)):
        place = rng.randrange(len(letters) + 1)
        kind = rng.randrange(3)
        if kind == 0:
            letters.insert(place, rng.choice("abxyz"))
        elif letters and place < len(letters):
            letters[place] = "" if kind == 1 else rng.choice("abxyz")
    return "".join(letters)


@pytest.mark.parametrize("seed", range(200))
def test_like_an_independent_implementation(seed: int):
    rng = random.Random(seed)
    prompts, recognised = [], []
    for _ in range(rng.randrange(1, 5)):
        texts = [[rng.choice(WORDS) for _ in range(rng.randrange(1, 4))] for _ in range(rng.randrange(1, 5))]
        prompts.append("A wall with " + " and ".join(f"'{' '.join(text)}'" for text in texts) + " on it.")
        lines = [" ".join(damaged(word, rng) for word in text) for text in texts if rng.random() < 0.8]
        rng.shuffle(lines)
        recognised.append([line.upper() if rng.random() < 0.3 else line for line in lines])
    assert dg.evaluation.cvtg.scores(prompts, recognised) == pytest.approx(independent(prompts, recognised), abs=1e-12)


def test_hand_worked():
    # "blue" is found; "doors" is one letter from "door": 1 - 1 / 5.00001.
    found = dg.evaluation.cvtg.scores(["A sign 'Blue doors'."], [["BLUE door"]])
    assert found == pytest.approx({"word_accuracy": 0.5, "ned": (1 + 1 - 1 / 5.00001) / 2})
    # Nothing was read: every word is as far as it can be.
    nothing = dg.evaluation.cvtg.scores(["'ab c'"], [[]])
    assert nothing["word_accuracy"] == 0
    assert nothing["ned"] == pytest.approx(0, abs=1e-4)


def test_prompts_without_quotes_have_no_score():
    assert all(math.isnan(value) for value in dg.evaluation.cvtg.scores(["a wall"], [["text"]]).values())
    assert target_words("A 'Big Sale' and 'OPEN'") == ["big", "sale", "open"]
    with pytest.raises(DeepGenError, match="2 prompts, but words of 1 images"):
        dg.evaluation.cvtg.scores(["a", "b"], [[]])
