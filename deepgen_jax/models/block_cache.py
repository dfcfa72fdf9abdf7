"""First-block cache: skips the MMDiT's later layers if the update of its first layer has barely changed.

Residual updates of layers are similar in consecutive sampling steps. The first layer always runs. If its update of the
target tokens is close to that of the last full evaluation (mean absolute difference relative to the mean absolute
value, over the whole batch), the updates of all later layers are reused (ParaAttention's first-block cache), or
extrapolated linearly in sigma from the last two full evaluations (TaylorSeer, Liu et al. 2025, arXiv 2503.06923,
order 1). The decision is made per batch: per image, under ``vmap``, both branches would be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

#: (image [B, N, D], context [B, L, D]).
Streams = tuple[jax.Array, jax.Array]
#: (parameters of one layer, streams) -> streams.
Layer = Callable[[Any, Streams], Streams]
#: Equal layers: their function, and parameters stacked on the first axis, or one tree for each layer.
Stack = tuple[Layer, Mapping[str, Any] | tuple[Any, ...]]


class BlockCache(NamedTuple):
    """State between evaluations; a pytree.

    Attributes:
      first: [B, T, D], update of the target tokens by the first layer at the last full evaluation.
      rest: [B, T, D], update by all later layers at the last full evaluation.
      slope: [B, T, D], change of ``rest`` per unit of sigma between the last two full evaluations; zeros before the
        second.
      sigma: float32 scalar, noise level of the last full evaluation; negative before the first.
      threshold: float32 scalar, largest relative change of ``first`` at which later layers are skipped.
      extrapolate: bool scalar, whether to use ``slope``.
      evaluations, full: int32 scalars, number of evaluations, and of those that ran all layers.
    """

    first: jax.Array
    rest: jax.Array
    slope: jax.Array
    sigma: jax.Array
    threshold: jax.Array
    extrapolate: jax.Array
    evaluations: jax.Array
    full: jax.Array

    def rows(self, step: int) -> BlockCache:
        """The cache of every ``step``-th sample; with guidance, step 2 selects the conditional samples."""
        return self._replace(first=self.first[::step], rest=self.rest[::step], slope=self.slope[::step])

    def with_rows(self, other: BlockCache, step: int) -> BlockCache:
        """This cache with every ``step``-th sample replaced by those of ``other``; scalars are those of ``other``."""
        first, rest, slope = (
            whole.at[::step].set(part)
            for whole, part in zip(self[:3], other[:3], strict=True)
        )  # fmt: skip
        return other._replace(first=first, rest=rest, slope=slope)


def empty_cache(
    batch: int, tokens: int, width: int, dtype: DTypeLike, threshold: float, extrapolate: bool
) -> BlockCache:
    """The initial cache for ``batch`` samples of ``tokens`` target tokens with ``width`` channels."""
    zeros = jnp.zeros((batch, tokens, width), dtype)
    return BlockCache(
        zeros, zeros, zeros, jnp.float32(-1), jnp.float32(threshold), jnp.bool_(extrapolate), jnp.int32(0), jnp.int32(0)
    )


def run_cached(
    stacks: Sequence[Stack], streams: Streams, cache: BlockCache, sigma: jax.Array
) -> tuple[jax.Array, BlockCache]:
    """Runs all layers, or only the first.

    Args:
      stacks: all layers in order.
      streams: input of the first layer.
      cache: cache after the previous evaluation.
      sigma: float32 scalar, noise level.

    Returns:
      Target tokens [B, T, D] after the last layer, and the cache for the next evaluation.
    """
    layer, params = stacks[0]
    count = cache.first.shape[1]
    targets = streams[0][:, :count]
    streams = layer(params[0] if isinstance(params, tuple) else jax.tree.map(lambda x: x[0], params), streams)
    after_first = streams[0][:, :count]
    first = (after_first - targets).astype(cache.first.dtype)
    full = (cache.sigma < 0) | (_relative_change(first, cache.first) > cache.threshold)

    def later_layers(streams: Streams) -> jax.Array:
        for number, (layer, params) in enumerate(stacks):
            if isinstance(params, tuple):
                for one in params[1 if number == 0 else 0 :]:
                    streams = layer(one, streams)
                continue
            length = jax.tree.leaves(params)[0].shape[0]
            # Skip the first layer inside the loop: slicing it off would copy the stack.
            skipped = jnp.arange(length) == 0 if number == 0 else jnp.zeros(length, bool)

            def body(streams: Streams, x: Any, layer: Layer = layer) -> tuple[Streams, None]:
                skip, one = x
                return jax.lax.cond(skip, lambda s: s, lambda s: layer(one, s), streams), None

            streams, _ = jax.lax.scan(body, streams, (skipped, params))
        return streams[0][:, :count]

    def reused(_: Streams) -> jax.Array:
        slope = jnp.where(cache.extrapolate, cache.slope, 0)
        rest = cache.rest + (sigma - cache.sigma).astype(slope.dtype) * slope
        return (after_first + rest).astype(after_first.dtype)

    final = jax.lax.cond(full, later_layers, reused, streams)
    rest = (final - after_first).astype(cache.rest.dtype)
    distance = sigma - cache.sigma
    slope = ((rest - cache.rest) / jnp.where(distance == 0, 1, distance)).astype(cache.slope.dtype)
    # Extrapolation needs two full evaluations.
    slope = jnp.where((cache.sigma >= 0) & (distance != 0), slope, 0)
    updated = cache._replace(
        first=jnp.where(full, first, cache.first),
        rest=jnp.where(full, rest, cache.rest),
        slope=jnp.where(full, slope, cache.slope),
        sigma=jnp.where(full, sigma, cache.sigma),
        evaluations=cache.evaluations + 1,
        full=cache.full + full,
    )
    return final, updated


def _relative_change(new: jax.Array, old: jax.Array) -> jax.Array:
    new, old = new.astype(jnp.float32), old.astype(jnp.float32)
    return jnp.mean(jnp.abs(new - old)) / jnp.maximum(jnp.mean(jnp.abs(old)), 1e-12)
