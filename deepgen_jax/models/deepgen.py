"""DeepGen as a whole: prompt and reference images -> condition -> velocity, and the VAE on both sides."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.models.block_cache import BlockCache
from deepgen_jax.models.bridge import Bridge
from deepgen_jax.models.mmdit import MMDiT, Noisy
from deepgen_jax.models.plan import Plan, fastest_plan
from deepgen_jax.models.quantized import Format, quantize_tree
from deepgen_jax.models.qwen_text import QwenText
from deepgen_jax.models.qwen_vision import QwenVision
from deepgen_jax.models.stack import Remat
from deepgen_jax.models.vae import VAE


class DeepGen(nn.Module):
    """The five parts under one parameter tree: ``vision``, ``text``, ``bridge``, ``mmdit``, ``vae``.

    Attributes:
      config: sizes.
      dtype: of the computation, except in a VAE whose ``force_upcast`` asks for float32: then convolutions are float32,
        at high rather than full precision where ``dtype`` is narrower.
      remat: what layers recompute in the backward pass.
      plan: attention kernel and mesh.
      lora_dropout: rate at which inputs of the language model's adapters are dropped.
    """

    config: DeepGenConfig
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    plan: Plan = Plan()
    lora_dropout: float = 0.0

    def setup(self) -> None:
        cfg = self.config
        options: dict[str, Any] = {"dtype": self.dtype, "remat": self.remat, "plan": self.plan}
        self.vision = QwenVision(cfg.vision, **options)
        self.text = QwenText(cfg.text, cfg.bridge.selection_stride, lora_dropout=self.lora_dropout, **options)
        widths = cfg.text.hidden_size, cfg.mmdit.pooled_projection_dim, cfg.mmdit.joint_attention_dim
        self.bridge = Bridge(cfg.bridge, *widths, **options)
        self.mmdit = MMDiT(cfg.mmdit, **options)
        # Full precision of convolutions is for computation that is float32 throughout: it takes 15 times as long as
        # bfloat16 on GPUs, longer than four evaluations of the MMDiT.
        precision = None if jnp.dtype(self.dtype) == jnp.float32 else jax.lax.Precision.HIGH
        self.vae = VAE(cfg.vae, jnp.float32 if cfg.vae.force_upcast else self.dtype, self.plan, precision)

    def __call__(self) -> tuple[jax.Array, ...]:
        """Runs every part once on the smallest input: what `init` needs to make all parameters."""
        cfg = self.config
        ids = jnp.zeros((1, 1), jnp.int32)
        length = 1 + cfg.bridge.num_queries
        positions, mask = jnp.zeros((3, 1, length), jnp.int32), jnp.ones((1, length), bool)
        cell = jnp.zeros((1, cfg.vision.spatial_merge_size**2), jnp.int32)
        image = self.encode_images(jnp.zeros((*cell.shape, cfg.vision.patch_dim)), cell, cell, cell)
        pooled, sequence = self.condition(ids, positions, mask, mask, ids, image[0])
        patch = jnp.zeros((1, 1, cfg.mmdit.in_channels * cfg.mmdit.patch_size**2))
        velocity: Any = self.velocity(patch, ids, jnp.zeros((1,)), pooled, sequence)
        mean, _ = self.vae_encode(jnp.zeros((1, cfg.vae.downscale, cfg.vae.downscale, cfg.vae.in_channels)))
        return velocity, self.vae_decode(mean)

    def encode_images(self, patches: jax.Array, rows: jax.Array, columns: jax.Array, windows: jax.Array) -> jax.Array:
        """Reference images -> VLM tokens [M, N / 4, hidden]; see :class:`QwenVision`."""
        return self.vision(patches, rows, columns, windows)

    def hidden_states(
        self,
        input_ids: jax.Array,
        position_ids: jax.Array,
        real: jax.Array,
        image_index: jax.Array | None = None,
        image_tokens: jax.Array | None = None,
    ) -> jax.Array:
        """Selected hidden states of the language model.

        Args:
          input_ids: [B, L] int32, left-padded.
          position_ids: [3, B, L + Q] int32.
          real: [B, L + Q] bool, True on the prompt and the think tokens.
          image_index: [B, L] int32, row of ``image_tokens`` for each placeholder, -1 elsewhere.
          image_tokens: [T, hidden] tokens of all reference images.

        Returns:
          [n, B, L + Q, hidden], deepest first.
        """
        x = self.text.embed(input_ids)
        if image_index is not None and image_tokens is not None:
            images = jnp.take(image_tokens, jnp.maximum(image_index, 0), axis=0).astype(x.dtype)
            x = jnp.where(image_index[..., None] >= 0, images, x)
        return self.text(self.bridge.append_think_tokens(x), position_ids, real)

    def condition(
        self,
        input_ids: jax.Array,
        position_ids: jax.Array,
        real: jax.Array,
        visible: jax.Array,
        image_index: jax.Array | None = None,
        image_tokens: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Prompts -> pooled [B, pooled_projection_dim] and sequence [B, L + Q, joint_attention_dim].

        ``visible`` [B, L + Q] marks the tokens that the condition may depend on; the other arguments are those of
        :meth:`hidden_states`.
        """
        states = self.hidden_states(input_ids, position_ids, real, image_index, image_tokens)
        return self.bridge(states, visible)

    def velocity(
        self,
        patches: jax.Array,
        position_ids: jax.Array,
        timestep: jax.Array,
        pooled: jax.Array,
        context: jax.Array,
        patch_mask: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        num_targets: int | None = None,
        cache: BlockCache | None = None,
    ) -> jax.Array | tuple[jax.Array, BlockCache]:
        """Velocity of the target's patches, and with ``cache`` the next cache; see :class:`MMDiT`."""
        return self.mmdit(
            patches,
            position_ids,
            timestep,
            pooled,
            context,
            patch_mask=patch_mask,
            context_mask=context_mask,
            num_targets=num_targets,
            cache=cache,
        )

    def conditions(
        self, states: Sequence[jax.Array], visible: Sequence[jax.Array]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Pooled and sequence of several batches, from their :meth:`hidden_states`; see :meth:`Bridge.together`."""
        return self.bridge.together(states, visible)

    def velocities(self, batches: Sequence[Noisy], num_targets: int) -> list[jax.Array]:
        """Velocity of several batches; see :meth:`MMDiT.together`."""
        return self.mmdit.together(batches, num_targets)[0]

    def vae_encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pixels [B, H, W, 3] in -1..1 -> posterior mean and log variance [B, H/8, W/8, C]."""
        return self.vae.encode(pixels)

    def vae_decode(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, C], scale and shift undone -> pixels [B, 8h, 8w, 3]."""
        return self.vae.decode(z)


def make_network(config: DeepGenConfig, mesh: Mesh, dtype: DTypeLike, *, remat: Remat = "none") -> DeepGen:
    """The network with the fastest attention on a mesh.

    Args:
      config: sizes.
      mesh: that programs run on.
      dtype: of the computation.
      remat: what layers recompute in the backward pass.
    """
    plan = fastest_plan(mesh, dtype)
    return DeepGen(config, dtype=jnp.dtype(dtype), remat=remat, plan=plan)


def init_params(config: DeepGenConfig, key: jax.Array) -> dict[str, Any]:
    """Freshly initialised float32 parameters of all five parts."""
    return nn.unbox(DeepGen(config).init(key)["params"])


def abstract_params(config: DeepGenConfig) -> dict[str, Any]:
    """Shapes of the parameters without making them: a tree of ``ShapeDtypeStruct``, not to be changed.

    All are float32, except 8-bit kernels and tables of a quantised model.
    """
    shapes, how = _abstract_params(dataclasses.replace(config, lora=None, quantization=None)), config.quantization
    return shapes if how is None else quantize_tree(shapes, cast("Format", how.weights), how.products)


@functools.lru_cache(maxsize=4)  # tracing takes seconds
def _abstract_params(config: DeepGenConfig) -> dict[str, Any]:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
