"""Samplers of the flow-matching ODE and of the SDEs that reinforcement learning explores with.

Notation: x_s = (1 - s) x_0 + s e is a sample at noise level s; v predicts e - x_0. Everything is computed in float32,
whatever the dtype of the velocity, so that a rollout and a later evaluation of its log-probability agree.

A sampler is a function of the ``Transition`` it makes and one line in ``_SAMPLERS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from deepgen_jax.errors import DeepGenError

VelocityFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


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


def euler_step(velocity: ArrayLike, sample: ArrayLike, sigma: ArrayLike, sigma_next: ArrayLike) -> jax.Array:
    """One step of the probability-flow ODE, x + (s' - s) v, in float32; sigmas are scalars or [B]."""
    sample = jnp.asarray(sample, jnp.float32)
    step = jnp.asarray(sigma_next, jnp.float32) - jnp.asarray(sigma, jnp.float32)
    return sample + _per_sample(step, sample) * jnp.asarray(velocity, jnp.float32)


@overload
def sample_ode(
    velocity_fn: VelocityFn, noise: ArrayLike, sigmas: ArrayLike, return_trajectory: Literal[False] = False
) -> jax.Array: ...
@overload
def sample_ode(
    velocity_fn: VelocityFn, noise: ArrayLike, sigmas: ArrayLike, return_trajectory: Literal[True]
) -> tuple[jax.Array, jax.Array]: ...
def sample_ode(
    velocity_fn: VelocityFn, noise: ArrayLike, sigmas: ArrayLike, return_trajectory: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Integrates from noise to a clean sample with Euler steps, as one ``jax.lax.scan``.

    Args:
      velocity_fn: (sample [B, ...] float32, sigma scalar float32, step index scalar int32) -> velocity [B, ...].
      noise: initial sample [B, ...].
      sigmas: [N + 1] of ``schedule.make_sigmas``.
      return_trajectory: return every state as well.

    Returns:
      The last sample [B, ...] in float32; with ``return_trajectory`` also all states [N + 1, B, ...], the noise first.
    """
    noise = jnp.asarray(noise, jnp.float32)
    sigmas = jnp.asarray(sigmas, jnp.float32)

    def step(sample: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        index, sigma, sigma_next = inputs
        following = euler_step(velocity_fn(sample, sigma, index), sample, sigma, sigma_next)
        return following, following if return_trajectory else None

    indices = jnp.arange(sigmas.shape[0] - 1, dtype=jnp.int32)
    final, states = jax.lax.scan(step, noise, (indices, sigmas[:-1], sigmas[1:]))
    if return_trajectory:
        return final, jnp.concatenate([noise[None], states])
    return final


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
      kind: "cps", "flow" or "dance".
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
        following = step.mean + _per_sample(step.std, step.mean) * jnp.asarray(noise, jnp.float32)
    else:
        following = jnp.asarray(next_sample, jnp.float32)
    squared_error = jnp.square(jax.lax.stop_gradient(following) - step.mean)
    squared_error = jnp.mean(squared_error, axis=tuple(range(1, squared_error.ndim)))
    return following, step.mean, step.std, _SAMPLERS[kind].log_density(squared_error, step.std)


def transition(
    kind: str,
    velocity: ArrayLike,
    sample: ArrayLike,
    sigma: ArrayLike,
    sigma_next: ArrayLike,
    sigma_1: ArrayLike,
    eta: ArrayLike,
) -> Transition:
    """Mean and standard deviations of one stochastic step; arguments as for ``sde_step``.

    Raises:
      DeepGenError: unknown kind.
    """
    if kind not in _SAMPLERS:
        raise DeepGenError(f"sampler {kind!r} is unknown; use one of {', '.join(_SAMPLERS)}")
    sample = jnp.asarray(sample, jnp.float32)
    levels = [_per_sample(value, sample) for value in (sigma, sigma_next, sigma_1, eta)]
    mean, std, schedule_std = _SAMPLERS[kind].transition(jnp.asarray(velocity, jnp.float32), sample, *levels)
    batch = sample.shape[:1]
    return Transition(
        mean, jnp.broadcast_to(jnp.ravel(std), batch), jnp.broadcast_to(jnp.ravel(schedule_std), batch)
    )


def _cps(v: jax.Array, x: jax.Array, s: jax.Array, s_next: jax.Array, s_1: jax.Array, eta: jax.Array) -> Transition:
    """Flow-CPS, paper eq. 6: predicted and fresh noise share the next noise level, so that it is exactly s'."""
    clean, noise = x - s * v, x + (1 - s) * v
    angle = eta * (math.pi / 2)
    std = s_next * jnp.sin(angle)
    # The cosine of a rounded pi/2 is slightly negative; at eta = 1 nothing of the predicted noise is kept.
    kept = s_next * jnp.maximum(jnp.cos(angle), 0)
    return Transition((1 - s_next) * clean + kept * noise, std, std)


def _flow(v: jax.Array, x: jax.Array, s: jax.Array, s_next: jax.Array, s_1: jax.Array, eta: jax.Array) -> Transition:
    """Flow-SDE of Flow-GRPO: Euler-Maruyama with diffusion sqrt(s / (1 - s)) eta."""
    dt = s_next - s
    diffusion = jnp.sqrt(s / (1 - jnp.where(s == 1, s_1, s))) * eta
    drift = jnp.square(diffusion) / (2 * s) * dt
    mean = x * (1 + drift) + v * (dt + drift * (1 - s))
    return Transition(mean, diffusion * jnp.sqrt(-dt), diffusion)


def _dance(v: jax.Array, x: jax.Array, s: jax.Array, s_next: jax.Array, s_1: jax.Array, eta: jax.Array) -> Transition:
    """Dance-SDE of DanceGRPO: constant diffusion eta, with the score of the predicted clean sample."""
    dt = s_next - s
    clean = x - s * v
    score = -(x - (1 - s) * clean) / (jnp.square(s) + 1e-8)
    std = eta * jnp.sqrt(-dt)
    return Transition(x + (v - 0.5 * jnp.square(eta) * score) * dt, std, std)


def _unnormalised(squared_error: jax.Array, std: jax.Array) -> jax.Array:
    return -squared_error


def _gaussian(squared_error: jax.Array, std: jax.Array) -> jax.Array:
    """Gaussian log-density; 1e-8 keeps it finite where no noise is added."""
    return -squared_error / (2 * (jnp.square(std) + 1e-8)) - jnp.log(std + 1e-8) - 0.5 * math.log(2 * math.pi)


class _Sampler(NamedTuple):
    transition: Callable[..., Transition]
    log_density: Callable[[jax.Array, jax.Array], jax.Array]


_SAMPLERS = {
    "cps": _Sampler(_cps, _unnormalised),
    "flow": _Sampler(_flow, _gaussian),
    "dance": _Sampler(_dance, _gaussian),
}


def _per_sample(value: ArrayLike, like: jax.Array) -> jax.Array:
    """float32 scalar or [B], shaped to broadcast against [B, ...]."""
    value = jnp.asarray(value, jnp.float32)
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value
