"""Flash attention on TPUs: JAX's Pallas splash kernel, with sequences padded to blocks and masked keys in segment 0."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from deepgen_jax.models.layers import FLASH_RESULTS

#: Lanes of a TPU's registers, of which blocks are multiples.
_LANES = 128
#: Largest block: its scores take 4 MiB of on-chip memory.
_LARGEST_BLOCK = 1024
#: Number of keys whose keys, values, gradients and sums take 8 MiB with heads of up to 128 channels.
_MOST_FUSED_KEYS = 2560


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    causal: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Scaled dot-product attention, as ``attention.attention``; scores stay in on-chip memory.

    Args:
      query: [B, Q, H, D].
      key, value: [B, K, G, D]; G divides H.
      key_mask: [B, K] bool, True where a key may be attended.
      segment_ids: [B, S] int32 for self-attention: tokens attend within their own segment.
      causal: query i attends keys 0..i.
      interpret: run the kernel in the interpreter, on any platform.

    Returns:
      [B, Q, H, D]; zeros at queries that have no key to attend.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        FullMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha_single_device,
    )

    batch, queries, heads, dim = query.shape
    keys = key.shape[1]
    q_block, q_length = block_and_length(queries)
    k_block, k_length = block_and_length(keys)
    # With all keys on chip, one kernel computes the gradients of keys, values and queries, summed in float32.
    fused = k_length <= _MOST_FUSED_KEYS
    # Scores in smaller blocks leave room for that many keys in the 16 MiB that a kernel has on every chip.
    halved = fused and k_length > k_block and k_block % (2 * _LANES) == 0
    blocks = BlockSizes(
        block_q=q_block, block_kv=k_block, block_kv_compute=k_block,
        block_q_dkv=q_block, block_kv_dkv=k_length if fused else k_block,
        block_kv_dkv_compute=k_block // 2 if halved else k_block,
        block_q_dq=None if fused else q_block, block_kv_dq=None if fused else k_block,
        use_fused_bwd_kernel=fused,
    )  # fmt: skip
    mask = (CausalMask if causal else FullMask)((q_length, k_length))
    with jax.ensure_compile_time_eval():
        kernel = make_splash_mha_single_device(
            MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            residual_checkpoint_name=FLASH_RESULTS,
            interpret=interpret,
        )

    # Segment 0 holds padding and masked keys. Padded queries are removed at the end.
    own = jnp.ones((batch, queries), jnp.int32) if segment_ids is None else segment_ids + 1
    seen = jnp.ones((batch, keys), jnp.int32) if segment_ids is None else segment_ids + 1
    if key_mask is not None:
        seen = jnp.where(key_mask, seen, 0)
    segments = None
    if key_mask is not None or segment_ids is not None or k_length > keys:
        segments = SegmentIds(_padded(own, 1, q_length), _padded(seen, 1, k_length))

    def arranged(x: jax.Array, length: int) -> jax.Array:
        return _padded(x, 1, length).transpose(0, 2, 1, 3)

    scaled = (query.astype(jnp.float32) / math.sqrt(dim)).astype(query.dtype)
    operands = (arranged(scaled, q_length), arranged(key, k_length), arranged(value, k_length), segments)
    out = jax.vmap(kernel)(*operands).transpose(0, 2, 1, 3)[:, :queries].astype(query.dtype)
    if key_mask is None:
        return out
    # For a query without keys the kernel averages over masked ones.
    any_key = jnp.cumsum(key_mask, axis=1) > 0 if causal else jnp.any(key_mask, axis=1, keepdims=True)
    return jnp.where(any_key[..., None, None], out, 0)


def block_and_length(length: int) -> tuple[int, int]:
    """(block, padded length) of a sequence: a trade-off between large blocks and little padding."""
    lanes = -(-length // _LANES)
    most = _LARGEST_BLOCK // _LANES
    while True:
        block = max(size for size in range(1, most + 1) if lanes % size == 0)
        # Blocks of less than half the largest cost more than a few padded lanes.
        if block == lanes or 2 * block >= most:
            return block * _LANES, lanes * _LANES
        lanes += 1


def _padded(x: jax.Array, axis: int, length: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths) if any(after for _, after in widths) else x
