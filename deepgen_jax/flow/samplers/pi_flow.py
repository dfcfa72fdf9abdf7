"""Sampler for models distilled with pi-Flow (`deepgen_jax.flow.policy`)."""

from __future__ import annotations

from typing import Any

import jax

from deepgen_jax.flow import policy
from deepgen_jax.flow.samplers.sampler import Sampler, Step, VelocityFn


class PiFlow(Sampler):
    """Evaluates the model once per step, and integrates the resulting policy exactly."""

    estimates = True

    def step(self, velocity: VelocityFn, x: jax.Array, memory: Any, step: Step) -> tuple[jax.Array, Any]:
        output = velocity(x, step.sigma)
        count = output.shape[-1] // x.shape[-1]
        estimates = policy.estimates_of(output, x, step.sigma)
        return policy.follow(x, estimates, policy.grid(step.sigma, step.sigma_next, count), step.sigma_next), memory
