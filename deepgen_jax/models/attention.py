"""The one attention function of every model part."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from deepgen_jax.models.layers import precision_of

Implementation = Literal["auto", "xla", "cudnn"]

#: Queries are processed in blocks of about this many rows of scores, so that a block stays in cache (CPU) and the whole
#: score matrix is never held.
_BLOCK_SCORES = 1 << 20


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    causal: bool = False,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Scaled dot-product attention, softmax statistics in float32.

    Args:
      query: [B, Q, H, D].
      key, value: [B, K, G, D]; G divides H (grouped-query attention).
      key_mask: [B, K] bool, True where a key may be attended. A query with no key to attend gets zeros.
      segment_ids: [B, S] int32 for self-attention (Q == K == S): tokens attend within their own segment.
      causal: query i attends keys 0..i (Q == K).
      implementation: "xla" anywhere, "cudnn" for flash attention on NVIDIA GPUs, "auto" chooses by platform.

    Returns:
      [B, Q, H, D] in the dtype of ``query``.
    """
    raise NotImplementedError
