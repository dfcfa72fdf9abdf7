"""Scaled dot-product attention of every part of the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepgen_jax.models.layers import precision_of
from deepgen_jax.models.plan import Plan
from deepgen_jax.models.splash import splash_attention
from deepgen_jax.parallel.mesh import BATCH_AXES, batch_size_multiple

#: Largest head dimension of flash attention in both directions.
_LARGEST_FLASH_HEAD = 128


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    key_lengths: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    causal: bool = False,
    plan: Plan = Plan(),  # noqa: B008 - immutable
) -> jax.Array:
    """Scaled dot-product attention, softmax statistics in float32.

    Args:
      query: [B, Q, H, D].
      key: [B, K, G, D]; G divides H (grouped-query attention).
      value: [B, K, G, D].
      key_mask: [B, K] bool, True where a key may be attended. A query with no key to attend gets zeros.
      key_lengths: [B] int32, at least 1, instead of all other masks: the first ``key_lengths[b]`` keys may be attended.
        Flash attention then needs no mask in memory.
      segment_ids: [B, S] int32 for self-attention (Q == K == S): tokens attend within their own segment.
      causal: query i attends keys 0..i (Q == K).
      plan: its kernel is "xla", which holds the scores of all heads at once and partitions well over a mesh; "loop",
        which computes one (sample, head) pair at a time in both directions and so keeps scores in cache on a CPU;
        "cudnn", flash attention on NVIDIA GPUs; or "splash", flash attention on TPUs. The last two fall back to "xla"
        for dtypes and head dimensions that they do not support. Its mesh splits samples and heads over devices.

    Returns:
      [B, Q, H, D] in the dtype of ``query``.
    """
    if plan.mesh is not None:
        masks = {"key_mask": key_mask, "key_lengths": key_lengths, "segment_ids": segment_ids}
        return _over_mesh(plan, query, key, value, masks, causal)
    flash = query.dtype.itemsize == 2 and query.shape[-1] % 8 == 0 and query.shape[-1] <= _LARGEST_FLASH_HEAD
    cudnn = flash and plan.kernel == "cudnn"
    if key_lengths is not None:
        if key_mask is not None or segment_ids is not None or causal:
            raise ValueError("attention: key_lengths replaces all other masks")
        if cudnn:
            lengths = key_lengths.astype(jnp.int32)
            return jax.nn.dot_product_attention(
                query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
            )
        key_mask = jnp.arange(key.shape[1]) < key_lengths[:, None]
    if flash and plan.kernel == "splash":
        return splash_attention(query, key, value, key_mask=key_mask, segment_ids=segment_ids, causal=causal)
    mask = _mask(query, key, key_mask, segment_ids, causal)
    if cudnn:
        return _cudnn(query, key, value, mask)
    if plan.kernel == "loop":
        return _loop(query, key, value, mask)
    return _xla(query, key, value, mask)


def _over_mesh(
    plan: Plan,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    masks: dict[str, Any],
    causal: bool,
) -> jax.Array:
    """Attention on each device over its share of samples and heads."""
    mesh = plan.mesh
    assert mesh is not None
    if query.shape[0] % batch_size_multiple(mesh):
        # Fewer samples than devices: left to the partitioner.
        return attention(query, key, value, **masks, causal=causal)
    axis, groups = plan.tensor_axis(query.shape[2]), key.shape[2]
    if axis is not None and plan.tensor_axis(groups) is None:
        # Several devices share a group of query heads, so each holds a copy of its keys and values.
        copies = math.lcm(groups, mesh.shape[axis]) // groups
        key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
    samples, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, axis)
    given = {name: mask for name, mask in masks.items() if mask is not None}
    local = partial(attention, causal=causal, plan=Plan(plan.kernel))
    # Kernels do not declare over which axes their results vary.
    spread = jax.shard_map(
        lambda q, k, v, masks: local(q, k, v, **masks),
        mesh=mesh,
        in_specs=(heads, heads, heads, samples),
        out_specs=heads,
        check_vma=False,
    )
    return spread(query, key, value, given)


def _mask(
    query: jax.Array,
    key: jax.Array,
    key_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    causal: bool,
) -> jax.Array | None:
    """Combined mask, [B, 1 or Q, K] bool; None if everything is visible."""
    mask = None if key_mask is None else key_mask[:, None, :]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = same if mask is None else mask & same
    if causal:
        lower = jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool))[None]
        mask = lower if mask is None else mask & lower
    return mask


def _softmax_parts(scores: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Exponentials of the scores less their maximum, the maximum (or 0), and the sums over the last axis.

    Rows without a visible key give zeros, and sums of 1.
    """
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights, highest, jnp.where(total > 0, total, 1)


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    batch, length, heads, dim = query.shape
    groups = key.shape[2]
    precision = precision_of(query.dtype)
    grouped = query.reshape(batch, length, groups, heads // groups, dim)
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", grouped, key, precision=precision, preferred_element_type=jnp.float32)
    wide = None if mask is None else mask[:, None, None]
    weights, _, total = _softmax_parts(scores / math.sqrt(dim), wide)
    weights = (weights / total).astype(query.dtype)
    return jnp.einsum("bgrqk,bkgd->bqgrd", weights, value, precision=precision).reshape(query.shape)


def _loop(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    batch, length, heads, dim = query.shape

    def pairs(x: jax.Array, repeat: int = 1) -> jax.Array:
        x = jnp.repeat(x.transpose(0, 2, 1, 3), repeat, axis=1)
        return x.reshape(batch * heads, -1, dim)

    repeats = heads // key.shape[2]
    out = _pair_by_pair(pairs(query), pairs(key, repeats), pairs(value, repeats), mask)
    return out.reshape(batch, heads, length, dim).transpose(0, 2, 1, 3)


@jax.custom_vjp
def _pair_by_pair(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attention of P (sample, head) pairs, one after another.

    The backward pass computes the probabilities of a pair again from the logarithms of their sums (Dao et al. 2022,
    "FlashAttention", algorithm 4), so that no scores leave the cache.

    Args:
      query: [P, Q, D].
      key, value: [P, K, D].
      mask: as :func:`_mask` gives it; its samples divide P.

    Returns:
      [P, Q, D].
    """

    def one(index: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return _pair(q, k, v, _visible(mask, index, len(query)))[0]

    return _over_pairs(one, query, key, value)


def _pairs_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    def one(index: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _pair(q, k, v, _visible(mask, index, len(query)))

    out, sums = _over_pairs(one, query, key, value)
    return out, (query, key, value, mask, out, sums)


def _pairs_backward(saved: tuple[Any, ...], towards: jax.Array) -> tuple[jax.Array | None, ...]:
    query, key, value, mask, out, sums = saved
    precision = precision_of(query.dtype)
    wide = partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32)
    product = partial(jnp.matmul, precision=precision)
    scale = 1 / math.sqrt(query.shape[-1])

    def one(index: jax.Array, *operands: jax.Array) -> tuple[jax.Array, ...]:
        # Scores are [K, Q]: four of the five products then read their operands as they lie, and statistics of queries
        # are rows.
        q, k, v, o, log_sums, do = operands
        q = q * scale
        scores = wide(k, q.mT)
        visible = _visible(mask, index, len(query))
        if visible is not None:
            scores = jnp.where(visible.mT, scores, -jnp.inf)
        weights = jnp.exp(scores - log_sums.mT)
        inner = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True)
        ds = (weights * (wide(v, do.mT) - inner.mT)).astype(q.dtype)
        return product(k.mT, ds).mT * scale, product(ds, q), product(weights.astype(q.dtype), do)

    return (*_over_pairs(one, query, key, value, out, sums, towards), None)


_pair_by_pair.defvjp(_pairs_forward, _pairs_backward)


def _over_pairs(function: Callable[..., Any], *operands: jax.Array) -> Any:
    """``function(index, *operands)`` of each pair, which is a batch of 1.

    Remat "dots" would save the scores of products without batch dimensions.
    """
    indices = jnp.arange(len(operands[0]))
    out = jax.lax.map(lambda x: function(*x), (indices, *(x[:, None] for x in operands)))
    return jax.tree.map(lambda x: x[:, 0], out)


def _visible(mask: jax.Array | None, index: jax.Array, pairs: int) -> jax.Array | None:
    """Mask of the pair ``index``, [1 or Q, K]."""
    return None if mask is None else mask[index * mask.shape[0] // pairs]


def _pair(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Attention of one pair, [1, Q, D], and the logarithms of its sums of exponentials, float32 [1, Q, 1]."""
    precision, dtype = precision_of(query.dtype), query.dtype
    query = query * (1 / math.sqrt(query.shape[-1]))
    # `jnp.matmul` would drop the batch of 1.
    scores = jnp.einsum("bqd,bkd->bqk", query, key, precision=precision, preferred_element_type=jnp.float32)
    weights, highest, total = _softmax_parts(scores, visible)
    out = jnp.einsum("bqk,bkd->bqd", weights.astype(dtype), value, precision=precision) / total.astype(dtype)
    return out, highest + jnp.log(total)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    wide = jnp.broadcast_to(mask[:, None], (mask.shape[0], 1, query.shape[1], key.shape[1]))
    out = jax.nn.dot_product_attention(query, key, value, mask=wide, implementation="cudnn")
    return jnp.where(jnp.any(wide, axis=-1)[:, 0, :, None, None], out, 0)
