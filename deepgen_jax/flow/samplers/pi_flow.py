"""Sampler for models distilled with pi-Flow (`deepgen_jax.flow.policy`)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from deepgen_jax.config import SchedulerConfig
from deepgen_jax.flow import policy, schedule
from deepgen_jax.flow.samplers.sampler import Sampler, Step, VelocityFn


class PiFlow(Sampler):
    """Evaluates the model once per step, and integrates the resulting policy exactly."""

    estimates = True

    def noise_levels(self, config: SchedulerConfig, steps: int, image_seq_len: int | None = None) -> np.ndarray:
        """Ends of the segments that the policy was distilled for."""
        return schedule.segment_sigmas(config, steps, image_seq_len)

    def step(self, velocity: VelocityFn, x: jax.Array, memory: Any, step: Step) -> tuple[jax.Array, Any]:
        output = velocity(x, step.sigma)
        count = output.shape[-1] // x.shape[-1]
        estimates = policy.estimates_of(output, x, step.sigma)
        return policy.follow(x, estimates, policy.grid(step.sigma, step.sigma_next, count), step.sigma_next), memory
