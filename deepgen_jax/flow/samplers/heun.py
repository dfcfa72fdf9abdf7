"""Heun's method: an Euler step, then the mean of the velocities at both ends (Karras et al. 2022, Algorithm 1)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from deepgen_jax.flow.samplers.sampler import Sampler, Step, VelocityFn, euler_step


class Heun(Sampler):
    """Second order with two evaluations a step; a step to sigma 0, where models are not trained, is Euler's."""

    order = 2
    evaluations = 2

    def step(self, velocity: VelocityFn, x: jax.Array, memory: Any, step: Step) -> tuple[jax.Array, Any]:
        first = velocity(x, step.sigma).astype(jnp.float32)
        predicted = euler_step(first, x, step.sigma, step.sigma_next)
        last = step.sigma_next == 0
        # There is no second evaluation in a last step; what stands in for it is the first one.
        end, level = jnp.where(last, x, predicted), jnp.where(last, step.sigma, step.sigma_next)
        second = velocity(end, level).astype(jnp.float32)
        return jnp.where(last, predicted, euler_step((first + second) / 2, x, step.sigma, step.sigma_next)), memory
