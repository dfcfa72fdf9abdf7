"""Layers shared by every part: Linear and Embedding with optional adapters, norms in float32.

Parameters may be stored in any dtype; ``dtype`` is the dtype of the computation. Norm statistics are always
float32. With ``dtype=float32`` products run at full precision on every platform.

Adapters (LoRA) live in the variable collection ``"lora"``, a tree with the same paths as ``"params"``: where it holds
``{"a", "b"}`` at a layer's path, the layer adds ``dropout(x) @ a @ b``. Any scale is already folded into ``b`` (see
``deepgen_jax.models.lora.scaled``).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

LORA = "lora"


def precision_of(dtype: DTypeLike) -> jax.lax.Precision:
    """Full-precision products for float32, the platform's native ones otherwise."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


class Linear(nn.Module):
    """``x @ kernel + bias`` over the last axis: [..., in] -> [..., features].

    ``lora_dropout`` drops elements of the adapter's input; it needs a ``"dropout"`` RNG and is off without one.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = jnp.matmul(x, kernel.astype(self.dtype), precision=precision_of(self.dtype))
        if self.has_variable(LORA, "a"):
            a: jax.Array = self.get_variable(LORA, "a").astype(self.dtype)
            b: jax.Array = self.get_variable(LORA, "b").astype(self.dtype)
            if self.lora_dropout > 0 and self.has_rng("dropout"):
                keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.lora_dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.lora_dropout), 0)
            low = jnp.matmul(x, a, precision=precision_of(self.dtype))
            y = y + jnp.matmul(low, b, precision=precision_of(self.dtype))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class Embedding(nn.Module):
    """Rows of a table: ids [...] int32 -> [..., features]."""

    num_embeddings: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        table = self.param("embedding", init, (self.num_embeddings, self.features))
        y = jnp.take(table, ids, axis=0).astype(self.dtype)
        if self.has_variable(LORA, "a"):
            low = jnp.take(self.get_variable(LORA, "a"), ids, axis=0).astype(self.dtype)
            b: jax.Array = self.get_variable(LORA, "b").astype(self.dtype)
            y = y + jnp.matmul(low, b, precision=precision_of(self.dtype))
        return y


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, statistics in float32."""

    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale.astype(jnp.float32)).astype(self.dtype)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """Parameter-free layer norm over the last axis, computed and returned in float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class LayerNorm(nn.Module):
    """Layer norm with scale and bias, statistics in float32."""

    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return (layer_norm(x, self.eps) * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)
