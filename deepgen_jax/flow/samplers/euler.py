"""Euler's method, the sampler of the released system."""

from __future__ import annotations

from typing import Any

import jax

from deepgen_jax.flow.samplers.sampler import Sampler, Step, VelocityFn, euler_step


class Euler(Sampler):
    """x' = x + (s' - s) v(x, s)."""

    def step(self, velocity: VelocityFn, x: jax.Array, memory: Any, step: Step) -> tuple[jax.Array, Any]:
        return euler_step(velocity(x, step.sigma), x, step.sigma, step.sigma_next), memory
