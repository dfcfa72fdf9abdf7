"""The MR-GRPO objective of one denoising step of a micro-batch (paper, eq. 3 and 4).

Functions of float32 velocities: those that the model and the reference predict at a stored latent, and the transition
that the rollout made.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow.samplers import sde_step, transition
from deepgen_jax.rl.losses import clipped_policy_loss, latent_kl, policy_ratio, velocity_kl
from deepgen_jax.rl.rollout import Trajectory

#: Forms of the penalty for leaving the reference: eq. 4 of the paper, the same divided by twice the schedule's
#: variance, and the divergence of the two Gaussian transitions.
KL_KINDS = ("velocity", "velocity_scaled", "latent")


class Step(NamedTuple):
    """One step of b images as the rollout took it.

    Attributes:
      number: scalar int32, i.
      sample: x_i, float32 [b, T, D].
      following: x_{i+1}, float32 [b, T, D].
      old_log_prob: float32 [b], under the policy that sampled.
      levels: sigma_i, sigma_{i+1}, sigma_1 and eta, the arguments of ``samplers.sde_step``.
      keys: [b], of the images.
    """

    number: jax.Array
    sample: jax.Array
    following: jax.Array
    old_log_prob: jax.Array
    levels: tuple[jax.Array, jax.Array, jax.Array, ArrayLike]
    keys: jax.Array


class Surrogate(NamedTuple):
    """A policy loss, scalar, and the importance ratios [b] that it clips."""

    loss: jax.Array
    ratio: jax.Array


def step_of(trajectory: Trajectory, index: jax.Array, images: jax.Array, eta: ArrayLike) -> Step:
    """Step ``index`` of the images at ``images`` [b]; nothing but these is read from the trajectory."""
    sigmas = trajectory.sigmas
    return Step(
        index,
        trajectory.latents[index, images].astype(jnp.float32),
        trajectory.latents[index + 1, images].astype(jnp.float32),
        trajectory.log_probs[index, images],
        (sigmas[index], sigmas[index + 1], sigmas[1], eta),
        trajectory.keys[images],
    )


def clipped_surrogate(sampler: str, clip: float, step: Step, velocity: jax.Array, advantages: jax.Array) -> Surrogate:
    """Policy part of eq. 3, negated: mean of max(-A r, -A clip(r, 1 - clip, 1 + clip)) with the step's ratios r.

    The log-probability comes from the same ``sde_step`` at the same sigmas as in the rollout.
    """
    log_prob = sde_step(sampler, velocity, step.sample, *step.levels, next_sample=step.following)[3]
    ratio = policy_ratio(log_prob, step.old_log_prob)
    return Surrogate(clipped_policy_loss(log_prob, step.old_log_prob, advantages, clip), ratio)


def penalty(kind: str, sampler: str, step: Step, velocity: jax.Array, reference: jax.Array) -> jax.Array:
    """Mean KL penalty of the b images, scalar.

    Args:
      kind: one of :data:`KL_KINDS`. "velocity" is eq. 4, averaged over elements; "velocity_scaled" divides it by
        2 std^2 + 1e-7 with the schedule's std; "latent" is the divergence of the two transitions per element.
      sampler: defines the transitions.
      step: where both velocities were predicted.
      velocity, reference: the policy's and the reference's, [b, T, D].

    Raises:
      DeepGenError: unknown kind.
    """
    if kind == "velocity":
        return velocity_kl(velocity, reference)
    ours = transition(sampler, velocity, step.sample, *step.levels)
    if kind == "velocity_scaled":
        return velocity_kl(velocity, reference, ours.schedule_std)
    if kind == "latent":
        return latent_kl(ours.mean, transition(sampler, reference, step.sample, *step.levels).mean, ours.std)
    raise DeepGenError(f"KL kind {kind!r} is unknown; use one of {', '.join(KL_KINDS)}")


class RatioStatistics(NamedTuple):
    """Sums and extremes over many (step, micro-batch), combined by :meth:`merged`; scalars float32."""

    number: jax.Array
    total: jax.Array
    low: jax.Array
    high: jax.Array
    clipped: jax.Array
    squared_log: jax.Array
    deviation: jax.Array

    @classmethod
    def empty(cls) -> RatioStatistics:
        """Of no ratios."""
        zero, infinity = jnp.float32(0), jnp.float32(jnp.inf)
        return cls(zero, zero, infinity, -infinity, zero, zero, zero)

    @classmethod
    def of(cls, ratio: jax.Array, clip: float) -> RatioStatistics:
        """Of ratios [b]."""
        off = jnp.abs(ratio - 1)
        return cls(
            jnp.float32(ratio.size),
            jnp.sum(ratio),
            jnp.min(ratio),
            jnp.max(ratio),
            jnp.sum(off > clip, dtype=jnp.float32),
            jnp.sum(jnp.square(jnp.log(ratio))),
            jnp.max(off),
        )

    def merged(self, other: RatioStatistics) -> RatioStatistics:
        """Of the ratios of both."""
        low, high = jnp.minimum(self.low, other.low), jnp.maximum(self.high, other.high)
        summed = ("number", "total", "clipped", "squared_log")
        sums = {name: getattr(self, name) + getattr(other, name) for name in summed}
        return RatioStatistics(low=low, high=high, deviation=jnp.maximum(self.deviation, other.deviation), **sums)

    def metrics(self) -> dict[str, jax.Array]:
        """For the log. ``approx_kl`` is the mean of log(r)^2 / 2, an estimate of the divergence from the old policy."""
        return {
            "ratio_mean": self.total / self.number,
            "ratio_min": self.low,
            "ratio_max": self.high,
            "clip_share": self.clipped / self.number,
            "approx_kl": 0.5 * self.squared_log / self.number,
        }
