"""Rewards by name, and what every reward does alike."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys

import numpy as np
import pytest

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards import Missing, RewardConfig, RewardSample, Scores, make
from deepgen_jax.rewards.base import LocalReward
from deepgen_jax.rewards.registry import REWARD_KINDS

URL = "http://127.0.0.1:9"
NEEDED = {
    "preference": {"url": URL},
    "judge_score": {"url": URL, "model": "m"},
    "ocr_judge": {"url": URL, "model": "m"},
    "http": {"url": URL, "reward": "jpeg"},
}


def sample(image=None, prompt="a fox", group=0):
    return RewardSample(np.zeros((16, 24, 3), np.uint8) if image is None else image, prompt, group)


@pytest.mark.parametrize("kind", [kind for kind in REWARD_KINDS.names() if kind != "clip"])
def test_every_kind_is_made(kind):
    if kind == "ocr":
        pytest.importorskip("rapidocr")
    reward = make(RewardConfig(kind, options=NEEDED.get(kind, {})))
    assert type(reward).__name__ == REWARD_KINDS.target(kind).split(":")[1]
    assert reward.needs_group == (kind == "preference")


def test_exact_reward_of_the_procedural_world_is_an_entry_point():
    assert REWARD_KINDS.target("world") == "deepgen_jax.nano.reward:WorldReward"
    code = (
        "import sys; from deepgen_jax.rewards.registry import REWARD_KINDS; REWARD_KINDS.names();"
        "print('deepgen_jax.nano' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_released_names_mean_the_same_rewards():
    assert type(make(RewardConfig("unifiedreward_think", options=NEEDED["preference"]))).__name__ == "PreferenceReward"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig("jpg"), "did you mean jpeg"),
        (RewardConfig("pickscore"), "known: ocr, clip"),
        (RewardConfig("small", "jpeg", {"qualty": 90}), "reward small: .*'qualty'; did you mean quality"),
        (RewardConfig("preference"), "needs the option 'url'"),
        (RewardConfig("jpeg", options={"sign": 0}), "reward jpeg: sign is 0"),
        (RewardConfig("color_target", options={"target": [300, 0, 0]}), "from 0 to 255"),
        (RewardConfig("http", options={"url": "localhost:80", "reward": "x"}), "write http://HOST:PORT"),
        (RewardConfig("preference", options={"url": URL, "template": "Which?"}), "lacks {prompt}"),
        (RewardConfig("judge_score", options={"url": URL, "model": "m", "low": 5, "high": 5}), "no range"),
        (RewardConfig("clip", options={"folder": "/nowhere"}), "does not exist"),
        (RewardConfig("ocr", options={"workers": "many"}), r"reward ocr cannot be made: TypeError: .*ocr.py, line \d+"),
        (RewardConfig("mine", "nowhere:Mine"), "reward mine: nowhere cannot be imported"),
        (RewardConfig("mine", "no/where.py:Mine"), "reward mine: .*where.py is no Python file"),
        (RewardConfig("mine", "json:JSONDecoder"), "json:JSONDecoder is no subclass of .*Reward"),
        (RewardConfig("judge_score", options={"url": URL, "model": ""}), "model is empty"),
    ],
)
def test_bad_configuration_is_refused(config, message):
    with pytest.raises(DeepGenError, match=message):
        make(config)


def test_rewards_load_lazily():
    heavy = "('jax', 'httpx', 'rapidocr', 'torch')"
    code = f"import deepgen_jax.rewards, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_jpeg_counts_kilobytes_in_both_directions():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    samples = [sample(), sample(noise)]
    small = asyncio.run(make(RewardConfig("jpeg")).score(samples)).values
    large = asyncio.run(make(RewardConfig("jpeg", options={"sign": 1})).score(samples)).values
    assert small[1] < small[0] < 0
    np.testing.assert_array_equal(small, -large)
    # 64x64 noise at quality 95 is near 10 kB.
    assert 0.01 < large[1] < 0.03


def test_color_target_is_one_at_the_target_and_falls_with_distance():
    def of(color):
        return sample(np.broadcast_to(np.array(color, np.uint8), (8, 8, 3)))

    reward = make(RewardConfig("color_target", options={"target": [255, 0, 0]}))
    scores = asyncio.run(reward.score([of((255, 0, 0)), of((0, 255, 255)), of((255, 51, 0)), of((204, 0, 51))])).values
    np.testing.assert_allclose(scores, [1, 0, 1 - 1 / 15, 1 - 2 / 15], atol=1e-6)


def test_one_bad_image_costs_no_other_its_score():
    class Fussy(LocalReward):
        def score_one(self, sample):
            if sample.group == 1:
                raise OSError("cannot\nlook")
            return math.inf if sample.group == 2 else 0.5

    scores = asyncio.run(Fussy().score([sample(group=g) for g in range(4)]))
    np.testing.assert_array_equal(scores.values, np.array([0.5, np.nan, np.nan, 0.5], np.float32))
    assert scores.failures == {"OSError: cannot look": 1, "the score is not finite": 1}


def test_programming_error_in_one_image_ends_the_batch():
    class Wrong(LocalReward):
        def score_one(self, sample):
            return {}["score"]

    with pytest.raises(KeyError, match="score"):
        asyncio.run(Wrong().score([sample()]))


def test_score_beyond_float32_is_missing():
    scores = Scores.of([1e39, 1.0])
    assert scores.failures == {"the score is not finite": 1}
    assert np.isnan(scores.values[0])


def test_missing_is_never_zero():
    scores = Scores.of([Missing("late"), 1.0, Missing("late"), math.nan])
    assert scores.values.dtype == np.float32
    assert np.isnan(scores.values[[0, 2, 3]]).all()
    assert scores.failures["late"] == 2
    assert set(scores.missing) == set(np.flatnonzero(np.isnan(scores.values)).tolist())


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)])
def test_only_rgb_bytes_are_images(image):
    with pytest.raises(DeepGenError, match="give uint8"):
        RewardSample(image, "a fox", 0)
