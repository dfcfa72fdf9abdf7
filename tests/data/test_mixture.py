"""Turns keep to their shares; permutations are permutations; numbers depend only on their place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepgen_jax.data.data_config import MixtureConfig
from deepgen_jax.data.mixture import integer_rates, interleave, task_at
from deepgen_jax.data.shuffle import generator, permuted

weights = st.lists(st.floats(1e-7, 1e7), min_size=1, max_size=30)


@given(weights, st.integers(0, 10**9))
@settings(max_examples=50)
def test_each_position_continues_the_one_before(weights, start):
    rates = integer_rates(weights)
    counts, stream = interleave(rates, start)
    assert counts.sum() == start
    for position in range(start + 1, start + 40):
        counts[stream] += 1
        expected = counts
        counts, stream = interleave(rates, position)
        np.testing.assert_array_equal(counts, expected)


@given(weights)
def test_shares_are_kept(weights):
    rates = integer_rates(weights)
    for position in (1, 10, 100, 1000):
        counts, _ = interleave(rates, position)
        shares = rates / rates.sum()
        ahead = counts - position * shares
        assert ahead.min() >= -2
        assert (ahead <= 2 + len(rates) * shares).all()


def test_tasks_by_cycle_and_by_weight():
    cycle = MixtureConfig(cycle=("edit", "t2i", "t2i"))
    assert [task_at(cycle, k) for k in range(5)] == [("edit", 0), ("t2i", 0), ("t2i", 1), ("edit", 1), ("t2i", 2)]
    weighted = MixtureConfig(cycle=(), weights=(("edit", 1), ("t2i", 3)))
    tasks = [task_at(weighted, k) for k in range(4000)]
    assert sum(task == "edit" for task, _ in tasks) in range(998, 1003)
    for name in ("edit", "t2i"):
        places = [place for task, place in tasks if task == name]
        assert places == list(range(len(places)))


@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 5))
def test_permutations(size, seed, epoch):
    places = permuted(np.arange(size), size, seed, "order", epoch)
    assert sorted(places.tolist()) == list(range(size))
    some = np.arange(size)[::7]
    np.testing.assert_array_equal(permuted(some, size, seed, "order", epoch), places[some])
    if size > 20:
        assert not np.array_equal(places, permuted(np.arange(size), size, seed, "order", epoch + 1))


def test_large_permutations_look_random():
    size = 3_000_000
    places = permuted(np.arange(100_000), size, 1, "order")
    assert len(np.unique(places)) == 100_000
    expected = len(places) / 50
    counts = np.bincount(places * 50 // size, minlength=50)
    # Chi-square with 49 degrees of freedom: 99.9% lie below 85.
    assert ((counts - expected) ** 2 / expected).sum() < 85
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("size", [2000, 4096])
def test_every_place_is_equally_likely(size):
    counts = np.zeros(8)
    for seed in range(400):
        counts += np.bincount(permuted(np.arange(4), size, seed, "order") * 8 // size, minlength=8)
    assert ((counts - 200) ** 2 / 200).sum() < 30


def test_generators_depend_on_seed_purpose_and_indices():
    draws = {generator(*key).random() for key in [(1, "a"), (2, "a"), (1, "b"), (1, "a", 0), (1, "a", 1)]}
    assert len(draws) == 5
    assert generator(1, "a", 7).random() == generator(1, "a", 7).random()
