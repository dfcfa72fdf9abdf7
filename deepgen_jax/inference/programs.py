"""The jitted programs of inference: images -> VLM tokens, prompts -> condition, noise -> latents, latents -> pixels.

Each is a pure function of (parameters, inputs). Shapes are static: callers pad to buckets, and whatever is padded is
invisible to the result.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepgen_jax.flow.samplers import sample_ode
from deepgen_jax.models import patches as grids
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.vae import denormalise
from deepgen_jax.parallel.jit_options import tuned_jit

Params = dict[str, Any]

#: What a random key is for; keys are fold_in(fold_in(key(seed), sample index), purpose).
INITIAL_NOISE, REFERENCE_POSTERIOR = 0, 1


class References(NamedTuple):
    """Reference images of a batch as MMDiT tokens: patches [B, R, D], position_ids [B, R], mask [B, R] or None."""

    patches: jax.Array
    position_ids: jax.Array
    mask: jax.Array | None


class Condition(NamedTuple):
    """What the MMDiT is conditioned on: pooled [B, P], sequence [B, L, J], mask [B, L]."""

    pooled: jax.Array
    sequence: jax.Array
    mask: jax.Array


def _apply(model: DeepGen, method: str, params: Params, *args: Any, **kwargs: Any) -> Any:
    return model.apply({"params": params}, *args, method=method, **kwargs)


@partial(jax.jit, static_argnames=("shape", "purpose"))
def normal_noise(seeds: jax.Array, indices: jax.Array, shape: tuple[int, ...], purpose: int) -> jax.Array:
    """Standard normal noise [B, *shape], each sample's from its own (seed, index) alone."""

    def one(seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), purpose)
        return jax.random.normal(key, shape, jnp.float32)

    return jax.vmap(one)(seeds, indices)


@partial(jax.jit, static_argnames="model")
def encode_images(model: DeepGen, params: Params, *batch: jax.Array) -> jax.Array:
    """Padded image patches -> VLM tokens [M, N / 4, hidden]; see ``DeepGen.encode_images``."""
    return _apply(model, "encode_images", params, *batch)


@partial(jax.jit, static_argnames="model")
def hidden_states(model: DeepGen, params: Params, *batch: jax.Array | None) -> jax.Array:
    """Selected hidden states [n, B, L, hidden]; see ``DeepGen.hidden_states``."""
    return _apply(model, "hidden_states", params, *batch)


@partial(jax.jit, static_argnames="model")
def condition(model: DeepGen, params: Params, *batch: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Padded prompts -> pooled and sequence; see ``DeepGen.condition``."""
    return _apply(model, "condition", params, *batch)


@partial(jax.jit, static_argnames=("model", "num_targets"))
def velocity(model: DeepGen, params: Params, *batch: jax.Array | None, num_targets: int) -> jax.Array:
    """Velocity of packed samples; see ``DeepGen.velocity``."""
    return _apply(model, "velocity", params, *batch, num_targets=num_targets)


@partial(tuned_jit, static_argnames=("model", "trajectory"))
def denoise(
    model: DeepGen,
    params: Params,
    noise: jax.Array,
    references: References | None,
    condition: Condition,
    sigmas: jax.Array,
    guidance_scale: jax.Array | None,
    trajectory: bool = False,
) -> jax.Array:
    """All of denoising in one program: Euler steps in a `jax.lax` loop, both sides of guidance in one batch.

    Args:
      model, params: the model; only its ``mmdit`` part is used.
      noise: [B, C, h, w] float32 initial latents.
      references: the reference images, None for text-to-image.
      condition: of B samples, or with guidance of 2 B: prompt and negative prompt of each sample side by side.
      sigmas: [N + 1] float32 noise levels, the last is 0.
      guidance_scale: g of ``v = v_neg + g (v_cond - v_neg)``; None without guidance.
      trajectory: return the latents after every step.

    Returns:
      [B, C, h, w] float32, or [N, B, C, h, w] with ``trajectory``.
    """
    config = model.config.mmdit
    batch, channels, height, width = noise.shape
    sides = 1 if guidance_scale is None else 2
    x = grids.patchify(noise, config.patch_size)
    num_targets = x.shape[1]
    target_ids = grids.position_ids(height, width, config.patch_size, config.pos_embed_max_size)
    ids = jnp.broadcast_to(jnp.asarray(target_ids), (batch, num_targets))
    mask = None
    if references is not None:
        ids = jnp.concatenate([ids, references.position_ids], axis=1)
        if references.mask is not None:
            mask = jnp.concatenate([jnp.ones((batch, num_targets), bool), references.mask], axis=1)
            mask = jnp.repeat(mask, sides, axis=0)
    ids = jnp.repeat(ids, sides, axis=0)

    def guided_velocity(x: jax.Array, sigma: jax.Array, step: jax.Array) -> jax.Array:
        del step
        tokens = x if references is None else jnp.concatenate([x, references.patches.astype(x.dtype)], axis=1)
        v = _apply(
            model,
            "velocity",
            params,
            jnp.repeat(tokens, sides, axis=0),
            ids,
            jnp.full((sides * batch,), sigma * 1000.0),
            condition.pooled,
            condition.sequence,
            mask,
            condition.mask,
            num_targets,
        )
        if guidance_scale is None:
            return v
        v = v.reshape(batch, 2, *v.shape[1:])
        return v[:, 1] + guidance_scale * (v[:, 0] - v[:, 1])

    final, states = sample_ode(guided_velocity, x, sigmas, return_trajectory=True)
    return grids.unpatchify(states[1:] if trajectory else final, height, width, config.patch_size, channels)


@partial(jax.jit, static_argnames="model")
def vae_encode(model: DeepGen, params: Params, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pixels [B, H, W, 3] -> posterior mean and log variance [B, h, w, C]."""
    return _apply(model, "vae_encode", params, pixels)


@partial(jax.jit, static_argnames=("model", "one_by_one"))
def vae_decode(model: DeepGen, params: Params, latents: jax.Array, one_by_one: bool) -> jax.Array:
    """Normalised latents [B, C, h, w] -> float32 pixels [B, H, W, 3].

    ``one_by_one`` decodes the images of a batch in turn: the decoder's activations at full resolution are the largest
    of the whole model, so a batch of them is not worth holding on one device.
    """
    z = denormalise(jnp.moveaxis(latents, 1, -1), model.config.vae)

    def decode(z: jax.Array) -> jax.Array:
        return _apply(model, "vae_decode", params, z)

    return jax.lax.map(lambda one: decode(one[None])[0], z) if one_by_one else decode(z)
