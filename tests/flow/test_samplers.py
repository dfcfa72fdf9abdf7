"""Samplers against the golden arrays, and the properties that reinforcement learning relies on."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepgen_jax.config import SchedulerConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow import samplers, schedule
from deepgen_jax.flow.samplers import SAMPLERS
from deepgen_jax.inference.programs import padded_sigmas

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

    def velocity_fn(x, sigma):
        assert x.dtype == jnp.float32
        seen.append((sigma.shape, sigma.dtype))
        return (x - clean) / sigma

    final, states = jax.jit(lambda e: samplers.sample("euler", velocity_fn, e, sigmas, return_trajectory=True))(noise)
    assert set(seen) == {((), jnp.dtype("float32"))}
    np.testing.assert_allclose(final, clean, atol=1e-5)
    assert states.shape == (6, *noise.shape)
    np.testing.assert_array_equal(states[0], noise)
    np.testing.assert_array_equal(states[-1], final)
    for state, sigma in zip(states, sigmas, strict=True):
        np.testing.assert_allclose(state, (1 - sigma) * clean + sigma * noise, atol=1e-5)
    np.testing.assert_allclose(samplers.sample("euler", velocity_fn, noise, sigmas), final, rtol=0, atol=1e-6)


def test_euler_equals_a_loop():
    noise = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    sigmas = schedule.make_sigmas(SchedulerConfig(), 4)

    def velocity_fn(x, sigma):
        return jnp.sin(x) * (1 + sigma) + sigma

    expected = noise
    for i in range(4):
        expected = samplers.euler_step(velocity_fn(expected, sigmas[i]), expected, sigmas[i], sigmas[i + 1])
    np.testing.assert_allclose(samplers.sample("euler", velocity_fn, noise, sigmas), expected, rtol=0, atol=1e-6)


def gaussian_velocity(x, sigma, mean=0.7, std=0.4):
    """E[e - x_0 | x] of data from N(mean, std^2); solved by (1 - s) mean + sqrt((1 - s)^2 std^2 + s^2) e."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    residual = (x - (1 - sigma) * mean) / variance
    return sigma * residual - mean - (1 - sigma) * std**2 * residual


def gaussian_solution(noise, sigma, mean=0.7, std=0.4):
    return (1 - sigma) * mean + np.sqrt((1 - sigma) ** 2 * std**2 + sigma**2) * noise


def observed_order(errors):
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


@pytest.mark.parametrize(("end", "tolerance"), [(0.1, 0.3), (0.0, 0.4)])
@pytest.mark.parametrize("name", SAMPLERS.names())
def test_order_of_convergence(name, end, tolerance):
    """The error of a smooth field with a known solution falls as steps^-order; without noise all are ODE samplers.

    DPM++ 2M, whose last step to sigma 0 is of first order, approaches its order slowly there.
    """
    noise = np.linspace(-2, 2, 9, dtype=np.float32)[:, None]
    sampler = samplers.get_sampler(name)
    errors = []
    for steps in (32, 64, 128) if end else (64, 128, 256):
        sigmas = np.linspace(1, end, steps + 1).astype(np.float32)
        final = samplers.sample(name, gaussian_velocity, noise, sigmas, eta=0.0)
        errors.append(float(np.max(np.abs(final - gaussian_solution(noise, end)))))
    order = observed_order(errors)
    assert np.all(np.abs(order - sampler.order) < tolerance), (order, errors)


@pytest.mark.parametrize(("name", "eta"), [("flow", 0.7), ("dance", 0.5)])
def test_noise_converges_to_the_right_distribution(name, eta):
    """Mean and variance of linear steps, which are followed exactly, converge to those of the SDE at first order."""
    begin, end = 0.9, 0.1
    errors = []
    for steps in (16, 32, 64, 128):
        sigmas = np.linspace(begin, end, steps + 1).astype(np.float32)
        mean, variance = gaussian_solution(0, begin), gaussian_solution(1, begin) - gaussian_solution(0, begin)
        variance = variance**2
        for sigma, following in itertools.pairwise(sigmas):
            x = np.array([[0.0], [1.0]], np.float32)
            step = samplers.transition(name, gaussian_velocity(x, sigma), x, sigma, following, sigmas[1], eta)
            offset, slope = float(step.mean[0, 0]), float(step.mean[1, 0] - step.mean[0, 0])
            mean, variance = offset + slope * mean, slope**2 * variance + float(step.std[0]) ** 2
        spread = gaussian_solution(1, end) - gaussian_solution(0, end)
        errors.append(abs(mean - gaussian_solution(0, end)) + abs(np.sqrt(variance) - spread))
    assert np.all(np.abs(observed_order(errors) - 1) < 0.35), errors


@pytest.mark.parametrize("name", SAMPLERS.names())
def test_steps_in_pieces_equal_all_at_once_and_compile_once(name):
    noise = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5)), jnp.float32)
    keys = jax.random.split(jax.random.key(3), 100)
    traces = []

    @jax.jit
    def advance(state, sigmas, first, last):
        traces.append(name)
        velocity = lambda x, sigma, cache: (gaussian_velocity(x, sigma), cache + 1)  # noqa: E731
        draw = lambda index: jax.random.normal(keys[index], noise.shape)  # noqa: E731
        return samplers.advance(name, velocity, state, sigmas, first, last, draw, 0.5)

    evaluations = samplers.get_sampler(name).evaluations
    for steps in (7, 12):
        sigmas = padded_sigmas(schedule.make_sigmas(SchedulerConfig(), steps))
        begin = samplers.start(name, noise, cache=jnp.int32(0))
        whole = advance(begin, sigmas, 0, steps)
        pieces = advance(advance(begin, sigmas, 0, 3), sigmas, 3, steps)
        jax.tree.map(np.testing.assert_array_equal, whole, pieces)
        assert int(whole.cache) == steps * evaluations
        draw = lambda index: jax.random.normal(keys[index], noise.shape)  # noqa: E731
        plain = samplers.sample(name, gaussian_velocity, noise, sigmas[: steps + 1], noise_fn=draw, eta=0.5)
        np.testing.assert_allclose(whole.x, plain, rtol=0, atol=2e-5)
    assert len(traces) == 1


def test_previews_are_the_predicted_clean_sample():
    noise = jnp.ones((1, 3))
    sigmas = schedule.make_sigmas(SchedulerConfig(), 4)
    clean = jnp.asarray([[0.5, -1.0, 2.0]])
    state = samplers.start("euler", noise)
    velocity = lambda x, sigma, cache: ((x - clean) / sigma, cache)  # noqa: E731
    np.testing.assert_allclose(samplers.advance("euler", velocity, state, sigmas, 0, 2).clean, clean, atol=1e-6)


class Midpoint(samplers.Sampler):
    """As a user's package would write it."""

    order = 2
    evaluations = 2

    def step(self, velocity, x, memory, step):
        middle = (step.sigma + step.sigma_next) / 2
        half = samplers.euler_step(velocity(x, step.sigma), x, step.sigma, middle)
        return samplers.euler_step(velocity(half, middle), x, step.sigma, step.sigma_next), memory


def test_a_sampler_from_outside_the_package(monkeypatch):
    monkeypatch.setattr(SAMPLERS, "_targets", dict(SAMPLERS._targets))
    SAMPLERS.register("midpoint", Midpoint)
    noise = np.float32([[0.3], [-1.2]])
    errors = [
        float(np.max(np.abs(
            samplers.sample("midpoint", gaussian_velocity, noise, np.linspace(1, 0, steps + 1))
            - gaussian_solution(noise, 0.0)
        )))
        for steps in (8, 16, 32)
    ]  # fmt: skip
    assert np.all(observed_order(errors) > 1.65), errors


@pytest.mark.parametrize("spelling", ["DPM++ 2M", "dpm++2m", "dpmpp-2m", "Euler", "HEUN"])
def test_names_may_be_spelled_freely(spelling):
    assert samplers.get_sampler(spelling).order in (1, 2)


def test_bad_input_is_refused():
    *arguments, noise = random_step(0)
    with pytest.raises(DeepGenError, match="ddim"):
        samplers.sde_step("ddim", *arguments, 1.0, noise=noise)
    with pytest.raises(DeepGenError, match="'euler' is deterministic"):
        samplers.sde_step("euler", *arguments, 1.0, noise=noise)
    with pytest.raises(DeepGenError, match=r"'huen' is unknown; did you mean heun\?"):
        samplers.sample("huen", gaussian_velocity, noise, np.float32([1, 0]))
    with pytest.raises(DeepGenError, match="exactly one"):
        samplers.sde_step("cps", *arguments, 1.0)
    with pytest.raises(DeepGenError, match="exactly one"):
        samplers.sde_step("cps", *arguments, 1.0, noise=noise, next_sample=noise)
