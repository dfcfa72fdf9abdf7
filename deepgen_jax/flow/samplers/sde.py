"""Stochastic samplers: reinforcement learning explores with their steps and learns from their log-probabilities."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow.samplers.sampler import Sampler, Step, VelocityFn, per_sample


class Transition(NamedTuple):
    """Gaussian distribution of a step's next sample.

    Attributes:
      mean: [B, ...], float32.
      std: standard deviation of the noise that is added, [B].
      schedule_std: [B]; the diffusion coefficient where the sampler multiplies it by sqrt(|dt|) ("flow"), else ``std``.
        The scaled KL divergence in velocity space is divided by this one.
    """

    mean: jax.Array
    std: jax.Array
    schedule_std: jax.Array


class SDESampler(Sampler):
    """Base class of samplers whose step is a Gaussian :class:`Transition`."""

    stochastic = True

    def transition(
        self, v: jax.Array, x: jax.Array, s: jax.Array, s_next: jax.Array, s_1: jax.Array, eta: jax.Array
    ) -> Transition:
        """Distribution of the next sample; noise levels and eta broadcast against x, and so may the stds."""
        raise NotImplementedError

    def log_density(self, squared_error: jax.Array, std: jax.Array) -> jax.Array:
        """Log-probability from the mean squared error [B] and ``std`` [B]: Gaussian, finite where std is 0."""
        return -squared_error / (2 * (jnp.square(std) + 1e-8)) - jnp.log(std + 1e-8) - 0.5 * math.log(2 * math.pi)

    def step(self, velocity: VelocityFn, x: jax.Array, memory: Any, step: Step) -> tuple[jax.Array, Any]:
        v = velocity(x, step.sigma).astype(jnp.float32)
        mean, std, _ = self.transition(v, x, step.sigma, step.sigma_next, step.sigma_1, step.eta)
        return mean + std * step.noise(), memory


def sde_step(
    kind: str,
    velocity: ArrayLike,
    sample: ArrayLike,
    sigma: ArrayLike,
    sigma_next: ArrayLike,
    sigma_1: ArrayLike,
    eta: ArrayLike,
    noise: ArrayLike | None = None,
    next_sample: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One stochastic step, or the log-probability of a step that was taken.

    Args:
      kind: name of a stochastic sampler: "cps", "flow" or "dance".
      velocity: model output [B, ...] at (sample, sigma).
      sample: [B, ...].
      sigma: current noise level, scalar or [B].
      sigma_next: following noise level, scalar or [B].
      sigma_1: second value of the schedule, scalar or [B]; stands in for sigma = 1 where "flow" would divide by zero.
      eta: strength of the noise, scalar or [B]; 0..1 for "cps".
      noise: standard normal [B, ...]; the step is taken with it.
      next_sample: [B, ...]; its log-probability is returned and no noise is drawn. Exactly one of the two is given.

    Returns:
      (next_sample [B, ...], mean [B, ...], std [B], log_prob [B]), float32. ``std`` is that of the noise added
      (``transition`` has the schedule's as well). ``log_prob`` is averaged over all but the batch axis; it is
      differentiable in ``velocity`` with the next sample held fixed, as policy gradients need. Of "cps" it is
      -(x' - mean)^2 without a normaliser (paper eq. 7), of the others a Gaussian log-density.

    Raises:
      DeepGenError: unknown kind, or not exactly one of ``noise`` and ``next_sample``.
    """
    if (noise is None) == (next_sample is None):
        raise DeepGenError("sde_step needs exactly one of noise (to take the step) and next_sample (to evaluate it)")
    step = transition(kind, velocity, sample, sigma, sigma_next, sigma_1, eta)
    if noise is not None:
        following = step.mean + per_sample(step.std, step.mean) * jnp.asarray(noise, jnp.float32)
    else:
        following = jnp.asarray(next_sample, jnp.float32)
    squared_error = jnp.square(jax.lax.stop_gradient(following) - step.mean)
    squared_error = jnp.mean(squared_error, axis=tuple(range(1, squared_error.ndim)))
    return following, step.mean, step.std, _sde_sampler(kind).log_density(squared_error, step.std)


def transition(
    kind: str,
    velocity: ArrayLike,
    sample: ArrayLike,
    sigma: ArrayLike,
    sigma_next: ArrayLike,
    sigma_1: ArrayLike,
    eta: ArrayLike,
) -> Transition:
    """Mean and standard deviations of one stochastic step; arguments as for :func:`sde_step`.

    Raises:
      DeepGenError: unknown kind.
    """
    sampler = _sde_sampler(kind)
    sample = jnp.asarray(sample, jnp.float32)
    levels = [per_sample(value, sample) for value in (sigma, sigma_next, sigma_1, eta)]
    mean, std, schedule_std = sampler.transition(jnp.asarray(velocity, jnp.float32), sample, *levels)
    batch = sample.shape[:1]
    return Transition(mean, jnp.broadcast_to(jnp.ravel(std), batch), jnp.broadcast_to(jnp.ravel(schedule_std), batch))


def _sde_sampler(kind: str) -> SDESampler:
    from deepgen_jax.flow.samplers.registered import get_sampler

    sampler = get_sampler(kind)
    if not isinstance(sampler, SDESampler):
        raise DeepGenError(f"sampler {kind!r} is deterministic; use a stochastic one, such as cps, flow or dance")
    return sampler
