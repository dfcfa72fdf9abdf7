"""The stacked channel bridge (paper, section 3.1): think tokens, projector, connector, output heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike

from deepgen_jax.config import BridgeConfig
from deepgen_jax.models.attention import attention
from deepgen_jax.models.layers import INNER, LayerNorm, Linear
from deepgen_jax.models.plan import Plan
from deepgen_jax.models.stack import Remat, is_unstacked, rematerialised, repeated, scanned


class ConnectorLayer(nn.Module):
    """Pre-norm encoder layer of the SigLIP kind: bidirectional attention, GELU-tanh MLP, biases everywhere."""

    config: BridgeConfig
    dtype: DTypeLike
    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array) -> tuple[jax.Array, None]:
        cfg = self.config

        def heads(name: str, h: jax.Array) -> jax.Array:
            y = Linear(cfg.hidden_size, dtype=self.dtype, plan=self.plan, name=name)(h)
            return rearrange(y, "b l (h d) -> b l h d", h=cfg.num_heads)

        h = LayerNorm(cfg.layer_norm_eps, self.dtype, name="norm1")(x)
        query, key, value = (heads(name, h) for name in ("q_proj", "k_proj", "v_proj"))
        h = attention(query, key, value, key_mask=visible, plan=self.plan)
        h = Linear(cfg.hidden_size, dtype=self.dtype, plan=self.plan, name="out_proj")(h.reshape(x.shape))
        x = self.plan.shard_tokens(x + h)

        h = LayerNorm(cfg.layer_norm_eps, self.dtype, name="norm2")(x)
        h = Linear(cfg.intermediate_size, dtype=self.dtype, plan=self.plan, saved_as=INNER, name="fc1")(h)
        h = nn.gelu(h, approximate=True)
        h = Linear(cfg.hidden_size, dtype=self.dtype, plan=self.plan, name="fc2")(h)
        return self.plan.shard_tokens(x + h), None


class Bridge(nn.Module):
    """Selected hidden states of the VLM -> pooled and sequence condition of the MMDiT.

    Both output heads start at zero, so training starts from the unconditional MMDiT.

    Attributes:
      config: sizes of the connector, whose width need not be the language model's.
      text_dim: hidden size of the language model, which is the width of think tokens and of each selected state.
      pooled_dim: width of the pooled condition.
      sequence_dim: width of the sequence condition.
      dtype: of the computation.
    """

    config: BridgeConfig
    text_dim: int
    pooled_dim: int
    sequence_dim: int
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    plan: Plan = Plan()

    def setup(self) -> None:
        cfg = self.config
        if cfg.num_queries:
            init = nn.initializers.normal(self.text_dim**-0.5)
            self.meta_queries = self.param("meta_queries", init, (cfg.num_queries, self.text_dim))
        self.projector_in = Linear(cfg.hidden_size, dtype=self.dtype, plan=self.plan)
        zeros = nn.initializers.zeros
        self.projector_pooled = Linear(self.pooled_dim, dtype=self.dtype, kernel_init=zeros, plan=self.plan)
        self.projector_sequence = Linear(self.sequence_dim, dtype=self.dtype, kernel_init=zeros, plan=self.plan)
        layer: Any = ConnectorLayer
        if is_unstacked(self, "layers"):
            layer = scanned(rematerialised(layer, self.remat), cfg.num_layers, 1, unrolled=True)
        self.layers = layer(cfg, self.dtype, self.plan)

    def append_think_tokens(self, embeddings: jax.Array) -> jax.Array:
        """[B, L, text_dim] -> [B, L + num_queries, text_dim]."""
        if not self.config.num_queries:
            return embeddings
        shape = (embeddings.shape[0], *self.meta_queries.shape)
        think = jnp.broadcast_to(self.meta_queries.astype(embeddings.dtype), shape)
        return jnp.concatenate([embeddings, think], axis=1)

    def connect(self, hidden_states: jax.Array, visible: jax.Array) -> jax.Array:
        """Stacks selected states [n, B, L, text_dim] on channels, projects and encodes them: [B, L, hidden_size]."""
        return self._connect([hidden_states], [visible])[0]

    def _connect(self, hidden_states: Sequence[jax.Array], visible: Sequence[jax.Array]) -> Sequence[jax.Array]:
        """:meth:`connect` of several batches."""
        projected = [self.projector_in(rearrange(x, "n b l d -> b l (n d)")) for x in hidden_states]
        if is_unstacked(self, "layers"):
            return [self.layers(x, mask)[0] for x, mask in zip(projected, visible, strict=True)]
        inputs = [(mask,) for mask in visible]
        out: Sequence[jax.Array] = repeated(self.layers, self.config.num_layers, self.remat, projected, inputs)
        return out

    def __call__(self, hidden_states: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Condition of a batch of prompts.

        Args:
          hidden_states: [n, B, L, text_dim], deepest first.
          visible: [B, L] bool, True on tokens that the result may depend on (padding included where it is visible).

        Returns:
          pooled [B, pooled_dim], the mean over visible tokens projected, and sequence [B, L, sequence_dim].
        """
        return self.together([hidden_states], [visible])[0]

    def together(
        self, hidden_states: Sequence[jax.Array], visible: Sequence[jax.Array]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Conditions of several batches, such as of two tasks, which may differ in their sizes."""
        found = []
        for x, mask in zip(self._connect(hidden_states, visible), visible, strict=True):
            weight = mask[..., None].astype(jnp.float32)
            mean = jnp.sum(x.astype(jnp.float32) * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1)
            found.append((self.projector_pooled(mean), self.projector_sequence(x)))
        return found
