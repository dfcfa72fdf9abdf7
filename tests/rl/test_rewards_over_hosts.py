"""Which host scores which groups, and how their rewards come together."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from deepgen_jax.rewards.result import RewardResult, empty_result
from deepgen_jax.rl.step_metrics import over_hosts, own_groups

NAMES = ("clip", "ocr")


def result(rewards: np.ndarray, weights: np.ndarray) -> RewardResult:
    return RewardResult(NAMES, (), rewards, weights, {}, Counter(), dict.fromkeys(NAMES, 0.0))


@pytest.mark.parametrize(("hosts", "prompts"), [(1, 3), (2, 5), (4, 4), (8, 3)])
def test_every_group_is_scored_by_one_host(monkeypatch: pytest.MonkeyPatch, hosts: int, prompts: int) -> None:
    rng = np.random.default_rng(0)
    rewards, weights = rng.random((2, prompts, 4, len(NAMES)), np.float32)
    rewards[1, 2, 0] = np.nan
    sent: list[np.ndarray] = []
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: sent.append(x) or np.asarray(sent))
    scored = []
    for host in range(hosts):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        own = own_groups(range(prompts))
        scored += own
        flat = [x[own].reshape(-1, len(NAMES)) for x in (rewards, weights)]
        # The last call has gathered what all have sent.
        together = over_hosts(result(*flat) if own else empty_result(NAMES), prompts, 4)
    assert sorted(scored) == list(range(prompts))
    for got, expected in zip(together, (rewards, weights), strict=True):
        np.testing.assert_array_equal(got, expected.reshape(-1, len(NAMES)))
