"""A run whose judge answers garbage, fails, hangs and restarts."""

from __future__ import annotations

import random
import threading
import warnings
from collections import Counter

import numpy as np
import pytest
from support.judge_server import JudgeServer, Reply

from deepgen_jax.rewards import RewardConfig, RewardSample
from deepgen_jax.rewards.mixture import RewardMixture
from deepgen_jax.rl import advantages
from deepgen_jax.user_warnings import DeepGenWarning

GROUP, GROUPS_A_STEP, STEPS = 4, 16, 3
RESTART_AT = 150


class FaultyJudge:
    """30% garbage, half of it no JSON and half a reply without answer; 10% HTTP 500; 5% never."""

    def __init__(self):
        self.random = random.Random(0)
        self.injected = Counter()
        self.restart = threading.Event()

    def __call__(self, number, body):
        if number == RESTART_AT:
            self.restart.set()
        draw = self.random.random()
        for share, kind, reply in (
            (0.15, "no JSON", Reply("<html>garbage</html>", raw=True)),
            (0.30, "no answer", Reply("I like both, {{{ image 1 image 2")),
            (0.40, "HTTP 500", Reply("oops", status=500)),
            (0.45, "hang", Reply(hang=True)),
        ):
            if draw < share:
                self.injected[kind] += 1
                return reply
        self.injected["fine"] += 1
        return Reply(f"<answer>Image {1 + number % 2} is better</answer>")


@pytest.fixture
def judge():
    faults = FaultyJudge()
    server = JudgeServer(faults)

    def restart():
        if faults.restart.wait(60):
            port = server.port
            server.stop()
            server.start(port)

    thread = threading.Thread(target=restart)
    thread.start()
    yield server
    faults.restart.set()
    thread.join()
    server.stop()


def step_samples(step):
    pixels = np.random.default_rng(step).integers(0, 256, (GROUPS_A_STEP * GROUP, 8, 8, 3), np.uint8)
    return [RewardSample(image, f"prompt {step}", i // GROUP) for i, image in enumerate(pixels)]


def test_run_completes_with_a_faulty_judge(judge):
    client = {"tries": 3, "read_seconds": 1.5, "backoff_seconds": 0.02, "max_backoff_seconds": 0.1, "concurrency": 16}
    configs = [RewardConfig("preference", options={"url": judge.url, "client": client}), RewardConfig("jpeg")]
    results = []
    with (
        RewardMixture(configs, group_size=GROUP, required_share=0.5, retries=5, retry_seconds=0.05) as mixture,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeepGenWarning)
        for step in range(STEPS):
            samples, weights = step_samples(step), [{"preference": 0.7, "jpeg": 0.3}] * (GROUPS_A_STEP * GROUP)
            half = len(samples) // 2
            futures = [mixture.submit(samples[:half], weights[:half]), mixture.submit(samples[half:], weights[half:])]
            results.append(mixture.collect(futures))
        counts = Counter(mixture.counts())

    # Every step has its rewards.
    assert all(np.isfinite(result.rewards[:, 1]).all() for result in results)
    assert all(result.present_share()["preference"] >= 0.5 for result in results)

    # The client saw what the server injected. Beside it, an answer may be lost in the restart, or come too late on a
    # machine that is busy.
    injected = judge.decide.injected
    failed = {event.rpartition("failed: ")[2]: n for event, n in counts.items() if "try failed" in event}
    assert set(failed) <= {"unreadable answer", "HTTP 500", "timeout", "connection error"}
    lost = failed["timeout"] + failed.get("connection error", 0) - injected["hang"]
    assert 0 <= lost <= 20
    assert injected["no JSON"] - lost <= failed["unreadable answer"] <= injected["no JSON"]
    assert injected["HTTP 500"] - lost <= failed["HTTP 500"] <= injected["HTTP 500"]
    assert min(injected["no JSON"], injected["HTTP 500"], injected["hang"]) > 10
    tries, requests = counts["preference/tries"], counts["preference/requests"] - counts["preference/cached"]
    assert len(judge.requests) == sum(injected.values())
    assert tries - failed.get("connection error", 0) <= len(judge.requests) <= tries
    answered = tries - sum(failed.values())
    assert answered == requests - counts["preference/failed"]
    assert injected["fine"] + injected["no answer"] - lost <= answered <= injected["fine"] + injected["no answer"]
    assert counts["preference/retries"] == tries - requests
    unread = sum(result.notes["preference", "no verdict in the reply"] for result in results)
    assert unread >= injected["no answer"] - lost

    # A reward is a rate of comparisons that were answered, or missing: no group is silently zero.
    for result in results:
        groups = result.rewards[:, 0].reshape(-1, GROUP)
        assert not (groups == 0).all(axis=1).any()
        complete = np.isfinite(groups).all(axis=1)
        assert (groups[complete].sum(axis=1) > 0).all()
        missing = {row for row, column in result.missing if column == 0}
        assert missing == set(np.flatnonzero(np.isnan(result.rewards[:, 0])).tolist())
        assert np.isfinite(advantages.compute("gdpo", result.rewards, result.weights, GROUP)).all()
