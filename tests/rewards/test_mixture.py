"""Several rewards at once: what they give, what is missing, and when a step stops."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import types
import warnings

import httpx
import numpy as np
import pytest
from PIL import UnidentifiedImageError

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards import Missing, Reward, RewardConfig, RewardSample, Scores, registry
from deepgen_jax.rewards.base import ScoringFailed
from deepgen_jax.rewards.mixture import RewardMixture
from deepgen_jax.user_warnings import DeepGenWarning


class Flaky(Reward):
    """0.25, but missing for the rows of the first ``calls`` calls that ``fails`` lists."""

    def __init__(self, fails=(), calls=1, permanent=False, seconds=0.0, group=False, error=None):
        self.fails, self.calls, self.permanent, self.seconds, self.error = fails, calls, permanent, seconds, error
        self.needs_group = group
        self.seen = []
        Flaky.made = self

    async def score(self, samples):
        self.seen.append([sample.group for sample in samples])
        await asyncio.sleep(self.seconds)
        if self.error:
            raise self.error
        fails = self.fails if len(self.seen) <= self.calls else ()
        missing = Missing("no luck", self.permanent)
        return Scores.of([missing if i in fails else 0.25 for i in range(len(samples))])


@pytest.fixture(autouse=True)
def flaky(monkeypatch):
    """Makes `Flaky` a kind of reward."""
    module = types.ModuleType("flaky_reward")
    module.Flaky = Flaky
    monkeypatch.setitem(sys.modules, module.__name__, module)
    registry.register("flaky", "flaky_reward:Flaky")


def samples(count, group_size=2):
    noise = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return [RewardSample(noise[i], "a fox", i // group_size) for i in range(count)]


def mixture(*configs, **options):
    return RewardMixture(configs, retry_seconds=0.0, **options)


JPEG = RewardConfig("jpeg")
RED = RewardConfig("red", "color_target")


def test_columns_and_weights_by_data_set():
    with mixture(JPEG, RED) as rewards:
        weights = [{"red": 0.7}, {"jpeg": 0.5, "red": 0.5}, {"jpeg": 1, "red": 0}]
        result = rewards.collect([rewards.submit(samples(3), weights)])
    assert result.names == ("jpeg", "red")
    np.testing.assert_array_equal(np.isnan(result.rewards), [[True, False], [False, False], [False, True]])
    np.testing.assert_array_equal(result.weights, np.array([[0, 0.7], [0.5, 0.5], [1, 0]], np.float32))
    assert result.rewards.dtype == result.weights.dtype == np.float32
    assert not result.failures
    assert set(result.seconds) == {"jpeg", "red"}


def test_micro_batches_run_in_the_background_and_keep_their_order():
    slow = RewardConfig("slow", "flaky", {"seconds": 0.3})
    with mixture(slow, JPEG) as rewards:
        start = time.monotonic()
        parts = [samples(4)[:2], samples(4)[2:]]
        futures = [rewards.submit(part, [{"slow": 1.0, "jpeg": 1.0}] * 2) for part in parts]
        assert time.monotonic() - start < 0.2
        together = rewards.collect(futures)
        assert time.monotonic() - start < 0.55
        alone = rewards.collect([rewards.submit(samples(4), [{"jpeg": 1.0}] * 4)])
    np.testing.assert_array_equal(together.rewards[:, 1], alone.rewards[:, 1])
    assert [sample.group for sample in together.samples] == [0, 0, 1, 1]


def test_few_missing_rewards_are_let_be():
    with mixture(RewardConfig("flaky", options={"fails": [1]}), required_share=0.75) as rewards:
        result = rewards.collect([rewards.submit(samples(4), [{"flaky": 2.0}] * 4)])
    np.testing.assert_array_equal(result.rewards[:, 0], np.array([0.25, np.nan, 0.25, 0.25], np.float32))
    # The weight stays: the advantages leave the missing reward out.
    np.testing.assert_array_equal(result.weights[:, 0], [2, 2, 2, 2])
    assert result.failures == {("flaky", "no luck"): 1}
    assert result.present_share() == {"flaky": 0.75}
    assert len(Flaky.made.seen) == 1


def test_too_many_missing_rewards_are_asked_for_again():
    with mixture(RewardConfig("flaky", options={"fails": [0, 1]}), JPEG) as rewards:
        wanted = [{"flaky": 1.0, "jpeg": 1.0}] * 4
        with pytest.warns(DeepGenWarning, match="too few rewards"):
            result = rewards.collect([rewards.submit(samples(4), wanted)])
    assert np.isfinite(result.rewards).all()
    assert not result.failures
    assert [len(seen) for seen in Flaky.made.seen] == [4, 2]


def test_retry_asks_for_whole_groups_where_they_are_compared():
    config = RewardConfig("flaky", options={"fails": [3], "group": True})
    with mixture(config, required_share=1.0, group_size=2) as rewards, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeepGenWarning)
        rewards.collect([rewards.submit(samples(6), [{"flaky": 1.0}] * 6)])
    assert Flaky.made.seen == [[0, 0, 1, 1, 2, 2], [1, 1]]


def test_stops_saying_which_reward_failed_how_often_and_why():
    config = RewardConfig("flaky", options={"fails": range(9), "calls": 9})
    with mixture(config, JPEG) as rewards, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeepGenWarning)
        futures = [rewards.submit(samples(3), [{"flaky": 1.0, "jpeg": 1.0}] * 3)]
        with pytest.raises(DeepGenError, match=r"2 retries: flaky has 0% of its rewards \(3 x no luck\)"):
            rewards.collect(futures)
    assert len(Flaky.made.seen) == 3


def test_reward_that_does_not_apply_is_no_failure():
    config = RewardConfig("flaky", options={"fails": range(9), "calls": 9, "permanent": True})
    with mixture(config, required_share=1.0) as rewards:
        result = rewards.collect([rewards.submit(samples(3), [{"flaky": 1.0}] * 3)])
    assert np.isnan(result.rewards).all()
    assert result.inapplicable == {("flaky", "no luck"): 3}
    assert not result.failures
    assert len(Flaky.made.seen) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("boom"), "OSError: boom"),
        (ConnectionResetError("boom"), "ConnectionResetError: boom"),
        (TimeoutError(), "TimeoutError"),
        (httpx.ReadTimeout("boom"), "ReadTimeout: boom"),
        (UnidentifiedImageError("boom"), "UnidentifiedImageError: boom"),
        (json.JSONDecodeError("boom", "", 0), "JSONDecodeError: boom: line 1 column 1 (char 0)"),
        (ScoringFailed("the judge is out"), "the judge is out"),
    ],
)
def test_expected_failure_is_a_missing_reward_with_its_reason(error, reason):
    config = RewardConfig("flaky", options={"error": error})
    with mixture(config, JPEG, required_share=0.0) as rewards:
        result = rewards.collect([rewards.submit(samples(2), [{"flaky": 1.0, "jpeg": 1.0}] * 2)])
    assert result.failures == {("flaky", reason): 2}
    assert np.isfinite(result.rewards[:, 1]).all()


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), KeyError("boom"), ValueError("boom"), ZeroDivisionError("boom")]
)
def test_programming_error_ends_the_run_with_its_cause(error):
    config = RewardConfig("flaky", options={"error": error})
    message = rf"reward flaky failed with {type(error).__name__}: .?boom.? \(.*test_mixture.py, line \d+, in score\)"
    with (
        mixture(config, JPEG, required_share=0.0) as rewards,
        pytest.raises(DeepGenError, match=message) as caught,
    ):
        rewards.collect([rewards.submit(samples(2), [{"flaky": 1.0, "jpeg": 1.0}] * 2)])
    assert caught.value.__cause__ is error


def test_reward_with_another_number_of_scores_ends_the_run():
    class Short(Reward):
        async def score(self, samples):
            return Scores.of([1.0])

    with mixture(JPEG) as rewards:
        rewards._rewards = (Short(),)
        with pytest.raises(DeepGenError, match="jpeg gave 1 scores of 2 images"):
            rewards.collect([rewards.submit(samples(2), [{"jpeg": 1.0}] * 2)])


def test_error_of_use_ends_the_step():
    config = RewardConfig("flaky", options={"error": DeepGenError("install it")})
    with mixture(config) as rewards, pytest.raises(DeepGenError, match="reward flaky: install it"):
        rewards.collect([rewards.submit(samples(2), [{"flaky": 1.0}] * 2)])


def test_released_reward_names_find_their_columns():
    with mixture(RewardConfig("clip_sim", "jpeg")) as rewards:
        result = rewards.collect([rewards.submit(samples(1), [{"clip_sim": 0.3}])])
        rewards.check(["clip", "clip_sim"])
    assert result.names == ("clip",)
    assert result.weights[0, 0] == np.float32(0.3)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([{"jpg": 1.0}] * 2, "wants the reward 'jpg'.*did you mean jpeg"),
        ([{"jpeg": 1.0}], "2 samples with 1 weights"),
        ([{"jpeg": float("nan")}] * 2, "must be finite"),
    ],
)
def test_wrong_weights_are_refused(weights, message):
    with mixture(JPEG) as rewards, pytest.raises(DeepGenError, match=message):
        rewards.submit(samples(2), weights)


def test_part_of_a_group_is_refused_where_groups_are_compared():
    config = RewardConfig("flaky", options={"group": True})
    with mixture(config, JPEG, group_size=4) as rewards:
        rewards.collect([rewards.submit(samples(2), [{"jpeg": 1.0}] * 2)])
        with pytest.raises(DeepGenError, match="compares whole groups of 4, but got 2 images of group 0"):
            rewards.submit(samples(2), [{"flaky": 1.0}] * 2)


@pytest.mark.parametrize(
    ("configs", "options", "message"),
    [
        ((), {}, "no rewards"),
        ((JPEG, JPEG), {}, "jpeg is listed twice"),
        ((JPEG,), {"required_share": 1.5}, "from 0 to 1"),
    ],
)
def test_bad_mixture_is_refused(configs, options, message):
    with pytest.raises(DeepGenError, match=message):
        mixture(*configs, **options)


def test_nothing_submitted():
    with mixture(JPEG) as rewards, pytest.raises(DeepGenError, match="no micro-batch"):
        rewards.collect([])
