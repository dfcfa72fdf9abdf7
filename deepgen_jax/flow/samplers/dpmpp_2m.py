"""DPM-Solver++(2M) for flow matching (Lu et al. 2022, Algorithm 2, with alpha = 1 - s)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepgen_jax.flow.samplers.sampler import Sampler, Step, VelocityFn


class Previous(NamedTuple):
    """Prediction of the step before: the clean sample [B, ...] and its sigma, negative before the first step."""

    clean: jax.Array
    sigma: jax.Array


class DPMpp2M(Sampler):
    """Second order with one evaluation a step: extrapolates the clean sample linearly in lambda = log((1 - s) / s).

    The first step, and one to sigma 0 where lambda is infinite, are of first order.
    """

    order = 2

    def start(self, x: jax.Array) -> Previous:
        return Previous(jnp.zeros_like(x), jnp.float32(-1))

    def step(self, velocity: VelocityFn, x: jax.Array, memory: Previous, step: Step) -> tuple[jax.Array, Previous]:
        s, s_next = step.sigma, step.sigma_next
        clean = x - s * velocity(x, s).astype(jnp.float32)
        h, h_before = _log_snr(s_next) - _log_snr(s), _log_snr(s) - _log_snr(memory.sigma)
        extrapolated = (memory.sigma > 0) & (s_next > 0)
        weight = jnp.where(extrapolated, h / (2 * h_before), 0)
        target = clean + weight * (clean - memory.clean)
        return s_next / s * x + (1 - s_next / s) * target, Previous(clean, s)


def _log_snr(sigma: jax.Array) -> jax.Array:
    return jnp.log((1 - sigma) / sigma)
