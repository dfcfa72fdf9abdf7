"""The MMDiT's velocity with classifier-free guidance, for sampling and for reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from deepgen_jax.models.block_cache import BlockCache
from deepgen_jax.models.deepgen import DeepGen


class Condition(NamedTuple):
    """Input of the MMDiT from the language model: pooled [B, P], sequence [B, L, J], mask [B, L]."""

    pooled: jax.Array
    sequence: jax.Array
    mask: jax.Array


def guided_velocity(
    model: DeepGen,
    variables: Mapping[str, Any],
    patches: jax.Array,
    position_ids: jax.Array,
    sigma: jax.Array,
    condition: Condition,
    guidance_scale: ArrayLike | None = None,
    patch_mask: jax.Array | None = None,
    num_targets: int | None = None,
) -> jax.Array:
    """``v_neg + g (v_cond - v_neg)``, both sides in one batch; without guidance the conditional velocity.

    Args:
      model: static.
      variables: {"params": {"mmdit": ...}}, and "lora" where adapters train.
      patches: [B, N, D], the targets' first, then those of the references.
      position_ids: [B, N] int32.
      sigma: noise level, scalar or [B].
      condition: of B samples, or with guidance of 2 B: prompt and negative prompt of each sample side by side.
      guidance_scale: g; None for no guidance.
      patch_mask: [B, N] bool, False at padding; None where there is none.
      num_targets: number of target patches; None: all.

    Returns:
      float32 [B, num_targets, D].
    """
    sides = 1 if guidance_scale is None else 2
    v, _ = velocity_of_sides(
        model, variables, patches, position_ids, sigma, condition, sides, patch_mask, num_targets, None
    )
    return combine(v, guidance_scale)


def velocity_of_sides(
    model: DeepGen,
    variables: Mapping[str, Any],
    patches: jax.Array,
    position_ids: jax.Array,
    sigma: jax.Array,
    condition: Condition,
    sides: int,
    patch_mask: jax.Array | None,
    num_targets: int | None,
    cache: BlockCache | None,
) -> tuple[jax.Array, BlockCache | None]:
    """Velocity of every sample on each of its ``sides``: [sides * B, num_targets, D], and the cache if there is one.

    The other arguments are as for :func:`guided_velocity`; ``condition`` and ``cache`` are of sides * B samples.
    """
    batch = patches.shape[0]
    out: Any = model.apply(
        variables,
        jnp.repeat(patches, sides, axis=0),
        jnp.repeat(position_ids, sides, axis=0),
        jnp.repeat(jnp.broadcast_to(sigma * 1000.0, (batch,)), sides),
        condition.pooled,
        condition.sequence,
        None if patch_mask is None else jnp.repeat(patch_mask, sides, axis=0),
        condition.mask,
        num_targets,
        cache,
        method="velocity",
    )
    return out if cache is not None else (out, None)


def combine(velocity: jax.Array, guidance_scale: ArrayLike | None) -> jax.Array:
    """Velocities [2 B, ...], prompt and negative prompt side by side -> guided [B, ...]; [B, ...] without guidance."""
    if guidance_scale is None:
        return velocity
    v = velocity.reshape(-1, 2, *velocity.shape[1:])
    return v[:, 1] + guidance_scale * (v[:, 0] - v[:, 1])
