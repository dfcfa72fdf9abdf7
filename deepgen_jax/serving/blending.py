"""Edits that keep part of their source: masks and strength in latent space, and the composite in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax.flow.samplers import State
from deepgen_jax.models.patches import patchify
from deepgen_jax.serving.jobs import Job


def latent_mask(mask: np.ndarray, downscale: int) -> np.ndarray:
    """bool [H, W] -> bool [H / downscale, W / downscale]: cells that hold a pixel that may change."""
    height, width = mask.shape
    cells = mask.reshape(height // downscale, downscale, width // downscale, downscale)
    return np.any(cells, axis=(1, 3))


def latent_masks(jobs: Sequence[Job], downscale: int) -> np.ndarray | None:
    """bool [B, 1, h, w] of a batch, all True for jobs without a mask; None if no job has one."""
    if all(job.mask is None for job in jobs):
        return None
    shape = (jobs[0].height // downscale, jobs[0].width // downscale)
    rows = [np.ones(shape, np.bool_) if job.mask is None else latent_mask(job.mask, downscale) for job in jobs]
    return np.stack(rows)[:, None]


@jax.jit
def noised(source: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """The flow's sample at noise level sigma: (1 - sigma) source + sigma noise, [B, C, h, w] float32."""
    return (1 - sigma) * source + sigma * noise


@partial(jax.jit, static_argnames="patch_size")
def keep_outside(
    state: State, mask: jax.Array, source: jax.Array, noise: jax.Array, sigma: jax.Array, patch_size: int
) -> State:
    """The sampler's state with the source, at noise level ``sigma``, outside the mask.

    What RePaint (arXiv 2201.09865, eq. 8) does for diffusion, with the flow's own noising; previews show the clean
    source there.

    Args:
      state: its ``x`` and ``clean`` are tokens [B, T, D].
      mask: bool [B, 1, h, w], True where the picture may change.
      source, noise: [B, C, h, w] float32.
      sigma: scalar, the level of ``state.x``.
      patch_size: of the tokens.
    """
    inside = patchify(jnp.broadcast_to(mask, source.shape), patch_size)
    source, noise = patchify(source, patch_size), patchify(noise, patch_size)
    kept = (1 - sigma) * source + sigma * noise
    return state._replace(x=jnp.where(inside, state.x, kept), clean=jnp.where(inside, state.clean, source))


def composite(image: np.ndarray, job: Job) -> np.ndarray:
    """The image inside the mask, the source's own pixels outside; uint8 [H, W, 3]."""
    if job.mask is None or job.source is None:
        return image
    return np.where(job.mask[..., None], image, np.asarray(job.source))
