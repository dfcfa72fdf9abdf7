"""Flow-CPS, coefficients-preserving sampling (paper eq. 6)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from deepgen_jax.flow.samplers.sde import SDESampler, Transition


class CPS(SDESampler):
    """Predicted and fresh noise share the next noise level, so that it is exactly s'; eta is in 0..1."""

    def transition(
        self, v: jax.Array, x: jax.Array, s: jax.Array, s_next: jax.Array, s_1: jax.Array, eta: jax.Array
    ) -> Transition:
        clean, noise = x - s * v, x + (1 - s) * v
        angle = eta * (math.pi / 2)
        std = s_next * jnp.sin(angle)
        # The cosine of a rounded pi/2 is slightly negative; at eta = 1 nothing of the predicted noise is kept.
        kept = s_next * jnp.maximum(jnp.cos(angle), 0)
        return Transition((1 - s_next) * clean + kept * noise, std, std)

    def log_density(self, squared_error: jax.Array, std: jax.Array) -> jax.Array:
        """-(x' - mean)^2 without a normaliser (paper eq. 7)."""
        del std
        return -squared_error
