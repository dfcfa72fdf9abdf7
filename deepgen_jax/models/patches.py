"""Latents to MMDiT tokens and back: 2x2 patches, positions, and samples of different sizes in one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from deepgen_jax.errors import DeepGenError

ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)


class PackedLatents(NamedTuple):
    """A batch of token sequences laid out as [targets, right-padded | references, right-padded].

    Attributes:
      patches: [B, N, p * p * C], zeros where padded.
      position_ids: [B, N] int32 rows of the position table (see :func:`position_ids`).
      patch_mask: [B, N] bool, False at padding.
      num_targets: the first ``num_targets`` of the N tokens belong to the (padded) target images.
    """

    patches: np.ndarray
    position_ids: np.ndarray
    patch_mask: np.ndarray
    num_targets: int


def patchify(latent: ArrayT, patch_size: int) -> ArrayT:
    """[..., C, h, w] -> [..., (h / p) * (w / p), p * p * C]; inside a patch the order is (row, column, channel).

    Raises:
      DeepGenError: h or w is not a multiple of ``patch_size``.
    """
    _grid(latent.shape[-2:], patch_size)
    return rearrange(latent, "... c (h p) (w q) -> ... (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: ArrayT, height: int, width: int, patch_size: int, channels: int) -> ArrayT:
    """The inverse of :func:`patchify`: [..., (h / p) * (w / p), p * p * C] -> [..., C, h, w]."""
    rows, columns = _grid((height, width), patch_size)
    pattern = "... (h w) (p q c) -> ... c (h p) (w q)"
    return rearrange(patches, pattern, h=rows, w=columns, p=patch_size, q=patch_size, c=channels)


def position_ids(height: int, width: int, patch_size: int, max_size: int) -> np.ndarray:
    """Rows of the flattened ``max_size`` x ``max_size`` position table for one image: int32 [(h / p) * (w / p)].

    Every image, target or reference, reads the window of its own size at the centre of the table.

    Args:
      height, width: size of the latent.
      patch_size: side of a patch in latent pixels.
      max_size: side of the table in patches.

    Raises:
      DeepGenError: the image has more rows or columns of patches than the table.
    """
    rows, columns = _grid((height, width), patch_size)
    if rows > max_size or columns > max_size:
        raise DeepGenError(
            f"latent of {height}x{width} has {rows}x{columns} patches, but the position table has "
            f"{max_size}x{max_size}; use a smaller image"
        )
    top, left = (max_size - rows) // 2, (max_size - columns) // 2
    ids = (top + np.arange(rows))[:, None] * max_size + left + np.arange(columns)
    return ids.reshape(-1).astype(np.int32)


def sincos_table(max_size: int, base_size: int, dim: int) -> jax.Array:
    """The 2-D sine-cosine position table of a model trained from scratch: float32 [max_size ** 2, dim].

    The first half of the channels encodes the column, the second half the row, each as [sin, cos]; positions are in
    units of ``max_size / base_size`` patches. Released weights bring their own table, rounded to bfloat16: it is
    loaded, never recomputed.
    """
    coordinates = np.arange(max_size, dtype=np.float64) * base_size / max_size
    frequencies = 1.0 / 10000.0 ** (np.arange(dim // 4, dtype=np.float64) / (dim // 4))
    angles = coordinates[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
    # The table itself (a gigabyte at full size) is made by JAX, so that abstract evaluation does not allocate it.
    shape = (max_size, max_size, dim // 2)
    table = jnp.concatenate([jnp.broadcast_to(axis[None], shape), jnp.broadcast_to(axis[:, None], shape)], axis=-1)
    return table.reshape(max_size**2, dim)


def pack(
    targets: Sequence[Any],
    references: Sequence[Sequence[Any]],
    *,
    patch_size: int,
    max_size: int,
    target_tokens: int = 0,
    reference_tokens: int = 0,
) -> PackedLatents:
    """Batches samples of any target size and any number of references of any size; runs on the host.

    Args:
      targets: B noisy latents, each [C, h, w].
      references: for each sample its reference latents, each [C, h, w]; may be empty.
      patch_size: side of a patch in latent pixels.
      max_size: side of the position table in patches.
      target_tokens, reference_tokens: pad the two parts at least to these lengths (a bucket's size).

    Raises:
      DeepGenError: an image does not fit the position table or is not a whole number of patches.
    """
    targets = [np.asarray(target) for target in targets]
    references = [[np.asarray(reference) for reference in sample] for sample in references]
    num_targets = max([target_tokens, *(_num_tokens([target], patch_size) for target in targets)])
    num_references = max([reference_tokens, *(_num_tokens(sample, patch_size) for sample in references)])
    shape = (len(targets), num_targets + num_references)
    patches = np.zeros((*shape, targets[0].shape[0] * patch_size**2), targets[0].dtype)
    ids, mask = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
    for row, (target, sample) in enumerate(zip(targets, references, strict=True)):
        for start, images in ((0, [target]), (num_targets, sample)):
            for image in images:
                height, width = image.shape[-2:]
                tokens = slice(start, start + _num_tokens([image], patch_size))
                patches[row, tokens] = patchify(image, patch_size)
                ids[row, tokens] = position_ids(height, width, patch_size, max_size)
                mask[row, tokens] = True
                start = tokens.stop
    return PackedLatents(patches, ids, mask, num_targets)


def unpack(patches: np.ndarray, sizes: Sequence[tuple[int, int]], patch_size: int, channels: int) -> list[np.ndarray]:
    """Takes the targets out of a padded batch: [B, N, p * p * C] and B sizes (h, w) -> B arrays [C, h, w]."""
    images = []
    for sample, (height, width) in zip(np.asarray(patches), sizes, strict=True):
        rows, columns = _grid((height, width), patch_size)
        images.append(unpatchify(sample[: rows * columns], height, width, patch_size, channels))
    return images


def _grid(size: tuple[int, ...], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in a latent of ``size`` (h, w)."""
    height, width = size
    if height % patch_size or width % patch_size:
        raise DeepGenError(f"latent of {height}x{width} is not a whole number of {patch_size}x{patch_size} patches")
    return height // patch_size, width // patch_size


def _num_tokens(images: Sequence[np.ndarray], patch_size: int) -> int:
    grids = [_grid(image.shape[-2:], patch_size) for image in images]
    return sum(rows * columns for rows, columns in grids)
