"""The policy: the velocity of the MMDiT, under a condition that a group of images shares.

Latents are tokens [B, T, D] here (patches of the latent image); image b belongs to prompt ``b // group_size``. Arrays
are global: on a mesh the images are split over the batch axes by ``sharding``, and nothing depends on how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deepgen_jax.inference.guidance import Condition, guided_velocity
from deepgen_jax.models import lora
from deepgen_jax.models import patches as grids
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.training.partition import Tree, join


@dataclass(frozen=True)
class Canvas:
    """Static sizes of a batch of images.

    Attributes:
      height, width: of the latents, before they are cut into patches.
      group_size: images of one prompt.
      sharding: of arrays whose leading axis is a micro-batch of images; None without a mesh.
    """

    height: int
    width: int
    group_size: int
    sharding: NamedSharding | None = None

    def split(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """``x``, whose dimension ``axis`` are images, split over the mesh like a batch; unchanged without a mesh."""
        if self.sharding is None:
            return x
        spec = PartitionSpec(*[None] * axis, *self.sharding.spec)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.sharding.mesh, spec))


def policy_variables(frozen: Tree, trained: Mapping[str, Any] | None, lora_scale: float = 0.0) -> Tree:
    """Variables of the MMDiT for ``model.apply``.

    Args:
      frozen: parameters that do not train, by part.
      trained: {"params": ..., "lora": ...} as in ``TrainState.trainable``, or their starting values for the reference
        policy; None for ``frozen`` alone, which holds the whole starting MMDiT where only fresh adapters train.
      lora_scale: alpha / rank of the adapters.
    """
    trained = trained or {}
    weights = trained.get("params", {}).get("mmdit", {})
    variables: Tree = {"params": {"mmdit": join(frozen.get("mmdit", {}), weights)}}
    adapters = (trained.get("lora") or {}).get("mmdit")
    if adapters:
        variables["lora"] = {"mmdit": lora.scaled(adapters, lora_scale)}
    return variables


def rows_of(condition: Condition, images: jax.Array, group_size: int, sides: int) -> Condition:
    """Condition of images, looked up from that of their prompts.

    Args:
      condition: of P prompts; with ``sides`` 2 of P pairs, prompt and negative prompt side by side.
      images: int32 [b], places of images in the batch of P * group_size.
      group_size: images of one prompt.
      sides: 1, or 2 with guidance.

    Returns:
      Condition of b images, or of b pairs side by side.
    """
    prompts = images // group_size
    rows = (prompts[:, None] * sides + jnp.arange(sides)).reshape(-1)
    return Condition(*(jnp.take(x, rows, axis=0) for x in condition))


def velocity(
    model: DeepGen,
    variables: Tree,
    canvas: Canvas,
    latents: jax.Array,
    sigma: jax.Array,
    condition: Condition,
    guidance_scale: jax.Array | float | None = None,
) -> jax.Array:
    """Velocity of latents at a noise level, with guidance ``v_neg + g (v_cond - v_neg)`` if asked for.

    Args:
      model: static.
      variables: see :func:`policy_variables`.
      canvas: sizes.
      latents: [b, T, D] float32.
      sigma: noise level, scalar or [b].
      condition: of b images, or with guidance of b pairs (see :func:`rows_of`).
      guidance_scale: g; None gives the conditional velocity alone.

    Returns:
      float32 [b, T, D].
    """
    config = model.config.mmdit
    places = grids.position_ids(canvas.height, canvas.width, config.patch_size, config.pos_embed_max_size)
    ids = jnp.broadcast_to(jnp.asarray(places), latents.shape[:2])
    return guided_velocity(model, variables, latents, ids, sigma, condition, guidance_scale)
