"""Text accuracy against the golden cases and by its properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax.rewards.ocr import target_text, text_accuracy


def test_golden_cases(cases):
    for case in cases["ocr"]:
        lines = [tuple(line) for line in case["lines"]]
        assert text_accuracy(lines, case["prompt"]) == pytest.approx(case["reward"], abs=1e-12), case


@pytest.mark.parametrize("prompt", ["a red fox", 'one " quote', 'nothing between ""', 'only space "  "', ""])
def test_prompt_that_quotes_nothing_has_no_reward(prompt):
    assert target_text(prompt) is None
    assert math.isnan(text_accuracy("text", prompt))


def test_first_quoted_text_is_the_target():
    assert target_text('neon "Open Late" above "Cinema"') == "Open Late"


def test_plain_text_case_and_space_do_not_matter():
    assert text_accuracy("the sign says\nO P E N", 'sign "open"') == 1
    assert text_accuracy([("o", 0.5), ("x", 0.0), ("PEN", 0.1)], 'sign "Open"') == 1
    assert text_accuracy("", 'sign "open"') == 0


@given(recognised=st.text(max_size=20), target=st.text(min_size=1, max_size=10).filter(lambda t: '"' not in t))
def test_accuracy_is_a_share(recognised, target):
    accuracy = text_accuracy(recognised, f'"{target}"')
    assert math.isnan(accuracy) == (not target.strip())
    assert math.isnan(accuracy) or 0 <= accuracy <= 1
    assert not target.strip() or text_accuracy(f"before {target} after", f'"{target}"') == 1
