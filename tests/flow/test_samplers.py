"""Samplers against the golden arrays, and the properties that reinforcement learning relies on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepgen_jax.config import SchedulerConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow import samplers, schedule

GOLDEN_NAMES = {"cps": "cps_sde", "flow": "flowgrpo_sde", "dance": "dance_sde"}
KINDS = list(GOLDEN_NAMES)


@pytest.mark.parametrize("eta", [0.7, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_sde_step_matches_golden(goldens, tolerance, kind, eta):
    golden, prefix = goldens("rl"), f"sde/{GOLDEN_NAMES[kind]}/eta{eta}"
    sigmas = golden["sde/sigmas"]
    arguments = (golden["sde/velocity"], golden["sde/sample"], sigmas[:-1], sigmas[1:], sigmas[1], eta)
    following, mean, std, log_prob = samplers.sde_step(kind, *arguments, next_sample=golden["sde/next"])
    np.testing.assert_array_equal(following, golden["sde/next"])
    np.testing.assert_allclose(mean, golden[f"{prefix}/mean"], rtol=0, atol=tolerance("rl", f"{prefix}/mean"))
    np.testing.assert_allclose(
        std, golden[f"{prefix}/noise_scale"], rtol=0, atol=tolerance("rl", f"{prefix}/noise_scale")
    )
    np.testing.assert_allclose(log_prob, golden[f"{prefix}/log_prob"], rtol=2e-5)
    schedule_std = samplers.transition(kind, *arguments).schedule_std
    np.testing.assert_allclose(schedule_std, golden[f"{prefix}/std"], rtol=0, atol=tolerance("rl", f"{prefix}/std"))


def random_step(seed: int, batch: int = 3):
    rng = np.random.default_rng(seed)
    sample, velocity, noise = rng.standard_normal((3, batch, 4, 2, 2)).astype(np.float32)
    sigmas = schedule.make_sigmas(SchedulerConfig(), 10)
    steps = rng.integers(0, 9, batch)
    return velocity, sample, sigmas[steps], sigmas[steps + 1], sigmas[1], noise


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS), eta=st.floats(0.1, 1.0))
def test_log_prob_of_a_draw_equals_that_of_its_evaluation(seed, kind, eta):
    *arguments, noise = random_step(seed)
    following, mean, std, drawn = samplers.sde_step(kind, *arguments, eta, noise=noise)
    np.testing.assert_allclose(following, mean + np.asarray(std)[:, None, None, None] * noise, rtol=1e-6, atol=1e-6)
    again = samplers.sde_step(kind, *arguments, eta, next_sample=following)
    np.testing.assert_array_equal(again[3], drawn)
    np.testing.assert_array_equal(again[1], mean)


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_does_not_depend_on_the_batch(kind):
    *arguments, noise = random_step(0)
    step = jax.jit(samplers.sde_step, static_argnames="kind")
    whole = step(kind, *arguments, 0.7, noise=noise)
    velocity, sample, sigma, sigma_next, sigma_1 = arguments
    for i in range(3):
        rows = slice(i, i + 1)
        alone = step(kind, velocity[rows], sample[rows], sigma[i], sigma_next[i], sigma_1, 0.7, noise=noise[rows])
        for batched, single in zip(whole, alone, strict=True):
            np.testing.assert_allclose(batched[rows], single, rtol=1e-6, atol=1e-6)
        assert alone[2].shape == alone[3].shape == (1,)


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_gradient_holds_the_next_sample_fixed(kind):
    velocity, *arguments, noise = random_step(0)
    following = samplers.sde_step(kind, velocity, *arguments, 0.7, noise=noise)[0]

    def log_prob(v, **given):
        return jnp.sum(samplers.sde_step(kind, v, *arguments, 0.7, **given)[3])

    drawn = jax.grad(log_prob)(velocity, noise=noise)
    np.testing.assert_allclose(drawn, jax.grad(log_prob)(velocity, next_sample=following), rtol=1e-5, atol=1e-7)
    assert float(jnp.abs(drawn).max()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_velocity_is_computed_in_float32(kind):
    velocity, *arguments, noise = random_step(0)
    half = jnp.asarray(velocity, jnp.bfloat16)
    outputs = samplers.sde_step(kind, half, *arguments, 0.7, noise=noise)
    assert all(output.dtype == jnp.float32 for output in outputs)
    expected = samplers.sde_step(kind, half.astype(jnp.float32), *arguments, 0.7, noise=noise)
    np.testing.assert_array_equal(outputs[0], expected[0])


def test_cps_at_full_strength_keeps_no_predicted_noise():
    velocity, sample, sigma, sigma_next, sigma_1, _ = random_step(0)
    mean = samplers.transition("cps", velocity, sample, sigma, sigma_next, sigma_1, 1.0).mean
    levels, next_levels = sigma[:, None, None, None], sigma_next[:, None, None, None]
    np.testing.assert_array_equal(mean, (1 - next_levels) * (sample - levels * velocity))


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_a_step_is_an_euler_step(kind):
    velocity, sample, sigma, sigma_next, sigma_1, _ = random_step(1)
    mean, std, _ = samplers.transition(kind, velocity, sample, sigma, sigma_next, sigma_1, 0.0)
    np.testing.assert_array_equal(std, 0)
    np.testing.assert_allclose(mean, samplers.euler_step(velocity, sample, sigma, sigma_next), rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_cps_keeps_the_noise_level_and_flow_sde_exceeds_it(eta):
    """With a perfect model, x' - (1 - s') x_0 has standard deviation s' under Flow-CPS and more under Flow-SDE."""
    sigmas = schedule.make_sigmas(SchedulerConfig(), 10)
    steps = np.arange(1, 9)
    clean = np.float32(0.8)
    first, second = np.random.default_rng(0).standard_normal((2, len(steps), 50000)).astype(np.float32)
    levels = sigmas[steps][:, None]
    sample, velocity = (1 - levels) * clean + levels * first, first - clean

    def noise_level(kind):
        following = samplers.sde_step(
            kind, velocity, sample, sigmas[steps], sigmas[steps + 1], sigmas[1], eta, noise=second
        )[0]
        residual = np.asarray(following) - (1 - sigmas[steps + 1][:, None]) * clean
        np.testing.assert_allclose(residual.mean(1), 0, atol=0.02)
        return residual.std(1) / sigmas[steps + 1]

    np.testing.assert_allclose(noise_level("cps"), 1, atol=0.012)
    ratio = noise_level("flow")
    assert ratio.min() > 1
    # The variance is s'^2 + std^2 (1 - s'/s) + (std^2 / 2 s)^2 exactly.
    std = np.asarray(
        samplers.transition("flow", velocity, sample, sigmas[steps], sigmas[steps + 1], sigmas[1], eta).std
    )
    expected = sigmas[steps + 1] ** 2 + std**2 * (1 - sigmas[steps + 1] / sigmas[steps])
    expected += (std**2 / (2 * sigmas[steps])) ** 2
    np.testing.assert_allclose(ratio, np.sqrt(expected) / sigmas[steps + 1], rtol=0.012)


def test_ode_of_a_perfect_model_reaches_the_clean_sample():
    clean, noise = np.random.default_rng(0).standard_normal((2, 2, 4, 2, 2)).astype(np.float32)
    sigmas = schedule.make_sigmas(SchedulerConfig(), 5)
    seen = []

    def velocity_fn(x, sigma, index):
        assert x.dtype == jnp.float32
        seen.append((sigma.shape, index.dtype))
        return (x - clean) / sigma

    final, states = jax.jit(lambda e: samplers.sample_ode(velocity_fn, e, sigmas, return_trajectory=True))(noise)
    assert set(seen) == {((), jnp.dtype("int32"))}
    np.testing.assert_allclose(final, clean, atol=1e-5)
    assert states.shape == (6, *noise.shape)
    np.testing.assert_array_equal(states[0], noise)
    np.testing.assert_array_equal(states[-1], final)
    for state, sigma in zip(states, sigmas, strict=True):
        np.testing.assert_allclose(state, (1 - sigma) * clean + sigma * noise, atol=1e-5)
    np.testing.assert_array_equal(samplers.sample_ode(velocity_fn, noise, sigmas), final)


def test_ode_passes_step_indices_and_equals_a_loop():
    noise = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    sigmas = schedule.make_sigmas(SchedulerConfig(), 4)

    def velocity_fn(x, sigma, index):
        return jnp.sin(x) * (index + 1) + sigma

    expected = noise
    for i in range(4):
        expected = samplers.euler_step(velocity_fn(expected, sigmas[i], i), expected, sigmas[i], sigmas[i + 1])
    np.testing.assert_allclose(samplers.sample_ode(velocity_fn, noise, sigmas), expected, rtol=0, atol=1e-6)


def test_bad_input_is_refused():
    *arguments, noise = random_step(0)
    with pytest.raises(DeepGenError, match="ddim"):
        samplers.sde_step("ddim", *arguments, 1.0, noise=noise)
    with pytest.raises(DeepGenError, match="exactly one"):
        samplers.sde_step("cps", *arguments, 1.0)
    with pytest.raises(DeepGenError, match="exactly one"):
        samplers.sde_step("cps", *arguments, 1.0, noise=noise, next_sample=noise)
