"""The jitted programs of inference: images -> VLM tokens, prompts -> condition, noise -> latents, latents -> pixels.

Each is a pure function of (parameters, inputs). Shapes are static: callers pad to buckets, and whatever is padded is
invisible to the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax.flow import samplers
from deepgen_jax.flow.samplers.registered import canonical_name
from deepgen_jax.inference.accelerated import Work, accelerated_velocity
from deepgen_jax.inference.guidance import Condition, guided_velocity
from deepgen_jax.inference.stored_programs import stored_jit
from deepgen_jax.models import patches as grids
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.vae import denormalise
from deepgen_jax.parallel.jit_options import device_jit
from deepgen_jax.random_keys import Inference

Params = dict[str, Any]


class References(NamedTuple):
    """Reference images of a batch as MMDiT tokens: patches [B, R, D], position_ids [B, R], mask [B, R] or None."""

    patches: jax.Array
    position_ids: jax.Array
    mask: jax.Array | None


def _apply(model: DeepGen, method: str, params: Params, *args: Any, **kwargs: Any) -> Any:
    return model.apply({"params": params}, *args, method=method, **kwargs)


@partial(stored_jit, static_argnames=("shape", "purpose"))
def normal_noise(seeds: jax.Array, indices: jax.Array, shape: tuple[int, ...], purpose: int) -> jax.Array:
    """Standard normal noise [B, *shape], each sample's from its own (seed, index) and one purpose of `Inference`."""

    def one(seed: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.normal(_key(seed, index, purpose), shape, jnp.float32)

    return jax.vmap(one)(seeds, indices)


def _key(seed: jax.Array, index: jax.Array, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), purpose)


@partial(stored_jit, static_argnames=("model",))
def encode_images(model: DeepGen, params: Params, *batch: jax.Array) -> jax.Array:
    """Padded image patches -> VLM tokens [M, N / 4, hidden]; see ``DeepGen.encode_images``."""
    return _apply(model, "encode_images", params, *batch)


@partial(stored_jit, static_argnames=("model",))
def hidden_states(model: DeepGen, params: Params, *batch: jax.Array | None) -> jax.Array:
    """Selected hidden states [n, B, L, hidden]; see ``DeepGen.hidden_states``."""
    return _apply(model, "hidden_states", params, *batch)


@partial(stored_jit, static_argnames=("model",))
def condition(model: DeepGen, params: Params, *batch: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Padded prompts -> pooled and sequence; see ``DeepGen.condition``."""
    return _apply(model, "condition", params, *batch)


@partial(stored_jit, static_argnames=("model", "num_targets"))
def velocity(model: DeepGen, params: Params, *batch: jax.Array | None, num_targets: int) -> jax.Array:
    """Velocity of packed samples; see ``DeepGen.velocity``."""
    return _apply(model, "velocity", params, *batch, num_targets=num_targets)


@partial(device_jit, static_argnames=("model", "sampler", "trajectory"))
def denoise(
    model: DeepGen,
    params: Params,
    noise: jax.Array,
    references: References | None,
    condition: Condition,
    sigmas: jax.Array,
    guidance_scale: jax.Array | None,
    trajectory: bool = False,
    sampler: str = "euler",
) -> jax.Array:
    """All steps of an ODE sampler in one program whose number of steps is known to the compiler.

    Args:
      model, params: the model; only its ``mmdit`` part is used.
      noise: [B, C, h, w] float32 initial latents.
      references: the reference images, None for text-to-image.
      condition: of B samples, or with guidance of 2 B: prompt and negative prompt of each sample side by side.
      sigmas: [N + 1] float32 noise levels, the last is 0.
      guidance_scale: g of ``v = v_neg + g (v_cond - v_neg)``; None without guidance.
      trajectory: return the latents after every step.
      sampler: name of the sampler.

    Returns:
      [B, C, h, w] float32, or [N, B, C, h, w] with ``trajectory``.
    """
    size = (noise.shape[2], noise.shape[3])
    x = grids.patchify(noise, model.config.mmdit.patch_size)
    velocity = _velocity_fn(model, params, size, x, references, condition, guidance_scale)
    if trajectory:
        return to_latents(model, samplers.sample(sampler, velocity, x, sigmas, return_trajectory=True)[1][1:], size)
    return to_latents(model, samplers.sample(sampler, velocity, x, sigmas), size)


def _known_sampler(static: Mapping[str, Any]) -> bool:
    """Whether the sampler is part of this package, whose sources are in the key of stored programs."""
    return samplers.SAMPLERS.target(canonical_name(static["sampler"])).startswith("deepgen_jax.")


@partial(stored_jit, static_argnames=("model", "sampler"), keep=_known_sampler)
def start_denoising(model: DeepGen, noise: jax.Array, sampler: str, work: Work | None = None) -> samplers.State:
    """State before the first step from initial latents [B, C, h, w]; ``work`` where steps are accelerated."""
    return samplers.start(sampler, grids.patchify(noise, model.config.mmdit.patch_size), () if work is None else work)


@partial(stored_jit, static_argnames=("model", "sampler", "size"), large=True, keep=_known_sampler)
def denoise_steps(
    model: DeepGen,
    params: Params,
    state: samplers.State,
    references: References | None,
    condition: Condition,
    sigmas: jax.Array,
    guidance_scale: jax.Array | None,
    first: jax.Array,
    last: jax.Array,
    keys: jax.Array | None,
    *,
    sampler: str,
    size: tuple[int, int],
) -> samplers.State:
    """Steps ``first`` to ``last`` - 1 of any sampler; their number is traced, so changing it does not recompile.

    Args:
      model, params, references, condition, guidance_scale: as for :func:`denoise`.
      state: of :func:`start_denoising` or an earlier call; its cache says whether steps are accelerated.
      sigmas: float32, padded by :func:`padded_sigmas`.
      first, last: int32 scalars.
      keys: [B] of :func:`sample_keys`, which stochastic samplers draw their noise from; None for others.
      sampler: name of the sampler.
      size: (height, width) of the latents.
    """
    velocity = _cached_velocity_fn(model, params, size, state, references, condition, guidance_scale)

    def noise(step: jax.Array) -> jax.Array:
        assert keys is not None
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, step), state.x.shape[1:], jnp.float32)  # noqa: E731
        return jax.vmap(draw)(keys)

    noise_fn = None if keys is None else noise
    return samplers.advance(sampler, velocity, state, sigmas, first, last, noise_fn)


@partial(stored_jit, static_argnames=("model", "size"))
def to_latents(model: DeepGen, tokens: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Tokens [..., T, D] -> latents [..., C, h, w]."""
    return grids.unpatchify(tokens, *size, model.config.mmdit.patch_size, model.config.mmdit.out_channels)


@stored_jit
def sample_keys(seeds: jax.Array, indices: jax.Array) -> jax.Array:
    """Keys [B] of the noise that stochastic samplers add, each depending only on the sample's (seed, index)."""
    return jax.vmap(lambda seed, index: _key(seed, index, Inference.STEP_NOISE))(seeds, indices)


def padded_sigmas(sigmas: np.ndarray) -> np.ndarray:
    """``sigmas`` [N + 1] padded with zeros to a multiple of 128 values, for :func:`denoise_steps`."""
    return np.pad(sigmas, (0, -len(sigmas) % 128))


def _velocity_fn(
    model: DeepGen,
    params: Params,
    size: tuple[int, int],
    x: jax.Array,
    references: References | None,
    condition: Condition,
    guidance_scale: jax.Array | None,
) -> samplers.VelocityFn:
    """(target tokens [B, T, D], sigma) -> guided velocity."""
    ids, mask = _tokens(model, size, x, references)

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        tokens, variables = _with_references(x, references), {"params": params}
        return guided_velocity(model, variables, tokens, ids, sigma, condition, guidance_scale, mask, x.shape[1])

    return velocity


def _cached_velocity_fn(
    model: DeepGen,
    params: Params,
    size: tuple[int, int],
    state: samplers.State,
    references: References | None,
    condition: Condition,
    guidance_scale: jax.Array | None,
) -> samplers.CachedVelocityFn:
    """(target tokens, sigma, cache) -> guided velocity and the next cache, which is a `Work` where steps save some."""
    if not isinstance(state.cache, Work):
        plain = _velocity_fn(model, params, size, state.x, references, condition, guidance_scale)
        return lambda x, sigma, cache: (plain(x, sigma), cache)
    ids, mask = _tokens(model, size, state.x, references)

    def velocity(x: jax.Array, sigma: jax.Array, work: Work) -> tuple[jax.Array, Work]:
        tokens, variables = _with_references(x, references), {"params": params}
        return accelerated_velocity(
            model, variables, tokens, ids, sigma, condition, guidance_scale, mask, x.shape[1], work
        )

    return velocity


def _tokens(
    model: DeepGen, size: tuple[int, int], x: jax.Array, references: References | None
) -> tuple[jax.Array, jax.Array | None]:
    """Position ids [B, N] and mask [B, N] or None of the MMDiT's image tokens."""
    config = model.config.mmdit
    batch, num_targets = x.shape[:2]
    targets = grids.position_ids(*size, config.patch_size, config.pos_embed_max_size)
    ids = jnp.broadcast_to(jnp.asarray(targets), (batch, num_targets))
    if references is None:
        return ids, None
    ids = jnp.concatenate([ids, references.position_ids], axis=1)
    if references.mask is None:
        return ids, None
    return ids, jnp.concatenate([jnp.ones((batch, num_targets), bool), references.mask], axis=1)


def _with_references(x: jax.Array, references: References | None) -> jax.Array:
    return x if references is None else jnp.concatenate([x, references.patches.astype(x.dtype)], axis=1)


@partial(stored_jit, static_argnames=("model",))
def vae_encode(model: DeepGen, params: Params, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pixels [B, H, W, 3] -> posterior mean and log variance [B, h, w, C]."""
    return _apply(model, "vae_encode", params, pixels)


@partial(stored_jit, static_argnames=("model", "one_by_one"))
def vae_decode(model: DeepGen, params: Params, latents: jax.Array, one_by_one: bool) -> jax.Array:
    """Normalised latents [B, C, h, w] -> float32 pixels [B, H, W, 3].

    ``one_by_one`` decodes the images of a batch in turn: the decoder's activations at full resolution are the largest
    of the whole model, so a batch of them is not worth holding on one device.
    """
    z = denormalise(jnp.moveaxis(latents, 1, -1), model.config.vae)

    def decode(z: jax.Array) -> jax.Array:
        return _apply(model, "vae_decode", params, z)

    return jax.lax.map(lambda one: decode(one[None])[0], z) if one_by_one else decode(z)
