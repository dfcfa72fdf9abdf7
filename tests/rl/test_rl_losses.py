"""Policy loss and KL penalties, values and gradients, against the golden arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow import samplers
from deepgen_jax.rl import losses


def close(actual, goldens, tolerance, name):
    np.testing.assert_allclose(actual, goldens("rl")[name], rtol=0, atol=tolerance("rl", name))


def test_clipped_loss_golden(goldens, tolerance):
    golden = goldens("rl")
    log_prob, old, advantage = (golden[f"grpo/vector/{name}"] for name in ("log_prob", "old_log_prob", "advantage"))
    close(losses.policy_ratio(log_prob, old), goldens, tolerance, "grpo/vector/ratio")
    loss, gradient = jax.value_and_grad(losses.clipped_policy_loss)(log_prob, old, advantage, 0.2)
    close(loss, goldens, tolerance, "grpo/vector/loss")
    close(gradient, goldens, tolerance, "grpo/vector/grad_log_prob")


@pytest.mark.parametrize("kl", ["plain", "divided"])
def test_whole_loss_and_its_gradient_golden(goldens, tolerance, kl):
    names = ("sample", "velocity", "ref_velocity", "next", "advantage", "old_log_prob", "step")
    golden = {name: goldens("rl")[f"grpo/tensor/{name}"] for name in names}
    sigmas, step = goldens("rl")["sde/sigmas"], golden["step"]
    levels = (golden["sample"], sigmas[step], sigmas[step + 1], sigmas[1], 0.7)

    def total(velocity):
        *_, log_prob = samplers.sde_step("flow", velocity, *levels, next_sample=golden["next"])
        ratio = losses.policy_ratio(log_prob, golden["old_log_prob"])
        policy = losses.clipped_policy_loss(log_prob, golden["old_log_prob"], golden["advantage"], 0.0005)
        std = samplers.transition("flow", velocity, *levels).schedule_std if kl == "divided" else None
        penalty = losses.velocity_kl(velocity, golden["ref_velocity"], std)
        return policy + 0.03 * penalty, (ratio, policy, penalty)

    (loss, (ratio, policy, penalty)), gradient = jax.value_and_grad(total, has_aux=True)(golden["velocity"])
    close(ratio, goldens, tolerance, "grpo/tensor/ratio")
    close(policy, goldens, tolerance, "grpo/tensor/policy_loss")
    close(penalty, goldens, tolerance, f"grpo/tensor/{kl}/kl")
    close(loss, goldens, tolerance, f"grpo/tensor/{kl}/loss")
    close(gradient, goldens, tolerance, f"grpo/tensor/{kl}/grad_velocity")
    close(jnp.linalg.norm(gradient.ravel()), goldens, tolerance, f"grpo/tensor/{kl}/grad_norm")


def test_summed_kl_golden(goldens, tolerance):
    golden = goldens("rl")
    total = losses.velocity_kl(golden["grpo/tensor/velocity"], golden["grpo/tensor/ref_velocity"], reduction="sum")
    close(total, goldens, tolerance, "grpo/tensor/plain/kl_sum")


def test_first_update_has_ratio_one_and_the_plain_policy_gradient():
    log_prob = jnp.array([-0.3, 2.0, -30.0])
    advantage = jnp.array([1.0, -2.0, 0.5])
    np.testing.assert_array_equal(losses.policy_ratio(log_prob, log_prob), 1)
    gradient = jax.grad(losses.clipped_policy_loss)(log_prob, log_prob, advantage, 1e-4)
    np.testing.assert_allclose(gradient, -advantage / 3, rtol=1e-6)


@pytest.mark.parametrize(("advantage", "direction"), [(1.0, 1), (-1.0, -1)])
def test_gradient_stops_beyond_the_clip_only_where_it_would_go_further(advantage, direction):
    def gradient(log_ratio):
        grad = jax.grad(losses.clipped_policy_loss)
        return float(grad(jnp.array([log_ratio]), jnp.zeros(1), jnp.array([advantage]), 0.1)[0])

    assert gradient(0.5 * direction) == 0
    assert np.sign(gradient(-0.5 * direction)) == -direction


def test_sample_of_no_advantage_has_no_gradient():
    gradient = jax.grad(losses.clipped_policy_loss)(jnp.array([0.1, 0.1]), jnp.zeros(2), jnp.array([0.0, 1.0]), 0.5)
    assert gradient[0] == 0
    assert gradient[1] != 0


def test_penalties_pull_the_policy_and_not_the_reference_apart():
    v, reference = np.random.default_rng(0).standard_normal((2, 3, 4, 2, 2)).astype(np.float32)
    for penalty in (losses.velocity_kl, losses.latent_kl):
        gradient = jax.grad(penalty)(v, reference)
        np.testing.assert_allclose(gradient, 2 * (v - reference) / v.size, rtol=1e-5)
        assert float(penalty(v, v)) == 0


def test_latent_kl_is_the_divergence_of_two_gaussians():
    mean, reference = np.random.default_rng(0).standard_normal((2, 3, 4, 2, 2)).astype(np.float32)
    std = np.array([0.5, 1.0, 2.0], np.float32)
    expected = np.mean(np.square(mean - reference) / (2 * std[:, None, None, None] ** 2))
    np.testing.assert_allclose(losses.latent_kl(mean, reference, std), expected, rtol=1e-5)
    assert np.isfinite(losses.latent_kl(mean, reference, 0.0))


def test_unknown_reduction_is_refused():
    with pytest.raises(DeepGenError, match="median"):
        losses.velocity_kl(np.ones((1, 2)), np.ones((1, 2)), reduction="median")
