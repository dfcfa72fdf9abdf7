"""The Qwen2.5-VL language model up to the hidden states that DeepGen reads.

With ``h_0`` the embeddings and ``h_i`` the output of i decoder layers, DeepGen reads ``h_{L-1}, h_{L-7}, ...``. The
last decoder layer, the final norm and the LM head are not part of this module.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from deepgen_jax.config import TextConfig
from deepgen_jax.models.attention import attention
from deepgen_jax.models.layers import INNER, PRODUCT, Embedding, Linear, RMSNorm, adapter_input
from deepgen_jax.models.plan import Plan
from deepgen_jax.models.rope import mrope_angles, rotate
from deepgen_jax.models.stack import Remat, is_unstacked, rematerialised, scanned, scanned_groups


def selected_layers(num_layers: int, stride: int) -> tuple[int, ...]:
    """Indices of the hidden states that are read, deepest first: L-1, L-1-stride, ... > 0."""
    return tuple(range(num_layers - 1, 0, -stride))


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer with grouped-query attention and a SiLU-gated MLP."""

    config: TextConfig
    dtype: DTypeLike
    plan: Plan
    lora_dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Hidden state [B, L, hidden] after this layer, as carry and as output of the scan."""
        cfg = self.config

        def linear(name: str, features: int, bias: bool = False, saved_as: str = PRODUCT) -> Linear:
            return Linear(features, bias, self.dtype, plan=self.plan, saved_as=saved_as, name=name)

        def with_dropout(h: jax.Array) -> tuple[jax.Array, jax.Array]:
            return h, adapter_input(self, h, self.lora_dropout)

        def heads(y: jax.Array, count: int) -> jax.Array:
            return y.reshape(*y.shape[:-1], count, cfg.head_dim)

        h = with_dropout(RMSNorm(cfg.rms_norm_eps, self.dtype, name="input_norm")(x))
        query = rotate(heads(linear("q_proj", cfg.hidden_size, True)(*h), cfg.num_heads), angles)
        key = rotate(heads(linear("k_proj", cfg.num_kv_heads * cfg.head_dim, True)(*h), cfg.num_kv_heads), angles)
        value = heads(linear("v_proj", cfg.num_kv_heads * cfg.head_dim, True)(*h), cfg.num_kv_heads)
        attended = attention(query, key, value, key_mask=mask, causal=True, plan=self.plan)
        attended = linear("o_proj", cfg.hidden_size)(*with_dropout(attended.reshape(x.shape)))
        x = self.plan.shard_tokens(x + attended)

        h = with_dropout(RMSNorm(cfg.rms_norm_eps, self.dtype, name="post_attention_norm")(x))
        gate = nn.silu(linear("gate_proj", cfg.intermediate_size, saved_as=INNER)(*h))
        gated = gate * linear("up_proj", cfg.intermediate_size, saved_as=INNER)(*h)
        x = self.plan.shard_tokens(x + linear("down_proj", cfg.hidden_size)(*with_dropout(gated)))
        return x, x


class QwenText(nn.Module):
    """Token embeddings and decoder layers 1 .. L-1."""

    config: TextConfig
    stride: int = 6
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    plan: Plan = Plan()
    lora_dropout: float = 0.0

    def setup(self) -> None:
        cfg = self.config
        if cfg.num_layers < 2:
            raise ValueError(f"text.num_layers is {cfg.num_layers}, but hidden states need at least 2 layers")
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, self.dtype)
        options = (cfg, self.dtype, self.plan, self.lora_dropout)
        first = selected_layers(cfg.num_layers, self.stride)[-1]
        layer = rematerialised(DecoderLayer, self.remat)
        self.first_layers = scanned(layer, first, 2, unrolled=is_unstacked(self, "first_layers"))(*options)
        groups = (cfg.num_layers - 1 - first) // self.stride
        unrolled = is_unstacked(self, "layer_groups")
        grouped = scanned_groups(layer, groups, self.stride, 2, init=self.is_initializing(), unrolled=unrolled)
        self.layer_groups = grouped(*options) if groups else None

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Token ids [B, L] int32 -> [B, L, hidden]."""
        return self.embed_tokens(input_ids)

    def __call__(self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        """Runs the decoder.

        Args:
          embeddings: [B, L, hidden] of left-padded prompts with think tokens at the end.
          positions: [3, B, L] int32 M-RoPE indices.
          mask: [B, L] bool, True on real tokens. Padding is not attended, and attention is zero at padded queries.

        Returns:
          [n, B, L, hidden], the selected hidden states, deepest first.
        """
        cfg = self.config
        angles = mrope_angles(positions, cfg.head_dim, cfg.rope_theta, cfg.mrope_sections)
        x, _ = self.first_layers(embeddings, angles, mask)
        selected = x[None]
        if self.layer_groups is not None:
            _, deeper = self.layer_groups(x, angles, mask)
            selected = jnp.concatenate([selected, deeper[self.stride - 1 :: self.stride]])
        return selected[::-1]
