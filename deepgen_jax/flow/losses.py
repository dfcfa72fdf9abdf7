"""The flow-matching training loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

#: (noisy latents, sigma [B]) -> velocity, structured as the latents.
VelocityFn = Callable[[Any, jax.Array], Any]


def flow_matching_loss(
    velocity_fn: VelocityFn,
    latents: ArrayLike | Sequence[ArrayLike],
    noise: ArrayLike | Sequence[ArrayLike],
    sigma: ArrayLike,
) -> jax.Array:
    """Mean over samples of the mean squared error of the predicted velocity: scalar float32.

    The model sees x = (1 - s) x_0 + s e and predicts e - x_0. Every sample weighs the same, whatever its size.

    Args:
      velocity_fn: (noisy latents, sigma [B] float32) -> velocity; both are structured as ``latents``.
      latents: clean latents x_0, [B, ...], or a list of B arrays of different sizes.
      noise: standard normal e, structured as ``latents``.
      sigma: noise levels s, [B], or a scalar for all.
    """
    if isinstance(latents, list | tuple):
        levels = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), (len(latents),))
        pairs = [noised(x, e, levels[i]) for i, (x, e) in enumerate(zip(latents, noise, strict=True))]  # type: ignore[arg-type]
        velocities = velocity_fn([noisy for noisy, _ in pairs], levels)
        targets = [target for _, target in pairs]
        errors = [jnp.mean(_squared_error(v, e)) for v, e in zip(velocities, targets, strict=True)]
        return jnp.mean(jnp.stack(errors))
    clean = jnp.asarray(latents, jnp.float32)
    levels = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), clean.shape[:1])
    noisy, target = noised(clean, jnp.asarray(noise), levels.reshape(-1, *[1] * (clean.ndim - 1)))
    return jnp.mean(velocity_losses(velocity_fn(noisy, levels), target))


def velocity_losses(velocity: ArrayLike, target: jax.Array, mask: ArrayLike | None = None) -> jax.Array:
    """Mean squared error of each sample's velocity, float32 [B].

    Args:
      velocity, target: [B, ...].
      mask: of padded tokens [B, N, D]: bool [B, N], False at padding, which does not count.
    """
    errors = _squared_error(velocity, target)
    if mask is None:
        return jnp.mean(errors, axis=range(1, errors.ndim))
    weight = jnp.asarray(mask, jnp.float32)
    return jnp.sum(jnp.mean(errors, axis=-1) * weight, axis=1) / jnp.sum(weight, axis=1)


def noised(clean: ArrayLike, noise: ArrayLike, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Noisy latents and the velocity to predict, float32."""
    clean, noise = jnp.asarray(clean, jnp.float32), jnp.asarray(noise, jnp.float32)
    return (1 - sigma) * clean + sigma * noise, noise - clean


def _squared_error(velocity: ArrayLike, target: jax.Array) -> jax.Array:
    return jnp.square(jnp.asarray(velocity, jnp.float32) - target)
