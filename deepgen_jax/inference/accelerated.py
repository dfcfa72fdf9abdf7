"""Accelerated guided velocity: a first-block cache, and guidance in only part of the steps.

See `deepgen_jax.models.block_cache` for the cache. Guidance matters most in the middle of sampling (Kynkaanniemi et al.
2024, arXiv 2404.07724), so the negative side is not evaluated outside an interval of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax.inference.acceleration import Acceleration
from deepgen_jax.inference.guidance import Condition, combine, velocity_of_sides
from deepgen_jax.models.block_cache import BlockCache, empty_cache
from deepgen_jax.models.deepgen import DeepGen


class Work(NamedTuple):
    """State of an accelerated velocity between evaluations; a pytree.

    Attributes:
      blocks: the first-block cache; None without one.
      interval: float32 [2] (low, high), guidance applies where low < sigma <= high; None applies it everywhere.
      done: float32 scalar, layer evaluations per sample so far.
      all: float32 scalar, layer evaluations per sample that full evaluation would have taken.
    """

    blocks: BlockCache | None
    interval: jax.Array | None
    done: jax.Array
    all: jax.Array


def start_work(
    model: DeepGen, settings: Acceleration, batch: int, tokens: int, sigmas: np.ndarray, guided: bool
) -> Work:
    """Initial state.

    Args:
      model: the model.
      settings: acceleration settings.
      batch: number of samples B.
      tokens: target tokens per sample.
      sigmas: [N + 1] noise levels of the steps.
      guided: whether each sample has a negative side.
    """
    blocks = None
    if settings.cache is not None:
        rows, width = batch * (2 if guided else 1), model.config.mmdit.hidden_size
        blocks = empty_cache(rows, tokens, width, model.dtype, settings.cache, settings.taylor)
    interval = None
    if settings.guidance_interval is not None and guided:
        steps = len(sigmas) - 1
        first, last = (round(share * steps) for share in settings.guidance_interval)
        interval = jnp.array([sigmas[max(last, first + 1)], sigmas[first]], jnp.float32)
    return Work(blocks, interval, jnp.float32(0), jnp.float32(0))


def accelerated_velocity(
    model: DeepGen,
    variables: Mapping[str, Any],
    patches: jax.Array,
    position_ids: jax.Array,
    sigma: jax.Array,
    condition: Condition,
    guidance_scale: jax.Array | None,
    patch_mask: jax.Array | None,
    num_targets: int,
    work: Work,
) -> tuple[jax.Array, Work]:
    """Accelerated `guided_velocity`; takes the same arguments, and the state ``work``.

    Returns:
      float32 [B, num_targets, D], and the state for the next evaluation.
    """
    layers, sides = model.config.mmdit.num_layers, 1 if guidance_scale is None else 2

    def evaluate(sides: int, condition: Condition, blocks: BlockCache | None) -> tuple[jax.Array, BlockCache | None]:
        return velocity_of_sides(
            model, variables, patches, position_ids, sigma, condition, sides, patch_mask, num_targets, blocks
        )

    def guided(blocks: BlockCache | None) -> tuple[jax.Array, BlockCache | None, jax.Array]:
        v, updated = evaluate(sides, condition, blocks)
        return combine(v, guidance_scale), updated, _layers_run(blocks, updated, layers) * sides

    def unguided(blocks: BlockCache | None) -> tuple[jax.Array, BlockCache | None, jax.Array]:
        alone = Condition(*(x[::2] for x in condition))
        rows = None if blocks is None else blocks.rows(2)
        v, updated = evaluate(1, alone, rows)
        ran = _layers_run(rows, updated, layers)
        return v, None if blocks is None or updated is None else blocks.with_rows(updated, 2), ran

    if work.interval is None:
        v, blocks, ran = guided(work.blocks)
    else:
        inside = (sigma > work.interval[0]) & (sigma <= work.interval[1])
        v, blocks, ran = jax.lax.cond(inside, guided, unguided, work.blocks)
    return v, Work(blocks, work.interval, work.done + ran, work.all + layers * sides)


def _layers_run(before: BlockCache | None, after: BlockCache | None, layers: int) -> jax.Array:
    if before is None or after is None:
        return jnp.float32(layers)
    return jnp.where(after.full > before.full, layers, 1).astype(jnp.float32)
