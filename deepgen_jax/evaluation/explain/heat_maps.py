"""Heat maps of words and think tokens over the image, from the outputs of the MMDiT's joint attention.

Follows ConceptAttention (Helbling et al. 2025, arXiv 2502.04320, section 3): in the output space of the attention,
image tokens of a concept align with the concept's token. With outputs o_x of an image token and o_c of a condition
token, the map of c is the softmax over all concepts of the dot products o_x . o_c, averaged over layers and steps.
ConceptAttention adds concept tokens that attend without being attended to; here the concepts are the tokens of the
condition itself, so the maps explain an unmodified sampling run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from deepgen_jax.data.images import load_image
from deepgen_jax.data.tokens import round_up
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.explain.words import Word, words_of
from deepgen_jax.flow.schedule import make_sigmas
from deepgen_jax.inference.conditioning import SEQUENCE_BUCKET
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.models import patches as grids
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.stack import ATTENTION_OUTPUTS, restack
from deepgen_jax.random_keys import Inference

# The number of concepts is padded to a multiple of this.
_CONCEPT_BUCKET = 32


@dataclass(frozen=True)
class Condition:
    """Condition of one prompt, without padding.

    Attributes:
      pooled: float32 [1, P].
      sequence: float32 [1, L, J], think tokens last.
      words: words of the prompt, with the positions of their tokens in ``sequence``.
      think: positions of the think tokens in ``sequence``.
    """

    pooled: np.ndarray
    sequence: np.ndarray
    words: tuple[Word, ...]
    think: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """A sampled image and its heat maps.

    Attributes:
      latents: float32 [C, h, w].
      pixels: uint8 [H, W, 3].
      words: float32 [words, h / p, w / p], share of each word in each patch; sums to 1 over words.
      think: float32 [think tokens, h / p, w / p]; sums to 1 over think tokens.
    """

    latents: np.ndarray
    pixels: np.ndarray
    words: np.ndarray
    think: np.ndarray


def encode(pipe: DeepGenPipeline, prompt: str, images: Sequence[Image.Image] | None = None) -> Condition:
    """Encodes a prompt and locates its words in the condition.

    Raises:
      DeepGenError: the prompt has no words.
    """
    images = [load_image(image) for image in images or ()]
    pooled, sequence, mask = pipe.encode_prompt(prompt, [images] if images else None, padding="masked")
    length = int(mask[0].sum())
    sizes = [image.size for image in images] if images else None
    tokenizer = pipe.tokenizer
    counts = None if sizes is None else [int(np.prod(tokenizer.image_grid(*size))) for size in sizes]
    words, tokens = words_of(tokenizer, prompt, counts)
    if not words:
        raise DeepGenError(f"the prompt {prompt!r} has no words to explain; write some")
    return Condition(pooled, sequence[:, -length:], words, tuple(range(tokens, length)))


@partial(jax.jit, static_argnames=("model", "num_targets"))
def _observed(
    model: DeepGen, params: Any, packed: Any, sigma: jax.Array, condition: Any, concepts: jax.Array, num_targets: int
) -> tuple[jax.Array, jax.Array]:
    """Velocity of one sample, and maps of two groups of concepts, [2, concepts, num_targets].

    Each row of ``concepts`` [2, concepts, L] averages the tokens of a concept; padding rows are zero.
    """
    pooled, sequence, mask = condition
    velocity, stored = model.apply(
        {"params": params}, packed[0], packed[1], sigma[None] * 1000.0, pooled, sequence, None, mask, num_targets,
        method="velocity", mutable=[ATTENTION_OUTPUTS],
    )  # fmt: skip
    images = packed[0].shape[1]
    there = concepts.sum(axis=-1) > 0
    total: Any = 0.0
    layers = 0
    for run in stored[ATTENTION_OUTPUTS]["mmdit"].values():
        out = run["attn"]["out"][:, 0].astype(jnp.float32)
        if out.shape[1] <= images:  # the last layer has no condition queries
            continue
        high = jax.lax.Precision.HIGHEST
        directions = jnp.einsum("gcl,nld->ngcd", concepts, out[:, images:], precision=high)
        scores = jnp.einsum("ngcd,ntd->ngct", directions, out[:, :num_targets], precision=high)
        scores = jnp.where(there[..., None], scores / jnp.sqrt(jnp.float32(out.shape[-1])), -jnp.inf)
        total += jax.nn.softmax(scores, axis=2).sum(axis=0)
        layers += out.shape[0]
    return velocity, total / layers


def _weights(groups: Sequence[Sequence[Sequence[int]]], length: int) -> np.ndarray:
    """Weights that average the tokens of each concept: float32 [groups, concepts, length], zero-padded."""
    count = round_up(max(map(len, groups)), _CONCEPT_BUCKET)
    weights = np.zeros((len(groups), count, length), np.float32)
    for g, group in enumerate(groups):
        for c, tokens in enumerate(group):
            weights[g, c, list(tokens)] = 1 / len(tokens)
    return weights


def heat_maps(
    pipe: DeepGenPipeline,
    condition: Condition,
    latents: np.ndarray,
    sigma: float,
    references: Sequence[np.ndarray] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Heat maps at one noise level.

    Args:
      pipe: the model.
      condition: see :func:`encode`.
      latents: float32 [C, h, w] at noise level ``sigma``.
      sigma: in 0..1.
      references: latents of the references, float32 [C, h, w] each.

    Returns:
      Velocity, float32 [C, h, w]; maps of the words and of the think tokens, float32 [concepts, h / p, w / p].
    """
    config = pipe.config.mmdit
    packed = grids.pack([latents], [list(references)], patch_size=config.patch_size, max_size=config.pos_embed_max_size)
    # Right-pad and mask, so that prompts of different lengths share a compiled program.
    length = condition.sequence.shape[1]
    padded = round_up(length, SEQUENCE_BUCKET)
    sequence = np.pad(condition.sequence, ((0, 0), (0, padded - length), (0, 0)))
    mask = np.arange(padded)[None] < length
    groups: list[list[tuple[int, ...]]] = [
        [word.tokens for word in condition.words],
        [(token,) for token in condition.think],
    ]
    velocity, maps = _observed(
        pipe.model, restack({"mmdit": pipe.params["mmdit"]}, 1), (packed.patches, packed.position_ids),
        jnp.float32(sigma), (condition.pooled, sequence, mask), _weights(groups, padded), packed.num_targets,
    )  # fmt: skip
    size = latents.shape[1:]
    shape = tuple(side // config.patch_size for side in size)
    velocity = grids.unpack(np.asarray(velocity), [size], config.patch_size, config.out_channels)[0]
    words, think = (np.asarray(maps[g, : len(group)]).reshape(-1, *shape) for g, group in enumerate(groups))
    return velocity, words, think


def initial_noise(pipe: DeepGenPipeline, width: int, height: int, seed: int) -> np.ndarray:
    """Initial noise of a pipeline call with this seed, float32 [C, h, w]."""
    from deepgen_jax.inference import programs

    down = pipe.config.vae.downscale
    shape = (pipe.config.vae.latent_channels, height // down, width // down)
    seeds, indices = np.array([seed], np.uint32), np.zeros(1, np.uint32)
    return np.asarray(programs.normal_noise(seeds, indices, shape, Inference.INITIAL_NOISE))[0]


def reference_latents(pipe: DeepGenPipeline, images: Sequence[Image.Image]) -> list[np.ndarray]:
    """Latents of references as the MMDiT reads them: normalised posterior means, float32 [C, h, w] each."""
    vae = pipe.config.vae
    latents = []
    for image in images:
        pixels = np.asarray(load_image(image), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        mean, _ = pipe.vae_encode(pixels)
        latents.append((mean[0] - vae.shift_factor) * vae.scaling_factor)
    return latents


def observe(
    pipe: DeepGenPipeline,
    prompt: str,
    images: Sequence[Image.Image] = (),
    *,
    width: int,
    height: int,
    steps: int,
    seed: int = 0,
) -> Trace:
    """Samples an image with Euler steps, without guidance, and collects its heat maps.

    Args:
      pipe: the model.
      prompt: text prompt, or instruction for editing ``images``.
      images: references; sides are multiples of the model's unit.
      width, height: size of the result in pixels.
      steps: number of sampling steps, weighted equally in the maps.
      seed: seed of the noise.
    """
    condition = encode(pipe, prompt, images)
    references = reference_latents(pipe, images)
    x = initial_noise(pipe, width, height, seed)
    tokens = x[0].size // pipe.config.mmdit.patch_size**2
    sigmas = np.asarray(make_sigmas(pipe.scheduler, steps, tokens))
    words: Any = 0.0
    think: Any = 0.0
    for sigma, following in itertools.pairwise(sigmas):
        velocity, of_words, of_think = heat_maps(pipe, condition, x, float(sigma), references)
        x = x + (following - sigma) * velocity
        words, think = words + of_words / steps, think + of_think / steps
    return Trace(x, to_pixels(pipe, x), words, think)


def to_pixels(pipe: DeepGenPipeline, latents: np.ndarray) -> np.ndarray:
    """Latents [C, h, w] -> uint8 [H, W, 3]."""
    from deepgen_jax.data.vision_inputs import to_uint8

    return to_uint8(pipe.vae_decode(latents[None]))[0].transpose(1, 2, 0)
