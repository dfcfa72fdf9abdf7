"""Rollouts: the policy samples groups of images and keeps the trajectories that it learns from.

An image's noise depends on the run's seed and the image's own number, counted over the whole run, alone: not on the
batch it is rolled out in, nor on the mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow.samplers import sample, sde_step
from deepgen_jax.inference.programs import Condition
from deepgen_jax.models import patches as grids
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel.jit_options import device_jit
from deepgen_jax.random_keys import Rollout
from deepgen_jax.rl.policy import Canvas, rows_of, velocity
from deepgen_jax.training.partition import Tree


class Trajectory(NamedTuple):
    """The transitions of a rollout, as an update needs them.

    Attributes:
      latents: [N + 1, B, T, D], the initial noise first, in the dtype of the rollout's settings.
      log_probs: float32 [N, B], of step i taken from ``latents[i]`` to ``latents[i + 1]``.
      sigmas: float32 [N + 1], the exact noise levels.
      keys: [B], of the images; step i's noise is ``step_noise(keys, i, ...)`` and need not be stored.
    """

    latents: jax.Array
    log_probs: jax.Array
    sigmas: jax.Array
    keys: jax.Array


@dataclass(frozen=True)
class RolloutSettings:
    """Static settings of a rollout.

    Attributes:
      canvas: sizes.
      sampler: "cps", "flow", "dance", or "ode", which is deterministic and leaves no trajectory.
      dtype: of the stored latents. Below float32 every state is rounded as it is stored, before its log-probability is
        computed and the rollout continues, so that the update sees exactly what was sampled.
    """

    canvas: Canvas
    sampler: str = "cps"
    dtype: DTypeLike = jnp.float32


def image_keys(seed: ArrayLike, images: ArrayLike) -> jax.Array:
    """Keys of images by their numbers [B] in the whole run."""
    base = jax.random.fold_in(jax.random.key(seed), Rollout.STEP_NOISE)
    return jax.vmap(partial(jax.random.fold_in, base))(jnp.asarray(images, jnp.uint32))


def step_noise(keys: jax.Array, step: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise [B, *shape] of one step, each image's from its own key [B]."""

    def one(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32)

    return jax.vmap(one)(keys)


@partial(jax.jit, static_argnames=("group_size", "shape", "share"))
def initial_noise(
    seed: ArrayLike, prompts: ArrayLike, group_size: int, shape: tuple[int, ...], share: bool = True
) -> jax.Array:
    """Initial noise of groups: standard normal float32 [P * group_size, *shape].

    Args:
      seed: of the run.
      prompts: [P] numbers of the prompts in the whole run; image g of prompt p has the number p * group_size + g.
      group_size: images of one prompt.
      shape: (tokens, width) of an image's latents.
      share: the images of a group start from the same noise.
    """
    prompts = jnp.asarray(prompts, jnp.uint32)
    numbers = prompts if share else (prompts[:, None] * group_size + jnp.arange(group_size, dtype=jnp.uint32)).ravel()
    base = jax.random.fold_in(jax.random.key(seed), Rollout.GROUP_NOISE if share else Rollout.IMAGE_NOISE)

    def one(number: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(base, number), shape, jnp.float32)

    noise = jax.vmap(one)(numbers)
    return jnp.repeat(noise, group_size, axis=0) if share else noise


@partial(device_jit, static_argnames=("model", "settings"))
def rollout(
    model: DeepGen,
    settings: RolloutSettings,
    variables: Tree,
    noise: jax.Array,
    condition: Condition,
    sigmas: jax.Array,
    eta: jax.Array | float,
    keys: jax.Array,
    guidance_scale: jax.Array | float | None = None,
) -> tuple[jax.Array, Trajectory | None]:
    """Samples a batch of images in one `jax.lax.scan` over the steps.

    Args:
      model, settings: static.
      variables: the policy's, see ``policy.policy_variables``; only the MMDiT is used.
      noise: [B, T, D] float32, see :func:`initial_noise`.
      condition: of the B / group_size prompts, or with guidance of as many pairs, prompt and negative side by side.
      sigmas: float32 [N + 1] of ``schedule.make_sigmas``.
      eta: strength of the noise.
      keys: [B] of :func:`image_keys`.
      guidance_scale: g of ``v_neg + g (v_cond - v_neg)``; None gives the conditional velocity alone.

    Returns:
      The final latents [B, C, h, w] float32, and the trajectory (None of "ode").
    """
    canvas, config = settings.canvas, model.config.mmdit
    rows = rows_of(condition, jnp.arange(noise.shape[0]), canvas.group_size, 1 if guidance_scale is None else 2)
    sigmas = jnp.asarray(sigmas, jnp.float32)

    def guided(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return velocity(model, variables, canvas, x, sigma, rows, guidance_scale)

    def pictures(x: jax.Array) -> jax.Array:
        return grids.unpatchify(x, canvas.height, canvas.width, config.patch_size, config.out_channels)

    if settings.sampler == "ode":
        return pictures(sample("euler", lambda x, sigma: guided(canvas.split(x), sigma), noise, sigmas)), None

    def step(latents: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        index, sigma, sigma_next = inputs
        x = canvas.split(latents[index].astype(jnp.float32))
        v, levels = guided(x, sigma), (sigma, sigma_next, sigmas[1], eta)
        noise = step_noise(keys, index, x.shape[1:])
        following = sde_step(settings.sampler, v, x, *levels, noise=noise)[0].astype(settings.dtype)
        log_prob = sde_step(settings.sampler, v, x, *levels, next_sample=following)[3]
        return canvas.split(latents.at[index + 1].set(following), axis=1), log_prob

    count = sigmas.shape[0] - 1
    latents = jnp.zeros((count + 1, *noise.shape), settings.dtype).at[0].set(noise.astype(settings.dtype))
    inputs = (jnp.arange(count, dtype=jnp.int32), sigmas[:-1], sigmas[1:])
    latents, log_probs = jax.lax.scan(step, canvas.split(latents, axis=1), inputs)
    return pictures(latents[-1].astype(jnp.float32)), Trajectory(latents, log_probs, sigmas, keys)


@jax.jit
def concatenated(trajectories: Sequence[Trajectory]) -> Trajectory:
    """Concatenates trajectories of the same noise levels along their images."""
    if not trajectories:
        raise DeepGenError("no trajectories to concatenate; roll out at least one micro-batch")
    latents, log_probs = (jnp.concatenate(x, axis=1) for x in zip(*(t[:2] for t in trajectories), strict=True))
    return Trajectory(latents, log_probs, trajectories[0].sigmas, jnp.concatenate([t.keys for t in trajectories]))
