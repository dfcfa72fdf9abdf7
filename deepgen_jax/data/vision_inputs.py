"""Pictures to what the models read: VAE pixels and the vision tower's patches. Runs on the host, without JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from einops import rearrange, repeat
from PIL import Image

from deepgen_jax.config import VisionConfig
from deepgen_jax.data.tokens import round_up

if TYPE_CHECKING:
    import jax

    ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)

#: CLIP's channel statistics, as Qwen2.5-VL expects them.
_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
#: The VLM sees reference images at 28/32 of their size, so that VAE and VLM grids agree (512 -> 448 px).
_SCALE = (28, 32)


def to_pixels(image: Image.Image) -> np.ndarray:
    """A picture read by `deepgen_jax.data.images.load_image` as float32 [H, W, 3] in [-1, 1].

    Raises:
      ValueError: it is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"a picture of mode {image.mode}; read it with load_image first")
    return np.asarray(image, np.float32) / 255 * 2 - 1


def to_uint8(pixels: ArrayT) -> ArrayT:
    """Pixels in [-1, 1] -> uint8 by truncation, as the released system does: clip(127.5 x + 128, 0, 255)."""
    return (127.5 * pixels + 128.0).clip(0, 255).astype(np.uint8)


def _bilinear_matrix(length: int, size: int) -> np.ndarray:
    """Linear interpolation as a matrix [size, length]: half-pixel centres, edges repeated, no antialias."""
    centres = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, None)
    lower = np.floor(centres).astype(np.int64)
    weight = (centres - lower).astype(np.float32)
    matrix = np.zeros((size, length), np.float32)
    rows = np.arange(size)
    matrix[rows, lower] += 1 - weight
    matrix[rows, np.minimum(lower + 1, length - 1)] += weight
    return matrix


def patch_grid(size: Sequence[int], config: VisionConfig) -> tuple[int, int]:
    """(rows, columns) of the vision tower's patches for a reference image of (height, width) pixels."""
    down, across = (side * _SCALE[0] // _SCALE[1] // config.patch_size for side in size)
    return down, across


def patchify_for_vlm(pixels: ArrayT, config: VisionConfig) -> ArrayT:
    """Patches of one reference image for the vision tower; NumPy in, NumPy out, and the same for JAX.

    Args:
      pixels: float32 [H, W, 3] in [-1, 1], sides multiples of 32.
      config: gives patch and merge sizes.

    Returns:
      float32 [rows * columns, channels * time * p * p], patches in 2x2 merge order, channels first inside a patch, the
      frame doubled in time.
    """
    patch, merge = config.patch_size, config.spatial_merge_size
    grid = patch_grid(pixels.shape[:2], config)
    vertical, horizontal = (
        _bilinear_matrix(side, count * patch) for side, count in zip(pixels.shape[:2], grid, strict=True)
    )
    x = vertical @ rearrange(pixels, "h w c -> c h w") @ horizontal.T
    x = ((x + 1) / 2 - _MEAN[:, None, None]) / _STD[:, None, None]
    pattern = "c (h m p) (w n q) -> (h w m n) c p q"
    x = rearrange(x, pattern, m=merge, n=merge, p=patch, q=patch)
    return repeat(x, "n c p q -> n (c t p q)", t=config.temporal_patch_size)


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

    grids = [patch_grid(image.shape[:2], config) for image in images]
    parts = [patchify_for_vlm(image, config) for image in images]
    unit = config.spatial_merge_size**2
    longest = max(len(x) for x in parts)
    length = round_up(longest, multiple * unit)
    shape = (max(rows, len(images)), length)
    patches = np.zeros((*shape, config.patch_dim), np.float32)
    layout = np.zeros((2, *shape), np.int32)
    windows = np.full(shape, -1, np.int32)
    for i, (x, grid) in enumerate(zip(parts, grids, strict=True)):
        patches[i, : len(x)] = x
        layout[0, i, : len(x)], layout[1, i, : len(x)], windows[i, : len(x)] = patch_layout(*grid, config)
    return VisionBatch(patches, layout[0], layout[1], windows, tuple(len(x) // unit for x in parts))
