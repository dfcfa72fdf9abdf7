"""Reference pictures -> tokens of the MMDiT, through the VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.tokens import round_up
from deepgen_jax.data.vision_inputs import to_pixels
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference import programs
from deepgen_jax.inference.requests import Requests
from deepgen_jax.models import patches as grids
from deepgen_jax.models.vae import normalise, sample_posterior
from deepgen_jax.random_keys import Inference

Posterior = Literal["mean", "sample"]

#: Reference tokens of the MMDiT are padded to a multiple of this.
REFERENCE_BUCKET = 64


def encode_references(
    requests: Requests,
    posterior: Posterior,
    noise: Sequence[Sequence[np.ndarray]] | None,
    config: DeepGenConfig,
    vae_encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    split: Callable[[np.ndarray], jax.Array],
) -> programs.References | None:
    """Padded MMDiT tokens of the reference pictures of a batch; None without pictures.

    Args:
      requests: the batch.
      posterior: the VAE posterior's "mean", or a "sample" of it.
      noise: posterior noise [C, h, w] of each picture in place of the seed's.
      config: of the model.
      vae_encode: pixels [1, 3, H, W] -> posterior mean and log variance [1, C, h, w].
      split: puts an array with a row for each image on the mesh.

    Raises:
      DeepGenError: an unknown ``posterior``.
    """
    if posterior not in ("mean", "sample"):
        raise DeepGenError(f"reference_posterior is {posterior!r}; choose mean or sample")
    if not any(requests.images):
        return None
    moments: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    latents: list[list[np.ndarray]] = []
    for i, refs in enumerate(requests.images):
        row: list[np.ndarray] = []
        for j, image in enumerate(refs or ()):
            if id(image) not in moments:
                mean, logvar = vae_encode(np.moveaxis(to_pixels(image)[None], -1, 1))
                moments[id(image)] = (mean[0], logvar[0])
            z, logvar = moments[id(image)]
            if posterior == "sample":
                eps = _posterior_noise(requests, i, j, z.shape) if noise is None else noise[requests.rows[i]][j]
                z = np.asarray(sample_posterior(jnp.asarray(z), jnp.asarray(logvar), jnp.asarray(eps)))
            row.append(np.asarray(normalise(jnp.asarray(z), config.vae)))
        latents.append(row)
    mmdit = config.mmdit
    tokens = max(sum(z[0].size // mmdit.patch_size**2 for z in row) for row in latents)
    packed = grids.pack(
        [np.zeros((mmdit.in_channels, 0, 0), np.float32)] * len(latents),
        latents,
        patch_size=mmdit.patch_size,
        max_size=mmdit.pos_embed_max_size,
        reference_tokens=round_up(tokens, REFERENCE_BUCKET),
    )
    mask = None if packed.patch_mask.all() else split(packed.patch_mask)
    return programs.References(split(packed.patches), split(packed.position_ids), mask)


def _posterior_noise(requests: Requests, row: int, column: int, shape: tuple[int, ...]) -> np.ndarray:
    seed, index = (np.asarray([x[row]], np.uint32) for x in (requests.seeds, requests.indices))
    return np.asarray(programs.normal_noise(seed, index, shape, Inference.REFERENCE_POSTERIOR + column)[0])
