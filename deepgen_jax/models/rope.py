"""Rotary position embeddings: M-RoPE of the language model and the 2-D rotary of the vision tower."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """``theta ** (-2 i / dim)`` for i in 0..dim/2, float32 [dim / 2]."""
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)


def mrope_angles(positions: jax.Array, head_dim: int, theta: float, sections: tuple[int, ...]) -> jax.Array:
    """Angles of multimodal rotary embedding (Qwen2-VL, section 2.1).

    Args:
      positions: [3, B, L] int32, the (time, height, width) index of each token; equal for text.
      head_dim: even width of an attention head.
      theta: base of the frequencies.
      sections: how many of the head_dim / 2 frequencies follow time, height and width.

    Returns:
      float32 [B, L, head_dim / 2].
    """
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(head_dim, theta)
    axis_of_frequency = np.repeat(np.arange(3), sections)
    return jnp.stack([angles[axis, ..., i] for i, axis in enumerate(axis_of_frequency)], axis=-1)


def vision_angles(rows: jax.Array, columns: jax.Array, head_dim: int, theta: float = 10000.0) -> jax.Array:
    """Angles of the vision tower: half the frequencies follow the patch's row, half its column.

    Args:
      rows, columns: int32 [..., N] patch indices.
      head_dim: width of a head, a multiple of 4.
      theta: base of the frequencies.

    Returns:
      float32 [..., N, head_dim / 2].
    """
    frequencies = inverse_frequencies(head_dim // 2, theta)
    return jnp.concatenate([p.astype(jnp.float32)[..., None] * frequencies for p in (rows, columns)], axis=-1)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + D/2) of each head: x [B, L, H, D], angles [B, L, D/2] -> [B, L, H, D], in float32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
