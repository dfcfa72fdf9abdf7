"""The interface of a sampler: one step from a noise level to the next.

Notation: x_s = (1 - s) x_0 + s e is a sample at noise level s; the velocity v predicts e - x_0, so that x - s v is the
predicted clean sample. All arithmetic is float32, whatever the dtype of the velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from deepgen_jax.config import SchedulerConfig
from deepgen_jax.flow.schedule import make_sigmas

#: (x [B, ...] float32, sigma scalar float32) -> velocity [B, ...].
VelocityFn = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Step:
    """Start and end of a step.

    Attributes:
      index: int32 scalar, number of the step in the schedule.
      sigma, sigma_next: float32 scalars, noise levels before and after.
      sigma_1: float32 scalar, second value of the schedule.
      eta: strength of the noise of stochastic samplers.
      noise: draws this step's standard normal noise, of x's shape.
    """

    index: jax.Array
    sigma: jax.Array
    sigma_next: jax.Array
    sigma_1: jax.Array
    eta: jax.Array
    noise: Callable[[], jax.Array]


class Sampler:
    """Base class; a sampler overrides :meth:`step`, and :meth:`start` where it uses earlier steps.

    Both run inside a `jax.lax` loop. ``velocity`` must not be called inside `jax.lax.cond` or another loop.

    Attributes:
      order: order of convergence as the steps get shorter.
      evaluations: velocity evaluations a step.
      stochastic: adds noise, so that :meth:`step` draws ``step.noise()``.
      estimates: reads several velocities side by side from one evaluation, [B, ..., N * D], as a few-step policy does.
    """

    order: int = 1
    evaluations: int = 1
    stochastic: bool = False
    estimates: bool = False

    def noise_levels(self, config: SchedulerConfig, steps: int, image_seq_len: int | None = None) -> np.ndarray:
        """Noise levels of a number of steps, float32 [steps + 1] from 1 to 0; see ``schedule.make_sigmas``."""
        return make_sigmas(config, steps, image_seq_len)

    def start(self, x: jax.Array) -> Any:
        """Pytree that the first step receives as ``memory``."""
        del x
        return ()

    def step(self, velocity: VelocityFn, x: jax.Array, memory: Any, step: Step) -> tuple[jax.Array, Any]:
        """One step.

        Args:
          velocity: (x, sigma) -> velocity.
          x: [B, ...] float32 sample at ``step.sigma``.
          memory: of the step before.
          step: noise levels and noise.

        Returns:
          The sample at ``step.sigma_next`` and the memory for the next step, shaped as before.
        """
        raise NotImplementedError


def euler_step(velocity: ArrayLike, sample: ArrayLike, sigma: ArrayLike, sigma_next: ArrayLike) -> jax.Array:
    """One step of the probability-flow ODE, x + (s' - s) v, in float32; sigmas are scalars or [B]."""
    sample = jnp.asarray(sample, jnp.float32)
    step = jnp.asarray(sigma_next, jnp.float32) - jnp.asarray(sigma, jnp.float32)
    return sample + per_sample(step, sample) * jnp.asarray(velocity, jnp.float32)


def per_sample(value: ArrayLike, like: jax.Array) -> jax.Array:
    """float32 scalar or [B], shaped to broadcast against [B, ...]."""
    value = jnp.asarray(value, jnp.float32)
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value
