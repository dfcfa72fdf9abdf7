"""Pictures to what the models read: VAE pixels and the vision tower's patches. Runs on the host, without JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from PIL import Image

from deepgen_jax.config import VisionConfig

#: CLIP's channel statistics, as Qwen2.5-VL expects them.
_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
#: The VLM sees reference images at 28/32 of their size, so that VAE and VLM grids agree (512 -> 448 px).
_SCALE = (28, 32)


def to_pixels(image: Image.Image) -> np.ndarray:
    """An RGB picture as float32 [H, W, 3] in [-1, 1]."""
    return np.asarray(image.convert("RGB"), np.float32) / 255 * 2 - 1


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] -> uint8 by truncation, as the released system does: clip(127.5 x + 128, 0, 255)."""
    return np.clip(127.5 * pixels + 128.0, 0, 255).astype(np.uint8)


def _bilinear(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Linear interpolation along one axis: half-pixel centres, edges repeated, no antialias."""
    length = x.shape[axis]
    centres = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, None)
    lower = np.floor(centres).astype(np.int64)
    upper = np.minimum(lower + 1, length - 1)
    shape = [1] * x.ndim
    shape[axis] = size
    weight = (centres - lower).astype(np.float32).reshape(shape)
    return np.take(x, lower, axis) * (1 - weight) + np.take(x, upper, axis) * weight


def patchify_for_vlm(pixels: np.ndarray, config: VisionConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """Patches of one reference image for the vision tower.

    Args:
      pixels: float32 [H, W, 3] in [-1, 1], sides multiples of 32.
      config: gives patch and merge sizes.

    Returns:
      float32 [rows * columns, channels * time * p * p], patches in 2x2 merge order, channels first inside a patch, the
      frame doubled in time; and the grid (rows, columns) of patches.
    """
    height, width = (side * _SCALE[0] // _SCALE[1] for side in pixels.shape[:2])
    x = _bilinear(_bilinear(pixels, height, 0), width, 1)
    x = ((x + 1) / 2 - _MEAN) / _STD
    patch, merge = config.patch_size, config.spatial_merge_size
    pattern = "(h m p) (w n q) c -> (h w m n) c p q"
    x = rearrange(x, pattern, m=merge, n=merge, p=patch, q=patch)
    x = np.repeat(x[:, :, None], config.temporal_patch_size, axis=2)
    return x.reshape(len(x), config.patch_dim), (height // patch, width // patch)


@dataclass(frozen=True)
class VisionBatch:
    """Images for the vision tower, one a row, padded to a common number of patches.

    Attributes:
      patches: float32 [M, N, patch_dim].
      rows, columns: int32 [M, N] patch indices.
      windows: int32 [M, N] window ids, -1 on padding.
      tokens: VLM tokens of each image (a quarter of its patches).
    """

    patches: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    windows: np.ndarray
    tokens: tuple[int, ...]


def batch_images(
    images: Sequence[np.ndarray], config: VisionConfig, *, multiple: int = 1, rows: int = 0
) -> VisionBatch:
    """Patches of several images [H, W, 3] in one padded batch.

    Args:
      images: pixels in [-1, 1], each of its own size.
      config: the vision tower's sizes.
      multiple: the patch count is rounded up to a multiple of this (a bucket).
      rows: pads the batch with empty images at least to this many.
    """
    from deepgen_jax.models.qwen_vision import patch_layout

    parts = [patchify_for_vlm(image, config) for image in images]
    unit = config.spatial_merge_size**2
    longest = max(len(patches) for patches, _ in parts)
    length = -(-longest // (multiple * unit)) * multiple * unit
    shape = (max(rows, len(images)), length)
    patches = np.zeros((*shape, config.patch_dim), np.float32)
    layout = np.zeros((2, *shape), np.int32)
    windows = np.full(shape, -1, np.int32)
    for i, (x, (height, width)) in enumerate(parts):
        patches[i, : len(x)] = x
        layout[0, i, : len(x)], layout[1, i, : len(x)], windows[i, : len(x)] = patch_layout(height, width, config)
    return VisionBatch(patches, layout[0], layout[1], windows, tuple(len(x) // unit for x, _ in parts))
