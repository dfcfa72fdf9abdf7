"""Flow-SDE of Flow-GRPO (Liu et al. 2025, eq. 12)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepgen_jax.flow.samplers.sde import SDESampler, Transition


class FlowSDE(SDESampler):
    """Euler-Maruyama with diffusion sqrt(s / (1 - s)) eta."""

    def transition(
        self, v: jax.Array, x: jax.Array, s: jax.Array, s_next: jax.Array, s_1: jax.Array, eta: jax.Array
    ) -> Transition:
        dt = s_next - s
        diffusion = jnp.sqrt(s / (1 - jnp.where(s == 1, s_1, s))) * eta
        drift = jnp.square(diffusion) / (2 * s) * dt
        mean = x * (1 + drift) + v * (dt + drift * (1 - s))
        return Transition(mean, diffusion * jnp.sqrt(-dt), diffusion)
