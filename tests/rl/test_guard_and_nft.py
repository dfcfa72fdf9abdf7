"""GRPO-Guard and DiffusionNFT against their equations, and an update of each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import tiny_rl as tiny

from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow.samplers import transition
from deepgen_jax.rl.algorithms import ALGORITHMS, get_algorithm, register
from deepgen_jax.rl.guard import guarded_surrogate, mean_gain, normalised_log_ratio
from deepgen_jax.rl.nft import contrastive_losses, nft_step, optimality, updated_old_policy
from deepgen_jax.rl.objective import step_of
from deepgen_jax.rl.rl_config import NFTConfig, PolicyConfig
from deepgen_jax.rl.rollout import Trajectory, image_keys, step_noise
from deepgen_jax.rl.update import UpdateKeys
from deepgen_jax.training.state import init_state


def taken(sampler, eta, images=64, steps=10, elements=(16, 16)):
    """A step from known velocities, as a rollout would store it: (step, old velocity, keys' noise)."""
    from deepgen_jax.flow.schedule import make_sigmas

    sigmas = jnp.asarray(make_sigmas(tiny.SCHEDULER, steps))
    sample, old = jax.random.normal(jax.random.key(0), (2, images, *elements))
    keys, index = image_keys(0, np.arange(images)), 4
    noise = step_noise(keys, index, elements)
    levels = (sigmas[index], sigmas[index + 1], sigmas[1], eta)
    now = transition(sampler, old, sample, *levels)
    following = now.mean + now.std[:, None, None] * noise
    latents = jnp.zeros((steps + 1, *sample.shape)).at[index].set(sample).at[index + 1].set(following)
    trajectory = Trajectory(latents, jnp.zeros((steps, images)), sigmas, keys)
    return step_of(trajectory, jnp.int32(index), jnp.arange(images), eta), old, noise


@pytest.mark.parametrize(("sampler", "eta"), [("flow", 0.7), ("dance", 0.5), ("cps", 1.0)])
def test_guard_normalises_the_ratio(sampler, eta):
    """std (log-ratio of the Gaussians + |mu - mu_old|^2 / (2 std^2)), which has mean 0."""
    step, old, _ = taken(sampler, eta)
    v = old + 0.05 * jax.random.normal(jax.random.key(3), old.shape)
    got = normalised_log_ratio(sampler, step, v)
    now, before = (transition(sampler, x, step.sample, *step.levels) for x in (v, old))
    std = np.asarray(now.std, np.float64)[:, None, None]
    moved, mean, mean_old = (np.asarray(x, np.float64) for x in (step.following, now.mean, before.mean))
    log_ratio = (-((moved - mean) ** 2) + (moved - mean_old) ** 2) / (2 * std**2)
    expected = np.mean(std * (log_ratio + (mean - mean_old) ** 2 / (2 * std**2)), axis=(1, 2))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    spread = float(jnp.std(got))
    assert abs(float(jnp.mean(got))) < 4 * spread / np.sqrt(len(got))
    np.testing.assert_allclose(normalised_log_ratio(sampler, step, old), 0, atol=1e-7)


def test_guard_balances_gradients():
    gains = {"flow": lambda s, n: (s - n) * (1 + 0.7**2 / 2), "cps": lambda s, n: s * (1 - n)}
    advantages = jax.random.normal(jax.random.key(1), (64,))
    for sampler, eta in (("flow", 0.7), ("cps", 1.0)):
        step, old, noise = taken(sampler, eta)
        s, following = map(float, step.levels[:2])
        np.testing.assert_allclose(mean_gain(sampler, step), gains[sampler](s, following), rtol=1e-4)
        gradient = jax.grad(lambda v, a=sampler, b=step: guarded_surrogate(a, 0.1, b, v, advantages).loss)(old)
        # With the factor d mu / d v gone it is that of -A e v, whatever the sampler and the step.
        expected = -advantages[:, None, None] * noise / noise.size
        np.testing.assert_allclose(jnp.abs(gradient), jnp.abs(expected), atol=1e-7, rtol=1e-3)


def test_registry_says_what_each_algorithm_needs():
    algorithms = {name: get_algorithm(name) for name in ALGORITHMS.names()}
    needs = {name: (algorithm.trajectory, algorithm.old_policy) for name, algorithm in algorithms.items()}
    assert needs == {"grpo": (True, False), "guard": (True, False), "nft": (False, True)}


MY_ALGORITHM = """
import jax.numpy as jnp
from deepgen_jax.rl.objective import Surrogate, clipped_surrogate

def unclipped(sampler, clip, step, velocity, advantages):
    found = clipped_surrogate(sampler, clip, step, velocity, advantages)
    return Surrogate(-jnp.mean(advantages * found.ratio), found.ratio)
"""


def test_algorithm_from_outside(tmp_path, monkeypatch):
    (tmp_path / "my_algorithm.py").write_text(MY_ALGORITHM)
    monkeypatch.syspath_prepend(str(tmp_path))
    register("unclipped", "my_algorithm:unclipped")
    step, old, _ = taken("cps", 1.0)
    advantages, moved = jnp.linspace(-1, 1, 64), old + 1e-3
    gradients = []
    for name in ("grpo", "unclipped", f"{tmp_path}/my_algorithm.py:unclipped"):
        surrogate = get_algorithm(PolicyConfig(algorithm=name).algorithm).surrogate
        # As long as no ratio is clipped, both have the same gradient.
        gradients.append(jax.grad(lambda v, f=surrogate: f("cps", 10.0, step, v, advantages).loss)(moved))
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(gradients[2], gradients[1])
    assert float(jnp.abs(gradients[0]).max()) > 0


def test_unknown_algorithm_is_refused():
    with pytest.raises(DeepGenError, match=r"policy.algorithm: 'gaurd' is unknown; did you mean guard"):
        PolicyConfig(algorithm="gaurd")


def test_nft_loss_pulls_to_good_images_and_away_from_bad_ones():
    rng = np.random.default_rng(0)
    clean, noise, old = rng.standard_normal((3, 2, 4, 3)).astype(np.float32)
    sigma = jnp.array([0.5, 0.5])
    noisy = 0.5 * clean + 0.5 * noise

    def loss(v, weight):
        return jnp.sum(sum(contrastive_losses(v, old, clean, noisy, sigma, weight, 0.5)))

    good, bad = (jax.grad(loss)(old, jnp.full(2, weight)) for weight in (1.0, 0.0))
    towards = (noise - clean) - old
    assert float(jnp.sum(good * towards)) < 0 < float(jnp.sum(bad * towards))
    np.testing.assert_allclose(good, -bad, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(jax.grad(loss)(old, jnp.full(2, 0.5)), 0, atol=1e-6)
    np.testing.assert_allclose(optimality(jnp.array([-9.0, -5, 0, 2.5, 5])), [0, 0, 0.5, 0.75, 1])


def test_old_policy_follows():
    old, new = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    shares = [float(updated_old_policy(NFTConfig(), old, new, jnp.int32(i))["a"][0]) for i in (0, 100, 500, 9000)]
    np.testing.assert_allclose(shares, [1, 0.9, 0.5, 0.5], rtol=1e-5)


def test_nft_step_learns_from_clean_images():
    run = tiny.Case()
    settings = run.settings(algorithm="nft", beta=0.1, micro_batch=4, nft=NFTConfig(draws=2))
    optimizer = optax.sgd(0.1)
    state = init_state(optimizer, run.trainable["params"], run.trainable["lora"], ema=True)
    clean = jax.random.normal(jax.random.key(0), (run.images, tiny.TOKENS, tiny.WIDTH))
    keys = image_keys(0, np.arange(run.images))

    @jax.jit
    def step(state, advantages):
        inputs = (run.frozen, run.reference, clean, run.condition, advantages, keys)
        return nft_step(tiny.MODEL, optimizer, settings, state, *inputs, {}, UpdateKeys(jax.random.key(1), {}))

    new, metrics = step(state, run.advantages)
    assert float(metrics["grad_norm/grpo"]) > 0
    assert float(metrics["kl"]) < 1e-10
    # On the first update the old policy becomes the new one.
    for a, b in zip(jax.tree.leaves(new.ema), jax.tree.leaves(new.trainable), strict=True):
        np.testing.assert_array_equal(a, b)
    _, unjudged = step(state, jnp.zeros(run.images))
    assert float(unjudged["grad_norm/grpo"]) < 1e-4 * float(metrics["grad_norm/grpo"])
    _, later = step(new._replace(ema=state.ema), run.advantages)
    assert float(later["old_policy_drift"]) > 0
    assert float(later["kl"]) > 0
