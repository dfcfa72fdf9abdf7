"""Win rates from pairwise verdicts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.preference import parse_verdict, win_rates

FIRST, SECOND = (f"<think>...</think>\n<answer>Image {k} is better</answer>" for k in (1, 2))


def test_golden_case(cases):
    case = cases["win_rate"]
    rates = win_rates(case["num_items"], [tuple(result) for result in case["results"]])
    np.testing.assert_array_equal(rates, case["rates"])


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (FIRST, 0),
        (SECOND, 1),
        ("<answer>\n  image 2 is better.\n</answer>", 1),
        ("<think>Image 1 is better in colour</think><answer>Image 2 is better</answer>", 1),
        ("<answer>Both images are equal</answer>", None),
        ("<answer>Image 1 is better or Image 2 is better</answer>", None),
        ("<answer>Image 12 is better</answer>", None),
        ("<answer>Image 1 is better", None),
        ("Image 1 is better", None),
        ("", None),
        (None, None),
    ],
)
def test_verdict(text, verdict):
    assert parse_verdict(text) == verdict


def test_missing_images_are_skipped_and_missing_answers_are_ties():
    np.testing.assert_array_equal(win_rates(3, [(None, 1, FIRST), (0, None, FIRST), (0, 1, None)]), [0.5, 0.5, 0])


@given(st.lists(st.sampled_from([FIRST, SECOND, ""]), min_size=10, max_size=10))
def test_wins_of_a_full_round_add_up(answers):
    pairs = itertools.combinations(range(5), 2)
    rates = win_rates(5, [(i, j, text) for (i, j), text in zip(pairs, answers, strict=True)])
    assert rates.sum() * 4 == pytest.approx(10, abs=0.01)
    assert ((rates >= 0) & (rates <= 1)).all()


def test_index_outside_the_group_is_refused():
    with pytest.raises(DeepGenError, match="group of 2"):
        win_rates(2, [(0, 2, FIRST)])
