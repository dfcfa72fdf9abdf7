"""The pipeline's weights, inputs and sampler as shapes; see `deepgen_jax.parallel.abstract`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.tokens import round_up
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference import programs
from deepgen_jax.inference.conditioning import SEQUENCE_BUCKET
from deepgen_jax.inference.guidance import Condition
from deepgen_jax.models import flops
from deepgen_jax.models.deepgen import abstract_params, make_network
from deepgen_jax.models.quantized import keeps_dtype
from deepgen_jax.parallel.abstract import AbstractProgram, Tree, abstract_array, abstract_tree
from deepgen_jax.stores.merged_params import part_dtypes


def abstract_weights(config: DeepGenConfig, mesh: Mesh, dtype: DTypeLike) -> Tree:
    """Weights of all parts as `deepgen_jax.inference.loading.load_model` loads them."""
    dtypes = part_dtypes(config, jnp.dtype(dtype))
    weights: Tree = {}
    for part, tree in abstract_params(config).items():
        held = jax.tree_util.tree_map_with_path(partial(_held, dtypes[part]), tree)
        weights |= abstract_tree({part: held}, mesh, None)
    return weights


def _held(dtype: DTypeLike, path: tuple[Any, ...], leaf: Any) -> Any:
    return leaf if keeps_dtype(path[-1].key, leaf.dtype) else jax.ShapeDtypeStruct(leaf.shape, dtype)


def abstract_condition(
    config: DeepGenConfig, mesh: Mesh, rows: int, length: int, dtype: DTypeLike, axis: int | None
) -> Condition:
    """A condition of ``rows`` sequences of ``length`` tokens, split over the batch along ``axis``."""
    mmdit = config.mmdit

    def array(*shape: int, dtype: DTypeLike = dtype) -> Any:
        return abstract_array(mesh, rows, *shape, dtype=dtype, axis=axis)

    return Condition(
        array(mmdit.pooled_projection_dim), array(length, mmdit.joint_attention_dim), array(length, dtype=jnp.bool_)
    )


def sequence_length(config: DeepGenConfig, prompt_tokens: int) -> int:
    """Length of the sequence of a prompt with its think tokens, padded as the pipeline pads it."""
    return round_up(prompt_tokens + config.bridge.num_queries, SEQUENCE_BUCKET)


def image_tokens(config: DeepGenConfig, side: int) -> int:
    """MMDiT tokens of a square image of ``side`` pixels.

    Raises:
      DeepGenError: the image is not a whole number of patches.
    """
    unit = config.vae.downscale * config.mmdit.patch_size
    if side % unit:
        raise DeepGenError(f"images of {side} pixels do not divide into patches of {unit}; change the image size")
    return (side // unit) ** 2


def abstract_sampler(
    config: DeepGenConfig, mesh: Mesh, dtype: DTypeLike, *, batch: int, side: int, steps: int, prompt_tokens: int
) -> AbstractProgram:
    """The sampler of the pipeline guided Euler, or the policy of a model of few steps.

    Args:
      config: of the model.
      mesh: that images are split over.
      dtype: of the computation.
      batch: images.
      side: height and width of the images in pixels.
      steps: of the sampler.
      prompt_tokens: of a prompt with its template.
    """
    model = make_network(config, mesh, dtype)
    weights = abstract_weights(config, mesh, dtype)
    tokens, length = image_tokens(config, side), sequence_length(config, prompt_tokens)
    edge = side // config.vae.downscale
    noise = abstract_array(mesh, batch, config.mmdit.in_channels, edge, edge, axis=0)
    sides = 1 if config.few_step else 2
    condition = abstract_condition(config, mesh, sides * batch, length, model.dtype, axis=0)
    sigmas, scale = abstract_array(mesh, steps + 1), None if config.few_step else abstract_array(mesh)
    sampler, kind = (config.sampler, config.sampler) if config.few_step else ("euler", "guided Euler")
    arguments = ({"mmdit": weights["mmdit"]}, noise, None, condition, sigmas, scale)
    return AbstractProgram(
        name="inference",
        unit="images",
        batch=batch,
        micro_batch=batch,
        lower=lambda: programs.denoise.lower(model, *arguments, sampler=sampler),
        arguments=arguments,
        memory={"frozen weights": weights, "batch": (noise, condition)},
        flops=float(sides * batch * steps * flops.mmdit(config.mmdit, tokens, length)),
        summary=(
            f"{batch} images of {side}x{side}, {steps} {kind} steps, sequence {length}",
            f"attention {model.plan.kernel}",
        ),
        half_batch=f"--batch {batch // 2}",
    )
