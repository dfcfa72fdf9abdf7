"""Aggregation and intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax.evaluation.figures import Cell, Measure, Table, each, mean_of


def table(*prompts: list[Cell]) -> Table:
    found = Table()
    for i, cells in enumerate(prompts):
        found.add(str(i), cells)
    return found


def test_hand_worked_ratios_and_weights():
    # Group a: (1 + 0) / 2 = 0.5. Group b: 3 of 4 words. Weighted 1:3 -> 0.6875.
    found = table([Cell("a", 1), Cell("b", 2, 3)], [Cell("a", 0)], [Cell("b", 1, 1)])
    figures = {f.name: f for f in found.figures([
        Measure("mean", {"a": 1, "b": 3}), Measure("percent", {"a": 1}, scale=100, offset=-10), *each(["a", "b"], "b"),
        mean_of("all", ["a", "b", "c"], ""), Measure("nothing", {"c": 1}),
    ])}  # fmt: skip
    assert figures["mean"].value == pytest.approx((0.5 + 3 * 0.75) / 4)
    assert figures["percent"].value == pytest.approx(40)
    assert figures["all"].value == pytest.approx((0.5 + 0.75) / 2)
    assert (figures["mean"].prompts, figures["percent"].prompts, figures[""].prompts) == (3, 2, 2)
    assert "nothing" not in figures


def test_prompts_that_are_alike_have_no_interval():
    (same,) = table([Cell("x", 1)], [Cell("x", 1)]).figures([Measure("x", {"x": 1.0})])
    assert (same.shown, same.interval) == ("1.000", "no interval, 2 prompts alike")
    (one,) = table([Cell("x", 0.5)]).figures([Measure("x", {"x": 1.0}, digits=2)])
    assert (one.shown, one.interval) == ("0.50", "1 prompt")


def test_intervals_cover_the_truth_as_often_as_they_claim():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = table(*[[Cell("x", float(generator.random() < 0.7))] for _ in range(60)])
        (figure,) = found.figures([Measure("x", {"x": 1.0})], seed=trial, resamples=400)
        covered += figure.low <= 0.7 <= figure.high
    # 95% of 200, give or take: a normal interval's coverage at this size is about 93%.
    assert 175 <= covered <= 199


def test_images_of_a_prompt_are_resampled_together():
    def width(prompts: list[list[Cell]]) -> float:
        (figure,) = table(*prompts).figures([Measure("x", {"x": 1.0})])
        return figure.high - figure.low

    values = np.random.default_rng(0).random(40) < 0.5
    together = [[Cell("x", float(v))] * 4 for v in values]
    alone = [[Cell("x", float(v))] for v in values for _ in range(4)]
    # Four equal images of a prompt tell no more than one.
    assert width(together) == pytest.approx(width([[Cell("x", float(v))] for v in values]))
    assert width(together) > 1.6 * width(alone)


@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), max_size=4), min_size=1, max_size=12))
def test_figures_are_in_order_and_within_their_values(prompts: list[list[tuple[str, float]]]):
    found = table(*[[Cell(group, value) for group, value in cells] for cells in prompts])
    figures = found.figures([mean_of("all", found.groups, "")], resamples=200)
    values = [value for cells in prompts for _, value in cells]
    assert bool(figures) == bool(values)
    for figure in figures:
        assert min(values) - 1e-9 <= figure.low <= figure.high <= max(values) + 1e-9
        assert math.isfinite(figure.value)
        assert min(values) - 1e-9 <= figure.value <= max(values) + 1e-9
