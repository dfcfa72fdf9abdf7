"""One layer of the MMDiT: joint attention of two streams, image attention and feed-forward layers, all modulated.

Figure 2b of Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", with
adaLN-Zero (Peebles and Xie 2023) and, in dual layers, the second attention of MMDiT-X.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike

from deepgen_jax.config import MMDiTConfig
from deepgen_jax.models.attention import attention
from deepgen_jax.models.layers import INNER, KEPT, Linear, RMSNorm, layer_norm
from deepgen_jax.models.plan import Plan
from deepgen_jax.models.stack import ATTENTION_OUTPUTS

EPS = 1e-6

#: ``key_mask`` or ``key_lengths`` of :func:`attention`; empty if all keys may be attended.
Mask = Mapping[str, Any]


class Modulation(NamedTuple):
    """adaLN-Zero parameters of one sub-layer, float32 [B, 1, D]; alpha, beta and gamma in the paper's figure 2."""

    shift: jax.Array
    scale: jax.Array
    gate: jax.Array


def modulate(normed: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Scales and shifts normalised tokens [B, N, D] by [B, 1, D]."""
    return normed * (1 + scale) + shift


def _heads(module: JointAttention | ImageAttention, x: jax.Array, name: str, norm: str | None = None) -> jax.Array:
    """Linear layer ``name`` of ``module`` split into heads [B, N, H, D / H], each RMS-normalised if ``norm``."""
    config, dtype = module.config, module.dtype
    y = Linear(config.hidden_size, dtype=dtype, plan=module.plan, name=name)(x)
    y = module.plan.head_rows(rearrange(y, "b n (h d) -> b n h d", h=config.num_heads))
    return y if norm is None else RMSNorm(EPS, dtype, name=norm)(y)


class JointAttention(nn.Module):
    """Attention over image and context tokens together, each stream with its own projections."""

    config: MMDiTConfig
    context_pre_only: bool
    dtype: DTypeLike
    plan: Plan

    @nn.compact
    def __call__(
        self, image: jax.Array, context: jax.Array, mask: Mask, num_queries: int
    ) -> tuple[jax.Array, jax.Array | None]:
        """Image [B, N, D] and context [B, L, D] -> image [B, num_queries, D], context [B, L, D] (or None).

        Keys and values come from all tokens, queries from the first ``num_queries`` image tokens and, unless
        ``context_pre_only``, from the context.
        """
        cfg, dtype = self.config, self.dtype
        # One cast for three projections, so that their gradients are added in the computation's dtype.
        image, context = image.astype(dtype), context.astype(dtype)
        query = _heads(self, image[:, :num_queries], "to_q", "norm_q")
        key = _heads(self, image, "to_k", "norm_k")
        value = _heads(self, image, "to_v")
        if not self.context_pre_only:
            query = jnp.concatenate([query, _heads(self, context, "add_q", "norm_added_q")], axis=1)
        key = jnp.concatenate([key, _heads(self, context, "add_k", "norm_added_k")], axis=1)
        value = jnp.concatenate([value, _heads(self, context, "add_v")], axis=1)

        out = attention(query, key, value, **mask, plan=self.plan)
        out = rearrange(out, "b n h d -> b n (h d)")
        # Read by `deepgen_jax.evaluation.explain`; nothing is stored unless the caller makes the collection mutable.
        self.sow(ATTENTION_OUTPUTS, "out", out, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        image_out = Linear(cfg.hidden_size, dtype=dtype, plan=self.plan, name="to_out")(out[:, :num_queries])
        if self.context_pre_only:
            return image_out, None
        return image_out, Linear(cfg.hidden_size, dtype=dtype, plan=self.plan, name="add_out")(out[:, num_queries:])


class ImageAttention(nn.Module):
    """The second attention of dual layers, over the image tokens only."""

    config: MMDiTConfig
    dtype: DTypeLike
    plan: Plan

    @nn.compact
    def __call__(self, image: jax.Array, mask: Mask, num_queries: int) -> jax.Array:
        """Image [B, N, D] -> [B, num_queries, D]."""
        cfg, dtype = self.config, self.dtype
        image = image.astype(dtype)
        query = _heads(self, image[:, :num_queries], "to_q", "norm_q")
        key = _heads(self, image, "to_k", "norm_k")
        value = _heads(self, image, "to_v")
        out = attention(query, key, value, **mask, plan=self.plan)
        out = rearrange(out, "b n h d -> b n (h d)")
        return Linear(cfg.hidden_size, dtype=dtype, plan=self.plan, name="to_out")(out)


class FeedForward(nn.Module):
    """Two linear layers with GELU (tanh) between, four times as wide inside."""

    dtype: DTypeLike
    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = Linear(4 * x.shape[-1], dtype=self.dtype, plan=self.plan, saved_as=INNER, name="fc1")(x)
        hidden = nn.gelu(inner, approximate=True)
        return Linear(x.shape[-1], dtype=self.dtype, plan=self.plan, saved_as=KEPT, name="fc2")(hidden)


class MMDiTBlock(nn.Module):
    """One layer. Streams are held in ``dtype``; norms, modulation and residual sums are float32.

    The last layer (``context_pre_only``) updates only the first ``num_targets`` image tokens, as nothing reads the
    others.
    """

    config: MMDiTConfig
    dual: bool
    context_pre_only: bool
    num_targets: int
    dtype: DTypeLike
    plan: Plan

    @nn.compact
    def __call__(
        self, streams: tuple[jax.Array, jax.Array], conditioning: jax.Array, joint_mask: Mask, image_mask: Mask
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """One layer as a step of ``nn.scan``.

        Args:
          streams: image [B, N, D] and context [B, L, D].
          conditioning: [B, D], timestep and pooled condition after SiLU.
          joint_mask: over the keys of the joint attention, image then context.
          image_mask: over the image tokens.
        """
        image, context = streams
        num_queries = self.num_targets if self.context_pre_only else image.shape[1]
        rows = self.plan.token_rows

        def norm(x: jax.Array) -> jax.Array:
            return rows(layer_norm(rows(x), EPS))

        def modulations(name: str, chunks: int) -> list[jax.Array]:
            x = Linear(chunks * conditioning.shape[-1], dtype=self.dtype, name=name)(conditioning)
            x = self.plan.shard_tokens(x.astype(jnp.float32)[:, None])
            return jnp.split(x, chunks, axis=-1)

        def feed_forward(name: str, x: jax.Array, modulation: Modulation) -> jax.Array:
            y = FeedForward(self.dtype, self.plan, name=name)(modulate(norm(x), modulation.shift, modulation.scale))
            return rows(x + modulation.gate * rows(y)).astype(self.dtype)

        chunks = modulations("norm1", 9 if self.dual else 6)
        attn, mlp, *attn2 = (Modulation(*chunks[i : i + 3]) for i in range(0, len(chunks), 3))
        normed = norm(image)
        if self.context_pre_only:
            context_scale, context_shift = modulations("norm1_context", 2)
        else:
            chunks = modulations("norm1_context", 6)
            context_attn, context_mlp = Modulation(*chunks[:3]), Modulation(*chunks[3:])
            context_shift, context_scale, _ = context_attn

        joint_attention = JointAttention(self.config, self.context_pre_only, self.dtype, self.plan, name="attn")
        attended, context_attended = joint_attention(
            modulate(normed, attn.shift, attn.scale),
            modulate(norm(context), context_shift, context_scale),
            joint_mask,
            num_queries,
        )
        updated = image[:, :num_queries] + attn.gate * rows(attended)
        for second in attn2:  # of dual layers
            image_attention = ImageAttention(self.config, self.dtype, self.plan, name="attn2")
            attended = image_attention(modulate(normed, second.shift, second.scale), image_mask, num_queries)
            updated = updated + second.gate * rows(attended)
        updated = feed_forward("ff", updated.astype(self.dtype), mlp)
        image = jnp.concatenate([updated, image[:, num_queries:]], axis=1)

        if context_attended is not None:
            context = (context + context_attn.gate * rows(context_attended)).astype(self.dtype)
            context = feed_forward("ff_context", context, context_mlp)
        return (image, context), None
