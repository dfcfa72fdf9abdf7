"""pi-Flow's policy: exact integration, and a distillation in two dimensions whose answer is known."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax.flow import policy, samplers


def integrated(x, estimates, levels, sigma, steps=400):
    """The policy's velocity in many small steps of the midpoint rule, float64."""
    x, found, grid = np.asarray(x, np.float64), np.asarray(estimates, np.float64), np.asarray(levels, np.float64)

    def clean(s):
        return np.stack([np.interp(s, grid[::-1], found[::-1, i]) for i in range(found.shape[1])])

    points = np.linspace(grid[0], sigma, steps + 1)
    for high, low in itertools.pairwise(points):
        middle, h = (high + low) / 2, low - high
        half = x + h / 2 * (x - clean(high)) / high
        x = x + h * (half - clean(middle)) / middle
    return x


@given(st.integers(1, 5), st.integers(0, 2**31), st.floats(0.05, 1.0))
def test_following_a_policy_is_integrating_its_velocity(count, seed, share):
    rng = np.random.default_rng(seed)
    high, low = 0.9, 0.3
    levels = policy.grid(high, low, count)
    estimates, x = rng.standard_normal((count, 2)).astype(np.float32), rng.standard_normal(2).astype(np.float32)
    sigma = high + share * (low - high)
    got = policy.follow(jnp.asarray(x), jnp.asarray(estimates), levels, jnp.float32(sigma))
    known = np.linspace(high, low, count) if count > 1 else np.array([high, low])
    found = estimates if count > 1 else np.repeat(estimates, 2, axis=0)
    np.testing.assert_allclose(got, integrated(x, found, known, sigma), atol=1e-3)


@given(st.integers(1, 5), st.integers(0, 2**31), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_following_in_two_parts_is_following_at_once(count, seed, first, second):
    rng = np.random.default_rng(seed)
    levels = policy.grid(0.9, 0.0, count)
    estimates = jnp.asarray(rng.standard_normal((count, 3, 1, 2)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((3, 1, 2)), jnp.float32)
    # One level of each sample.
    middle = jnp.float32(0.9) * (1 - 0.9 * first) * jnp.array([1.0, 0.9, 0.5])
    end = middle * second
    halfway = policy.follow(x, estimates, levels, middle)
    both = policy.follow(halfway, estimates, levels, end, start=middle)
    np.testing.assert_allclose(both, policy.follow(x, estimates, levels, end), atol=2e-5)


def test_a_mean_velocity_leads_to_the_end_of_its_window():
    """The loss is 0 where the teacher moves in a straight line from the visited state to the end of the window."""
    levels = policy.grid(0.8, 0.0, 4)
    estimates = jax.random.normal(jax.random.key(0), (4, 2, 3, 1))
    x = jax.random.normal(jax.random.key(1), (2, 3, 1))
    targets, ends = jnp.array([[0.7, 0.3]]), jnp.array([[0.6, 0.0]])
    visited = policy.follow(x, estimates, levels, targets[0])
    reached = policy.follow(x, estimates, levels, ends[0])
    exact = (visited - reached) / (targets[0] - ends[0])[:, None, None]

    def losses(extra):
        return policy.policy_losses(estimates, levels, lambda x, sigma: exact + extra, x, targets, ends)

    np.testing.assert_allclose(losses(0.0), 0, atol=1e-9)
    np.testing.assert_allclose(losses(0.5), 0.25, rtol=1e-4)


def test_a_last_segment_ends_at_its_last_estimate():
    estimates = jnp.arange(6.0).reshape(3, 2)
    end = policy.follow(jnp.array([5.0, -7.0]), estimates, policy.grid(0.4, 0.0, 3), jnp.float32(0))
    np.testing.assert_allclose(end, estimates[-1], atol=1e-6)


def test_a_network_that_repeats_the_teacher_is_its_estimate():
    x, v = jnp.ones((1, 3, 2)), jnp.full((1, 3, 2), 0.5)
    found = policy.estimates_of(jnp.concatenate([v] * 4, axis=-1), x, jnp.float32(0.8))
    np.testing.assert_allclose(found, np.full((4, 1, 3, 2), 1 - 0.8 * 0.5))


# Two points, each as likely: the clean sample is one of them.
MODES = np.array([[2.0, 0.5], [-1.0, -1.5]], np.float32)


def teacher(x: jax.Array, sigma: jax.Array) -> jax.Array:
    """Exact velocity of a mixture of two narrow Gaussians (standard deviation 0.2), [B, 1, 2]; sigma scalar or [B]."""
    sigma = jnp.reshape(sigma, (-1, 1, 1))
    variance = (1 - sigma) ** 2 * 0.04 + sigma**2
    offsets = x[..., None, :] - (1 - sigma)[..., None] * MODES
    chances = jax.nn.softmax(-jnp.sum(offsets**2, axis=-1) / (2 * variance), axis=-1)
    gain = (1 - sigma) * 0.04 / variance
    clean = jnp.sum(chances[..., None] * (MODES + gain[..., None] * offsets), axis=-2)
    return (x - clean) / sigma


def network(params, x, sigma):
    """A small perceptron on top of the teacher's own velocity: [B, 1, 2] -> [B, 1, N * 2]."""
    features = jnp.concatenate([x, jnp.sin(2 * x), jnp.full((*x.shape[:-1], 1), sigma)], axis=-1)
    for w, b in params[:-1]:
        features = jax.nn.tanh(features @ w + b)
    w, b = params[-1]
    repeated = jnp.concatenate([teacher(x, sigma)] * (w.shape[1] // 2), axis=-1)
    return repeated + features @ w + b


def untrained(count, key):
    sizes = [(5, 64), (64, 64), (64, 2 * count)]
    keys = jax.random.split(key, len(sizes))
    scales = [1, 1, 0]
    return [
        (scale * jax.random.normal(k, s) / s[0] ** 0.5, jnp.zeros(s[1]))
        for k, s, scale in zip(keys, sizes, scales, strict=True)
    ]


@partial(jax.jit, static_argnames=("segments", "count", "steps"))
def trained(params, key, segments, count, steps):
    bounds = jnp.linspace(1, 0, segments + 1)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(params, key):
        keys = jax.random.split(key, 3)
        k = jax.random.randint(keys[0], (), 0, segments)
        x = jax.random.normal(keys[1], (256, 1, 2))

        fixed = jax.lax.stop_gradient(params)

        def through(i, x):
            levels = policy.grid(bounds[i], bounds[i + 1], count)
            estimates = policy.estimates_of(network(fixed, x, bounds[i]), x, bounds[i])
            return policy.follow(x, estimates, levels, bounds[i + 1])

        x = jax.lax.fori_loop(0, k, through, x)
        low = jnp.maximum(bounds[k + 1], 0.02)
        targets = jax.random.uniform(keys[2], (4, len(x)), minval=low, maxval=bounds[k])
        levels = policy.grid(bounds[k], bounds[k + 1], count)
        estimates = policy.estimates_of(network(params, x, bounds[k]), x, bounds[k])
        return policy.policy_losses(estimates, levels, teacher, x, targets).mean()

    def step(carry, key):
        params, state = carry
        # The roll-out has a trip count that is drawn: gradients flow through the loss alone.
        value, gradients = jax.value_and_grad(lambda p: loss(p, key))(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))
    return params, losses


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_a_student_of_few_evaluations_samples_as_the_teacher_of_many(segments):
    """Against the exact flow from the same noise: far below Euler at the same evaluations, and at both modes."""
    count = 6
    params, losses = trained(untrained(count, jax.random.key(0)), jax.random.key(1), segments, count, 1500)
    assert losses[-100:].mean() < 0.3 * losses[:100].mean()
    noise = jax.random.normal(jax.random.key(2), (1000, 1, 2))
    few, many = np.linspace(1, 0, segments + 1), np.linspace(1, 0, 401)
    exact = samplers.sample("heun", teacher, noise, many)
    student = samplers.sample("pi_flow", partial(network, params), noise, few)
    euler = samplers.sample("euler", teacher, noise, few)
    # The median: noise near the border between the modes may end at either.
    errors = [float(np.median(np.abs(np.asarray(x) - np.asarray(exact)))) for x in (student, euler)]
    assert errors[0] < 0.5 * errors[1], errors
    near = [np.mean(np.linalg.norm(np.asarray(student)[:, 0] - mode, axis=-1) < 0.8) for mode in MODES]
    assert sum(near) > 0.9, near
    assert min(near) > 0.3, near
