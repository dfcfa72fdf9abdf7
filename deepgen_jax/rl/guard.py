"""GRPO-Guard: normalised ratios and balanced gradients (Wang et al. 2025, arXiv 2510.22319).

Of a Gaussian transition x' = mu_old + std e, the log-ratio of two policies is e (mu - mu_old) / std - (mu - mu_old)^2
/ (2 std^2): its mean is below 0 and its spread grows as std falls, so that one clip range fits no two steps alike.
Ratio normalisation adds the square back and multiplies by std. What remains is

  log r = mean over elements of e (mu - mu_old),

which has mean 0 over e at every step. It is computed in this form: the noise e is drawn again from the image's key, and
mu_old = x' - std e, so that nothing more is stored than for GRPO. Samplers whose log-probability has no normaliser
("cps") get the same expression, that of the Gaussian they sample from.

The gradient of log r with respect to the velocity still carries the factor d mu / d v, which differs by step. Gradient
reweighting divides the loss by it. For Flow-SDE it is |dt| (1 + eta^2 / 2), the paper's |dt| up to a constant.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepgen_jax.flow.samplers import transition
from deepgen_jax.rl.losses import clipped_policy_loss
from deepgen_jax.rl.objective import Step, Surrogate
from deepgen_jax.rl.rollout import step_noise

#: A step at which the velocity hardly matters is weighted as if d mu / d v were this.
SMALLEST_GAIN = 1e-4


def normalised_log_ratio(sampler: str, step: Step, velocity: jax.Array) -> jax.Array:
    """Mean over elements of e (mu - mu_old): float32 [b], differentiable in ``velocity``."""
    now = transition(sampler, velocity, step.sample, *step.levels)
    noise = step_noise(step.keys, step.number, step.sample.shape[1:])
    old_mean = step.following - now.std[:, None, None] * noise
    return jnp.mean(noise * (now.mean - old_mean), axis=(1, 2))


def mean_gain(sampler: str, step: Step) -> jax.Array:
    """|d mu / d v| of the step, scalar: transitions are affine in the velocity, with the same factor everywhere."""
    one = jnp.ones((1, 1, 1))
    return jnp.abs(transition(sampler, one, jnp.zeros_like(one), *step.levels).mean[0, 0, 0])


def guarded_surrogate(sampler: str, clip: float, step: Step, velocity: jax.Array, advantages: jax.Array) -> Surrogate:
    """The clipped policy loss with normalised ratios, divided by the step's gain; arguments as for GRPO."""
    log_ratio = normalised_log_ratio(sampler, step, velocity)
    loss = clipped_policy_loss(log_ratio, jnp.zeros_like(log_ratio), advantages, clip)
    return Surrogate(loss / jnp.maximum(mean_gain(sampler, step), SMALLEST_GAIN), jnp.exp(log_ratio))
