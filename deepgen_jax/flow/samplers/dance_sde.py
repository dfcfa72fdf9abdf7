"""Dance-SDE of DanceGRPO (Xue et al. 2025)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepgen_jax.flow.samplers.sde import SDESampler, Transition


class DanceSDE(SDESampler):
    """Euler-Maruyama with constant diffusion eta and the score of the predicted clean sample."""

    def transition(
        self, v: jax.Array, x: jax.Array, s: jax.Array, s_next: jax.Array, s_1: jax.Array, eta: jax.Array
    ) -> Transition:
        dt = s_next - s
        clean = x - s * v
        score = -(x - (1 - s) * clean) / (jnp.square(s) + 1e-8)
        std = eta * jnp.sqrt(-dt)
        return Transition(x + (v - 0.5 * jnp.square(eta) * score) * dt, std, std)
