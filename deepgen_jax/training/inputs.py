"""Pixels of a micro-batch -> what the training step takes: latents, reference tokens and VLM tokens, padded.

The VAE and the vision tower are frozen and run without gradients, as separate programs, one for each bucket of image
sizes; their results are padded to sizes that all buckets share, and the training step is one program. Cached features
enter at :func:`assemble`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax.data.vision_inputs import patch_grid, patchify_for_vlm
from deepgen_jax.models import patches as grids
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.qwen_vision import patch_layout
from deepgen_jax.models.vae import normalise, sample_posterior


class Moments(NamedTuple):
    """A VAE posterior: mean and logvar, float32 [B, h, w, C]."""

    mean: jax.Array
    logvar: jax.Array


class Features(NamedTuple):
    """Frozen features of a micro-batch: posteriors of the target and of each reference, VLM tokens [B, V, hidden]."""

    target: Moments
    references: tuple[Moments, ...]
    image_tokens: jax.Array


class Text(NamedTuple):
    """Left-padded prompts with think tokens at the end; see ``deepgen_jax.data.tokens.PromptBatch``.

    ``image_index`` int32 [B, L] is the place in the sample's own VLM tokens, -1 where there is no image.
    """

    input_ids: jax.Array
    position_ids: jax.Array
    real: jax.Array
    visible: jax.Array
    image_index: jax.Array


class MicroBatch(NamedTuple):
    """One micro-batch of one task. Everything padded is masked and does not change the loss.

    Attributes:
      latents: [B, T, D] float32, clean target patches; target_ids, target_mask: [B, T].
      references: [B, R, D] float32; reference_ids, reference_mask: [B, R]. R is 0 without references.
      image_tokens: [B, V, hidden]; V is 0 without references.
      weight: [B] float32, the share of each sample in the micro-batch's mean loss; 0 leaves it out.
      text: the prompts.
      negative: the empty prompt with the same references, as long as ``text``; None unless it was asked for.
    """

    latents: jax.Array
    target_ids: jax.Array
    target_mask: jax.Array
    references: jax.Array
    reference_ids: jax.Array
    reference_mask: jax.Array
    image_tokens: jax.Array
    weight: jax.Array
    text: Text
    negative: Text | None = None


class TokenBudget(NamedTuple):
    """Sizes that a task's micro-batches are padded to: MMDiT tokens of targets and references, VLM tokens."""

    target: int
    references: int
    image_tokens: int


def encode(
    model: DeepGen, frozen: dict[str, Any], target: jax.Array, references: Sequence[jax.Array], targets: bool = True
) -> Features:
    """Runs VAE and vision tower on uint8 pictures [B, H, W, 3]; all pictures of an argument have one size.

    Without ``targets`` the target gives its size alone, and its latents are zeros.
    """
    config = model.config
    batch = target.shape[0]

    def pixels(image: jax.Array) -> jax.Array:
        return image.astype(jnp.float32) / 255 * 2 - 1

    def moments(image: jax.Array) -> Moments:
        return Moments(*_frozen(model, frozen, "vae_encode", pixels(image)))

    tokens = [jnp.zeros((batch, 0, config.vision.out_hidden_size), model.dtype)]
    for image in references:
        grid = patch_grid(image.shape[1:3], config.vision)
        layout = (jnp.broadcast_to(x, (batch, x.size)) for x in patch_layout(*grid, config.vision))
        with jax.default_matmul_precision("highest"):
            patches = jax.vmap(lambda x: patchify_for_vlm(x, config.vision))(pixels(image))
        tokens.append(_frozen(model, frozen, "encode_images", patches, *layout))
    found = tuple(map(moments, references))
    if targets:
        return Features(moments(target), found, jnp.concatenate(tokens, axis=1))
    height, width = (side // config.vae.downscale for side in target.shape[1:3])
    zeros = jnp.zeros((batch, height, width, config.vae.latent_channels))
    return Features(Moments(zeros, zeros), found, jnp.concatenate(tokens, axis=1))


def _frozen(model: DeepGen, params: dict[str, Any], method: str, *args: jax.Array) -> Any:
    return jax.lax.stop_gradient(model.apply({"params": params}, *args, method=method))


def condition(
    model: DeepGen, variables: dict[str, Any], text: Text, image_tokens: jax.Array, rngs: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Condition of a micro-batch's prompts: pooled [B, P] and sequence [B, L, J].

    Args:
      model: static.
      variables: {"params": ...} with language model and bridge, and "lora" where their adapters train.
      text: B prompts.
      image_tokens: [B, V, hidden], VLM tokens of each sample's references.
      rngs: key of dropout in adapters, by name.
    """
    found: Any = model.apply(variables, *text[:4], *_placed(text, image_tokens), method="condition", rngs=rngs)
    return found


def hidden_states(
    model: DeepGen, variables: dict[str, Any], text: Text, image_tokens: jax.Array, rngs: Any = None
) -> jax.Array:
    """Selected hidden states of a micro-batch's prompts, [n, B, L, hidden]; arguments as for :func:`condition`."""
    found: Any = model.apply(variables, *text[:3], *_placed(text, image_tokens), method="hidden_states", rngs=rngs)
    return found


def _placed(text: Text, image_tokens: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """Row of each placeholder among the VLM tokens of all samples, None without any, and these [B * V, hidden]."""
    batch, slots, hidden = image_tokens.shape
    rows = jnp.arange(batch)[:, None] * slots
    index = jnp.where(text.image_index >= 0, text.image_index + rows, -1) if slots else None
    return index, image_tokens.reshape(-1, hidden)


def sample_keys(seed: int | jax.Array, index: jax.Array) -> jax.Array:
    """A key of each sample, [B], from ``index`` uint32 [B, 2]: high and low half of its place in the data's sequence.

    So randomness depends on the seed and the sample alone: not on the mesh, the host or the place in a batch.
    """

    def one(pair: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), pair[0]), pair[1])

    return jax.vmap(one)(index)


def posterior_noise(keys: jax.Array, purpose: int, like: Moments) -> jax.Array:
    """Standard normal noise [B, h, w, C], each sample's from its own key."""

    def one(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, purpose), like.mean.shape[1:], jnp.float32)

    return jax.vmap(one)(keys)


def assemble(
    model: DeepGen,
    features: Features,
    text: Text,
    weight: jax.Array,
    target_noise: jax.Array,
    reference_noise: Sequence[jax.Array],
    budget: TokenBudget,
    negative: Text | None = None,
) -> MicroBatch:
    """Draws latents from the posteriors, given standard normal noise, and pads everything to the budget."""
    config = model.config.mmdit
    batch = target_noise.shape[0]
    width = config.in_channels * config.patch_size**2

    def tokens(moments: Moments, noise: jax.Array) -> tuple[jax.Array, np.ndarray]:
        z = normalise(sample_posterior(moments.mean, moments.logvar, noise), model.config.vae)
        height, width = z.shape[1:3]
        ids = grids.position_ids(height, width, config.patch_size, config.pos_embed_max_size)
        return grids.patchify(jnp.moveaxis(z, -1, 1), config.patch_size), ids

    def padded(parts: list[tuple[jax.Array, np.ndarray]], size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        patches = jnp.concatenate([x for x, _ in parts], axis=1) if parts else jnp.zeros((batch, 0, width))
        ids = np.concatenate([ids for _, ids in parts]) if parts else np.zeros(0, np.int32)
        missing = size - patches.shape[1]
        if missing < 0:
            raise ValueError(f"{patches.shape[1]} tokens do not fit the budget of {size}")
        mask = jnp.broadcast_to(jnp.arange(size) < len(ids), (batch, size))
        row = jnp.broadcast_to(jnp.pad(jnp.asarray(ids), (0, missing)), (batch, size))
        return jnp.pad(patches, ((0, 0), (0, missing), (0, 0))), row, mask

    pairs = zip(features.references, reference_noise, strict=True)
    missing = budget.image_tokens - features.image_tokens.shape[1]
    return MicroBatch(
        *padded([tokens(features.target, target_noise)], budget.target),
        *padded([tokens(moments, noise) for moments, noise in pairs], budget.references),
        jnp.pad(features.image_tokens, ((0, 0), (0, missing), (0, 0))),
        weight,
        text,
        negative,
    )
