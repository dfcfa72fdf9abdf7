"""Scores of judges in many wordings; other numbers are not taken for scores."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax.rewards.base import Missing
from deepgen_jax.rewards.ratings import NO_NUMBER, OTHER_SCALE, OUT_OF_RANGE, SEVERAL_NUMBERS, read_score

WORDINGS = [
    "{}",
    " {}\n",
    "{}.",
    "**{}**",
    "`{}`",
    "{}/10",
    "{} / 10",
    "**{}/10**",
    "{} out of 10",
    "{} points",
    "{}分",
    "Score: {}",
    "**Score:** {}/10",
    "The score is {}.",
    "My rating: **{}**",
    "Final answer: {}",
    "Rating of {}",
    "I give this image an {}.",
    "I would rate it {}/10.",
    "The image shows 3 dogs. Score: {}",
    "Alignment: 7/10, quality: 6/10. Overall score: {}/10",
    "Overall: {}/10",
    "{} points out of 10",
    "Score (0-10): {}",
    "On a scale of 0 to 10, I'd rate it {}.",
    "On a scale from 0 to 10: {}",
    "It gets {}/10 because the 2 foxes are red.",
    "The score for this image is {}",
    '{"score": {}}',
    "\\boxed{{}}",
    "评分：{}",
    "得分是{}分",
]
WRAPS = ["{}", "<answer>{}</answer>", "<think>3 or 4?</think> <answer> {} </answer>", "hm, 2 or 3.</think>{}"]


@given(
    st.decimals(0, 10, places=2).map(lambda value: f"{value.normalize():f}"),
    st.sampled_from(WORDINGS),
    st.sampled_from(WRAPS),
    st.booleans(),
)
def test_any_wording_is_read(number, wording, wrap, comma):
    text = wrap.replace("{}", wording.replace("{}", number.replace(".", ",") if comma else number))
    assert read_score(text, 0, 10) == float(number)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("about 8", NO_NUMBER),
        ("1e1", NO_NUMBER),
        ("nan", NO_NUMBER),
        ("7-8", NO_NUMBER),
        ("7 to 8", NO_NUMBER),
        ("Score: 7-8", NO_NUMBER),
        ("3 dogs", NO_NUMBER),
        ("I give 3 reasons", NO_NUMBER),
        ("The score for 2 dogs", NO_NUMBER),
        ("8/10/2024", NO_NUMBER),
        ("8,500", NO_NUMBER),
        ("8.5.2", NO_NUMBER),
        ("v8", NO_NUMBER),
        ("I would not give it 8/10", NO_NUMBER),
        ("The score ranges from 0 to 10", NO_NUMBER),
        ("Image 1 is better", NO_NUMBER),
        ("", NO_NUMBER),
        ("Score: 7, score: 9", SEVERAL_NUMBERS),
        ("80%", OTHER_SCALE),
        ("4/5", OTHER_SCALE),
        ("11", OUT_OF_RANGE),
        ("-1", OUT_OF_RANGE),
        ("Score: 100", OUT_OF_RANGE),
    ],
)
def test_other_numbers_are_no_score(wrap, text, reason):
    assert read_score(wrap.replace("{}", text), 0, 10) == reason


def test_scale_is_the_one_that_was_asked_for():
    assert read_score("3/5", 1, 5) == 3
    assert read_score("85%", 0, 100) == 85
    assert read_score("-1", -5, 5) == -1


@given(st.text())
def test_any_text_is_read_without_an_error(text):
    score = read_score(text, 0, 10)
    assert isinstance(score, Missing) or 0 <= score <= 10


@pytest.mark.parametrize("piece", ["8", "8/10 ", "8/", "score ", "score of a", "<answer>", "8.8", "the ", " ", "分8"])
def test_time_is_linear_in_the_length(piece):
    start = time.process_time()
    read_score(piece * (5_000_000 // len(piece)), 0, 10)
    assert time.process_time() - start < 2
