"""The few-step policy of pi-Flow as a sampler, for models that were distilled into it (`deepgen_jax.flow.policy`)."""

from __future__ import annotations

from typing import Any

import jax

from deepgen_jax.flow import policy
from deepgen_jax.flow.samplers.sampler import Sampler, Step, VelocityFn


class PiFlow(Sampler):
    """Follows the policy of one evaluation exactly through each step; the model gives several estimates at once."""

    estimates = True

    def step(self, velocity: VelocityFn, x: jax.Array, memory: Any, step: Step) -> tuple[jax.Array, Any]:
        output = velocity(x, step.sigma)
        count = output.shape[-1] // x.shape[-1]
        found = policy.estimates_of(output, x, step.sigma)
        return policy.follow(x, found, policy.grid(step.sigma, step.sigma_next, count), step.sigma_next), memory
