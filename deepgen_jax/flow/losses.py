"""The flow-matching training loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def flow_matching_loss(
    velocity_fn: Callable[[Any, jax.Array], Any],
    latents: ArrayLike | Sequence[ArrayLike],
    noise: ArrayLike | Sequence[ArrayLike],
    sigma: ArrayLike,
) -> jax.Array:
    """Mean over samples of the mean squared error of the predicted velocity, in float32.

    The model sees x = (1 - s) x_0 + s e and predicts e - x_0. Every sample weighs the same, whatever its size.

    Args:
      velocity_fn: (noisy latents, sigma [B] float32) -> velocity; both are structured as ``latents``.
      latents: clean latents x_0, [B, ...], or a list of B arrays of different sizes.
      noise: standard normal e, structured as ``latents``.
      sigma: noise levels s, [B], or a scalar for all.

    Returns:
      Scalar float32.
    """
    if isinstance(latents, list | tuple):
        levels = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), (len(latents),))
        pairs = [_noised(x, e, levels[i]) for i, (x, e) in enumerate(zip(latents, noise, strict=True))]  # type: ignore[arg-type]
        velocities = velocity_fn([noisy for noisy, _ in pairs], levels)
        errors = [_mean_squared_error(v, target) for v, (_, target) in zip(velocities, pairs, strict=True)]
        return jnp.mean(jnp.stack(errors))
    clean = jnp.asarray(latents, jnp.float32)
    levels = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), clean.shape[:1])
    noisy, target = _noised(clean, jnp.asarray(noise), levels.reshape(-1, *[1] * (clean.ndim - 1)))
    # Samples of one array are of one size, so that the mean over everything is the mean of their means.
    return _mean_squared_error(velocity_fn(noisy, levels), target)


def _noised(clean: ArrayLike, noise: ArrayLike, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Noisy latents and the velocity to predict, float32."""
    clean, noise = jnp.asarray(clean, jnp.float32), jnp.asarray(noise, jnp.float32)
    return (1 - sigma) * clean + sigma * noise, noise - clean


def _mean_squared_error(velocity: ArrayLike, target: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(jnp.asarray(velocity, jnp.float32) - target))
