"""The Qwen2.5-VL vision tower: 14x14 patches, window attention, 2-D rotary positions, 2x2 merging.

Attention windows are segment ids of patches in raster order: unlike the reference implementation nothing is reordered,
as attention does not depend on the order of tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from deepgen_jax.config import VisionConfig
from deepgen_jax.models.attention import attention
from deepgen_jax.models.layers import Linear, RMSNorm
from deepgen_jax.models.plan import Plan
from deepgen_jax.models.rope import rotate, vision_angles
from deepgen_jax.models.stack import Remat, rematerialised


def patch_layout(grid_height: int, grid_width: int, config: VisionConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of the patches of one image, in the tower's order (2x2 merge units in raster order).

    Args:
      grid_height, grid_width: patches down and across, multiples of ``spatial_merge_size``.
      config: merge size and window.

    Returns:
      rows, columns and window ids, each int32 [grid_height * grid_width]. Windows tile the image from its top left
      corner; those at the right and bottom edges may be smaller.
    """
    merge = config.spatial_merge_size
    window = config.window_size // config.patch_size
    rows, columns = np.indices((grid_height, grid_width))

    def ordered(x: np.ndarray) -> np.ndarray:
        units = x.reshape(grid_height // merge, merge, grid_width // merge, merge)
        return units.transpose(0, 2, 1, 3).reshape(-1).astype(np.int32)

    windows = (rows // window) * -(-grid_width // window) + columns // window
    return ordered(rows), ordered(columns), ordered(windows)


class VisionBlock(nn.Module):
    """Pre-norm block; ``full`` chooses between attention in the window and in the whole image."""

    config: VisionConfig
    dtype: DTypeLike
    plan: Plan

    @nn.compact
    def __call__(
        self, x: jax.Array, full: jax.Array, angles: jax.Array, images: jax.Array, windows: jax.Array
    ) -> tuple[jax.Array, None]:
        cfg = self.config

        def linear(name: str, features: int) -> Linear:
            return Linear(features, dtype=self.dtype, name=name)

        h = RMSNorm(cfg.rms_norm_eps, self.dtype, name="norm1")(x)
        qkv = linear("qkv", 3 * cfg.hidden_size)(h).reshape(*x.shape[:2], 3, cfg.num_heads, cfg.head_dim)
        query, key, value = rotate(qkv[:, :, 0], angles), rotate(qkv[:, :, 1], angles), qkv[:, :, 2]
        segments = jnp.where(full, images, windows)
        h = attention(query, key, value, segment_ids=segments, plan=self.plan)
        x = self.plan.shard_tokens(x + linear("proj", cfg.hidden_size)(h.reshape(x.shape)))

        h = RMSNorm(cfg.rms_norm_eps, self.dtype, name="norm2")(x)
        h = nn.silu(linear("gate_proj", cfg.intermediate_size)(h)) * linear("up_proj", cfg.intermediate_size)(h)
        return self.plan.shard_tokens(x + linear("down_proj", cfg.hidden_size)(h)), None


class PatchMerger(nn.Module):
    """Four neighbouring patches -> one token of the language model."""

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        width = cfg.hidden_size * cfg.spatial_merge_size**2
        x = RMSNorm(cfg.rms_norm_eps, self.dtype, name="ln_q")(x)
        x = x.reshape(x.shape[0], -1, width)
        x = Linear(width, dtype=self.dtype, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        return Linear(cfg.out_hidden_size, dtype=self.dtype, name="fc2")(x)


class QwenVision(nn.Module):
    """Patches of images -> tokens of the language model."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    plan: Plan = Plan()

    @nn.compact
    def __call__(self, patches: jax.Array, rows: jax.Array, columns: jax.Array, windows: jax.Array) -> jax.Array:
        """Encodes a batch of images, one a row, padded to a common number of patches.

        Args:
          patches: [B, N, channels * time * 14 * 14], CLIP-normalised, in the order of ``patch_layout``.
          rows, columns: [B, N] int32 patch indices.
          windows: [B, N] int32 window ids, -1 on padding (which attends only to itself).

        Returns:
          [B, N / 4, out_hidden_size] in raster order of the merged units.
        """
        cfg = self.config
        x = Linear(cfg.hidden_size, use_bias=False, dtype=self.dtype, name="patch_embed")(patches)
        angles = vision_angles(rows, columns, cfg.head_dim)
        images = jnp.where(windows < 0, -1, 0)
        full = np.isin(np.arange(cfg.depth), cfg.full_attention_blocks)
        blocks = nn.scan(
            rematerialised(VisionBlock, self.remat),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=cfg.depth,
        )(cfg, self.dtype, self.plan, name="blocks")
        x, _ = blocks(x, jnp.asarray(full), angles, images, windows)
        return PatchMerger(cfg, self.dtype, name="merger")(x)
