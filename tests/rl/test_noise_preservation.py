"""Noise that is left in a sample after a stochastic step, against the level that the schedule expects."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax.config import SchedulerConfig
from deepgen_jax.flow.samplers import sde_step
from deepgen_jax.flow.schedule import make_sigmas

SIZE = 1_000_000
#: Steps of the 50-step schedule.
STEPS = (1, 10, 25, 40, 48)


def residual(sampler, eta, step):
    """Standard deviation of x' - (1 - s') x_0 over a million elements, and s', with the exact velocity e - x_0."""
    sigmas = make_sigmas(SchedulerConfig(), 50)
    s, following = sigmas[step : step + 2]
    clean, noise, fresh = jax.random.normal(jax.random.key(step), (3, 1, SIZE)) * jnp.array([2.0, 1, 1])[:, None, None]
    sample = (1 - s) * clean + s * noise
    moved, *_ = sde_step(sampler, noise - clean, sample, s, following, sigmas[1], eta, noise=fresh)
    left = np.asarray(moved - (1 - following) * clean, np.float64)
    # Nothing of the image is left in it: correlation within its standard error of 1e-3.
    assert abs(np.corrcoef(left.ravel(), np.ravel(clean))[0, 1]) < 5e-3
    return left.std(), float(following)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_cps_leaves_exactly_the_noise_that_the_schedule_expects(eta):
    for step in STEPS:
        left, expected = residual("cps", eta, step)
        # The standard error of a standard deviation from n samples is 1 / sqrt(2 n) of it: 7e-4.
        assert abs(left / expected - 1) < 4 * 7.1e-4, step


def flow_excess(eta, s, following):
    drift, added = eta**2 / (1 - s) / 2 * (following - s), eta**2 * s / (1 - s) * (s - following)
    return np.sqrt((following + drift) ** 2 + added) / following - 1


def dance_excess(eta, s, following):
    added = eta**2 * (s - following)
    return np.sqrt((following - added / (2 * s)) ** 2 + added) / following - 1


@pytest.mark.parametrize(("sampler", "eta", "excess"), [("flow", 0.7, flow_excess), ("dance", 0.3, dance_excess)])
def test_the_other_samplers_exceed_it_at_every_step(sampler, eta, excess):
    sigmas = make_sigmas(SchedulerConfig(), 50).astype(np.float64)
    assert all(excess(eta, *sigmas[i : i + 2]) > 0 for i in range(1, 49))
    measured = []
    for step in STEPS:
        left, expected = residual(sampler, eta, step)
        predicted = excess(eta, *sigmas[step : step + 2])
        assert abs(left / expected / (1 + predicted) - 1) < 4 * 7.1e-4, step
        measured.append(left / expected - 1)
    assert measured[-1] > 1, "the last noisy step leaves more than twice the noise"
