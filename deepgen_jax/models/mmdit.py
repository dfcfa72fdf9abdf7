"""MMDiT of Stable Diffusion 3.5 Medium, with reference images as further image tokens.

Two streams of tokens, image patches and context (the condition sequence), have separate weights and meet in the joint
attention of every layer (Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
section 4 and figure 2). The timestep and the pooled condition modulate every layer (adaLN-Zero; Peebles and Xie 2023).
The first layers of SD3.5 have a second attention, over the image tokens alone (MMDiT-X). The last layer reads the
context without updating it. :mod:`deepgen_jax.models.mmdit_block` has a layer; here are the network around the layers
and its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from deepgen_jax.config import MMDiTConfig
from deepgen_jax.models.block_cache import BlockCache, Stack, Streams, run_cached
from deepgen_jax.models.layers import Linear, layer_norm
from deepgen_jax.models.mmdit_block import EPS, Mask, MMDiTBlock, modulate
from deepgen_jax.models.patches import sincos_table
from deepgen_jax.models.plan import Plan
from deepgen_jax.models.quantized import WEIGHT_SCALE
from deepgen_jax.models.stack import (
    Remat,
    is_unstacked,
    rematerialised,
    repeated,
    scanned,
    split_layers,
)

#: Channels of the sinusoidal timestep embedding.
TIMESTEP_CHANNELS = 256


class Noisy(NamedTuple):
    """A batch of noisy images with their conditions.

    Attributes:
      patches: [B, N, p * p * C] normalised latents as patches (see :mod:`deepgen_jax.models.patches`), the target
        image's first, then the references'.
      position_ids: [B, N] int32 rows of the position table.
      timestep: [B] sigma * 1000.
      pooled: [B, P] pooled condition.
      context: [B, L, J] condition tokens.
      patch_mask: [B, N] bool, False at padding, which is not attended; None without padding.
      context_mask: [B, L] bool, False at condition tokens that are not attended; None if all are.
    """

    patches: jax.Array
    position_ids: jax.Array
    timestep: jax.Array
    pooled: jax.Array
    context: jax.Array
    patch_mask: jax.Array | None = None
    context_mask: jax.Array | None = None


class BlockRun(NamedTuple):
    """Consecutive layers of equal structure; parameters of the i-th run are stacked under ``blocks_{i}``.

    Attributes:
      start: index of the first layer.
      length: number of layers.
      dual: the layers have a second attention over the image tokens only.
      context_pre_only: the layers read the context without updating it (the last layer).
    """

    start: int
    length: int
    dual: bool
    context_pre_only: bool


def block_runs(config: MMDiTConfig) -> tuple[BlockRun, ...]:
    """The layers of ``config`` in order, as runs of equal structure; the last layer is a run by itself."""
    runs: list[BlockRun] = []
    for layer in range(config.num_layers):
        kind = (layer in config.dual_attention_layers, layer == config.num_layers - 1)
        if runs and (runs[-1].dual, runs[-1].context_pre_only) == kind:
            runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
        else:
            runs.append(BlockRun(layer, 1, *kind))
    return tuple(runs)


def timestep_embedding(timestep: jax.Array, channels: int) -> jax.Array:
    """Sinusoids of timesteps [B] on the 0..1000 scale, cosines first: float32 [B, channels]."""
    half = channels // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class MMDiT(nn.Module):
    """Velocity of the target images' patches given noisy targets, references, timestep and condition.

    Attributes:
      config: sizes.
      dtype: of the layers; norms, modulation, the conditioning MLPs and the output projection are float32.
      remat: what the layers recompute in the backward pass (see :func:`deepgen_jax.models.stack.rematerialised`).
      plan: attention kernel and mesh.
    """

    config: MMDiTConfig
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    plan: Plan = Plan()

    def __call__(
        self,
        patches: jax.Array,
        position_ids: jax.Array,
        timestep: jax.Array,
        pooled: jax.Array,
        context: jax.Array,
        *,
        patch_mask: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        num_targets: int | None = None,
        cache: BlockCache | None = None,
    ) -> jax.Array | tuple[jax.Array, BlockCache]:
        """Velocity at a timestep.

        Args:
          patches, position_ids, timestep, pooled, context, patch_mask, context_mask: see :class:`Noisy`.
          num_targets: number of leading tokens that belong to the target images; None for all.
          cache: of the evaluation before, whose timesteps are all the same; None runs all layers.

        Returns:
          float32 [B, num_targets, N * p * p * C_out] with N = ``config.estimates``, and with ``cache`` the cache for
          the next evaluation.
        """
        batch = Noisy(patches, position_ids, timestep, pooled, context, patch_mask, context_mask)
        (velocity,), cache = self.together((batch,), num_targets, cache)
        return velocity if cache is None else (velocity, cache)

    @nn.compact
    def together(
        self, batches: Sequence[Noisy], num_targets: int | None = None, cache: BlockCache | None = None
    ) -> tuple[list[jax.Array], BlockCache | None]:
        """Velocities of several batches, such as of two tasks, which may differ in all sizes but ``num_targets``.

        Args:
          batches: one with a cache.
          num_targets, cache: as for :meth:`__call__`.

        Returns:
          The velocity of each batch, and the next cache.
        """
        cfg = self.config
        num_targets = batches[0].patches.shape[1] if num_targets is None else num_targets

        conditionings = [nn.silu(x) for x in self._conditioning(batches)]
        embed = Linear(cfg.hidden_size, dtype=self.dtype, plan=self.plan, name="patch_embed")
        embed_context = Linear(
            cfg.caption_projection_dim, dtype=self.dtype, plan=self.plan, name="context_embedder"
        )
        positions = self._positions()
        streams: list[Streams] = []
        masks: list[tuple[Mask, Mask]] = []
        for batch in batches:
            image = (embed(batch.patches) + positions(batch.position_ids)).astype(self.dtype)
            context, context_mask = batch.context, batch.context_mask
            if context_mask is not None:
                context, context_mask = _visible_first(context, context_mask)
            context = embed_context(context)
            image_mask: Mask = {} if batch.patch_mask is None else {"key_mask": batch.patch_mask}
            masks.append((_joint_mask(image, context, batch.patch_mask, context_mask), image_mask))
            streams.append((image, context))

        inputs = [(x, *mask) for x, mask in zip(conditionings, masks, strict=True)]
        if cache is None:
            targets = [image[:, :num_targets] for image, _ in self._blocks(streams, inputs, num_targets)]
        else:
            stacks, sigma = self._stacks(num_targets, *inputs[0]), batches[0].timestep[0] / 1000
            target, cache = run_cached(stacks, streams[0], cache, sigma)
            targets = [target]

        norm_out = Linear(2 * cfg.hidden_size, dtype=jnp.float32, name="norm_out")
        features = cfg.estimates * cfg.patch_size**2 * cfg.out_channels
        proj_out = Linear(features, dtype=jnp.float32, plan=self.plan, name="proj_out")
        velocities = []
        for target, conditioning in zip(targets, conditionings, strict=True):
            scale, shift = jnp.split(norm_out(conditioning)[:, None], 2, axis=-1)
            velocities.append(proj_out(modulate(layer_norm(target, EPS), shift, scale)))
        return velocities, cache

    def _blocks(
        self, streams: Sequence[Streams], inputs: Sequence[tuple[Any, ...]], num_targets: int
    ) -> Sequence[Streams]:
        """Streams of each batch after all layers."""
        for i, run in enumerate(block_runs(self.config)):
            name = f"blocks_{i}"
            settings = (self.config, run.dual, run.context_pre_only, num_targets, self.dtype, self.plan)
            if is_unstacked(self, name):
                layer = rematerialised(MMDiTBlock, self.remat)
                layers = scanned(layer, run.length, broadcast_inputs=3, unrolled=True)(*settings, name=name)
                streams = [layers(carry, *given)[0] for carry, given in zip(streams, inputs, strict=True)]
            else:
                block = MMDiTBlock(*settings, name=name)
                streams = repeated(block, run.length, self.remat, streams, inputs)
        return streams

    def _stacks(self, num_targets: int, *inputs: Any) -> list[Stack]:
        """Runs of layers as functions of their parameters, for the cache to call."""
        stacks: list[Stack] = []
        for i, run in enumerate(block_runs(self.config)):
            settings = (self.config, run.dual, run.context_pre_only, num_targets, self.dtype, self.plan)
            block = MMDiTBlock(*settings, parent=None)

            def layer(params: Any, streams: Streams, block: MMDiTBlock = block) -> Streams:
                out: Any = block.apply({"params": params}, streams, *inputs)
                return out[0]

            params = self.variables["params"][f"blocks_{i}"]
            stacks.append((layer, split_layers(params) or params))
        return stacks

    def _conditioning(self, batches: Sequence[Noisy]) -> list[jax.Array]:
        """Embeddings of the timestep and of the pooled condition of each batch, added: float32 [B, D]."""

        def mlp(name: str) -> Callable[[jax.Array], jax.Array]:
            first, second = (
                Linear(self.config.hidden_size, dtype=jnp.float32, name=f"{name}_fc{i}") for i in (1, 2)
            )
            return lambda x: second(nn.silu(first(x)))

        timestep, text = mlp("timestep"), mlp("text")
        return [timestep(timestep_embedding(x.timestep, TIMESTEP_CHANNELS)) + text(x.pooled) for x in batches]

    def _positions(self) -> Callable[[jax.Array], jax.Array]:
        """Position ids [B, N] -> rows of the position table, a constant stored with the parameters: float32 [B, N, D].

        In 8-bit models the table has a scale per row beside it.
        """
        cfg = self.config
        sizes = (cfg.pos_embed_max_size, cfg.sample_size // cfg.patch_size, cfg.hidden_size)
        table = self.param("pos_embed", lambda _: sincos_table(*sizes))

        def rows(position_ids: jax.Array) -> jax.Array:
            found: jax.Array = jnp.take(jax.lax.stop_gradient(table), position_ids, axis=0).astype(jnp.float32)
            if self.has_variable("params", WEIGHT_SCALE):
                found *= jnp.take(self.get_variable("params", WEIGHT_SCALE), position_ids, axis=0)[..., None]
            return found

        return rows


def _visible_first(context: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sorts context tokens and their mask so that visible tokens come first; their order does not matter."""
    order = jnp.argsort(~mask, axis=1, stable=True)
    return jnp.take_along_axis(context, order[..., None], axis=1), jnp.take_along_axis(mask, order, axis=1)


def _joint_mask(
    image: jax.Array, context: jax.Array, patch_mask: jax.Array | None, context_mask: jax.Array | None
) -> Mask:
    """Mask of the joint attention's keys, image then context; the visible tokens of the context come first."""
    if patch_mask is None and context_mask is None:
        return {}
    if context_mask is None:
        context_mask = jnp.ones(context.shape[:2], bool)
    if patch_mask is None:
        return {"key_lengths": image.shape[1] + jnp.sum(context_mask, axis=1)}
    return {"key_mask": jnp.concatenate([patch_mask, context_mask], axis=1)}
