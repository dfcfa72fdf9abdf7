"""Advantages against the golden arrays, and with missing rewards."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rl.advantages import compute

KINDS = ["gdpo", "grpo", "grpo_global_std", "reinforcepp"]
GROUPED = ["gdpo", "grpo", "grpo_global_std"]
seeds = st.integers(0, 2**32 - 1)


def batch(seed: int, groups: int = 3, group_size: int = 4, rewards: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.uniform(size=(groups * group_size, rewards)).astype(np.float32)
    weights = np.repeat(rng.uniform(0.1, 1, (groups, rewards)), group_size, axis=0).astype(np.float32)
    return values, weights


@pytest.mark.parametrize("weighting", ["uniform", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_golden(goldens, tolerance, cases, kind, weighting):
    golden = goldens("rl")
    rewards, weights = golden["adv/per_func"], golden["adv/weights"]
    if weighting == "uniform":
        weights = np.ones_like(weights)
    advantage = compute(kind, rewards, weights, cases["adv_reward_config"]["group_size"])
    name = f"adv/{kind}/{weighting}"
    np.testing.assert_allclose(advantage, golden[name], rtol=0, atol=tolerance("rl", name))


@pytest.mark.parametrize("kind", KINDS)
def test_jit_gives_the_same(kind):
    rewards, weights = batch(0)
    jitted = jax.jit(compute, static_argnames=("kind", "group_size"))(kind, rewards, weights, group_size=4)
    np.testing.assert_allclose(jitted, compute(kind, rewards, weights, 4), atol=1e-5)


@settings(max_examples=15)
@given(seed=seeds, kind=st.sampled_from(KINDS))
def test_order_within_a_group_does_not_matter(seed, kind):
    rewards, weights = batch(seed)
    order = np.concatenate([4 * g + np.random.default_rng(seed + g).permutation(4) for g in range(3)])
    moved = compute(kind, rewards[order], weights[order], 4)
    np.testing.assert_allclose(moved, np.asarray(compute(kind, rewards, weights, 4))[order], atol=2e-5)


@settings(max_examples=15)
@given(seed=seeds, kind=st.sampled_from(KINDS), scale=st.floats(50, 500), offset=st.floats(-10, 10))
def test_unit_of_the_rewards_does_not_matter(seed, kind, scale, offset):
    # Large rewards, beside which the 1e-4 that guards the division is nothing.
    rewards, weights = batch(seed, rewards=1)
    weights = np.ones_like(weights)
    expected = compute(kind, 100 * rewards, weights, 4)
    np.testing.assert_allclose(compute(kind, scale * rewards + offset, weights, 4), expected, rtol=1e-2, atol=1e-3)


@settings(max_examples=15)
@given(seed=seeds, scale=st.floats(0.1, 10))
def test_gdpo_rewards_of_different_units_count_alike(seed, scale):
    rewards, weights = batch(seed)
    scaled = 100 * rewards * np.array([1, scale, 1 / scale], np.float32)
    np.testing.assert_allclose(
        compute("gdpo", scaled, weights, 4), compute("gdpo", 100 * rewards, weights, 4), atol=1e-3
    )


@pytest.mark.parametrize("kind", GROUPED)
def test_a_better_image_has_the_larger_advantage(kind):
    rewards = np.array([0.1, 0.9, 0.5, 0.3, 0.2, 0.8], np.float32)[:, None]
    advantage = np.asarray(compute(kind, rewards, np.ones_like(rewards), 3)).reshape(2, 3)
    np.testing.assert_array_equal(np.argsort(advantage), np.argsort(rewards.reshape(2, 3)))
    np.testing.assert_allclose(advantage.mean(1), 0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_give_no_advantage(kind):
    rewards = np.full((8, 2), 0.3, np.float32)
    np.testing.assert_allclose(compute(kind, rewards, np.ones_like(rewards), 4), 0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_advantage_is_clipped(kind):
    rewards = np.zeros((64, 1), np.float32)
    rewards[5] = 1
    advantage = np.asarray(compute(kind, rewards, np.ones_like(rewards), 64))
    assert advantage[5] == advantage.max() == 5


@settings(max_examples=15)
@given(seed=seeds, kind=st.sampled_from(KINDS), missing=st.integers(0, 3))
def test_image_without_rewards_is_as_if_absent(seed, kind, missing):
    rewards, weights = batch(seed)
    rows = missing + np.array([0, 4, 8])
    holes = rewards.copy()
    holes[rows] = np.nan
    advantage = np.asarray(compute(kind, holes, weights, 4))
    np.testing.assert_array_equal(advantage[rows], 0)
    expected = compute(kind, np.delete(rewards, rows, 0), np.delete(weights, rows, 0), 3)
    np.testing.assert_allclose(np.delete(advantage, rows), expected, atol=2e-5)


@settings(max_examples=15)
@given(seed=seeds, kind=st.sampled_from(KINDS), index=st.integers(0, 11), reward=st.integers(0, 2))
def test_one_missing_reward_equals_a_neutral_one(seed, kind, index, reward):
    """It neither favours nor punishes: as if the image had scored the mean of the others of its group."""
    rewards, weights = batch(seed)
    holes = rewards.copy()
    holes[index, reward] = np.nan
    group = slice(index // 4 * 4, index // 4 * 4 + 4)
    others = holes[group, reward][~np.isnan(holes[group, reward])]
    advantage = np.asarray(compute(kind, holes, weights, 4))
    assert np.isfinite(advantage).all()
    if kind == "gdpo":
        standardised = np.zeros((12, 3))
        for g in range(3):
            rows = slice(4 * g, 4 * g + 4)
            mean, std = np.nanmean(holes[rows], 0), np.nanstd(holes[rows], 0, ddof=1)
            standardised[rows] = np.nan_to_num((holes[rows] - mean) / (std + 1e-4))
        total = (weights * standardised).sum(1)
        expected = np.clip((total - total.mean()) / (total.std(ddof=1) + 1e-4), -5, 5)
    else:
        filled = holes.copy()
        filled[index, reward] = others.mean()
        expected = compute(kind, filled, weights, 4)
    np.testing.assert_allclose(advantage, expected, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_known_gives_zeros(kind):
    rewards, weights = batch(0)
    np.testing.assert_array_equal(compute(kind, np.full_like(rewards, np.nan), weights, 4), 0)
    np.testing.assert_array_equal(compute(kind, rewards, np.zeros_like(weights), 4), 0)
    np.testing.assert_array_equal(compute(kind, rewards[:1], weights[:1], 1), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_reward_of_zero_weight_changes_nothing(kind):
    rewards, weights = batch(0)
    weights[:, 1] = 0
    holes = rewards.copy()
    holes[[1, 6], 1] = np.nan
    np.testing.assert_allclose(compute(kind, holes, weights, 4), compute(kind, rewards, weights, 4), atol=1e-6)


def test_bad_input_is_refused():
    rewards, weights = batch(0)
    with pytest.raises(DeepGenError, match="ppo"):
        compute("ppo", rewards, weights, 4)
    with pytest.raises(DeepGenError, match="groups of 5"):
        compute("gdpo", rewards, weights, 5)
    with pytest.raises(DeepGenError, match="weights"):
        compute("gdpo", rewards, weights[:, :2], 4)
