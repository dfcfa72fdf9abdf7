"""Layers shared by every part: Linear and Embedding with optional adapters, norms in float32.

Parameters may be stored in any dtype; ``dtype`` is the dtype of the computation. Norm statistics are always
float32. With ``dtype=float32`` products run at full precision on every platform.

Adapters (LoRA) live in the variable collection ``"lora"``, a tree with the same paths as ``"params"``: where it holds
``{"a", "b"}`` at a layer's path, the layer adds ``x @ a @ b``. Any scale is already folded into ``b`` (see
``deepgen_jax.models.lora.scaled``). Dropout is in what adapters read, not in ``x``: see :func:`adapter_input`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from deepgen_jax.models import quantized
from deepgen_jax.models.packing import unpacked
from deepgen_jax.models.plan import Plan

LORA = "lora"
# Names of activations that rematerialisation may keep (`deepgen_jax.models.stack.rematerialised`): what even "full"
# keeps, as it is small and takes long to compute; results of flash attention on TPUs; inner activations of feed-forward
# layers; results of other layers.
KEPT, FLASH_RESULTS, INNER, PRODUCT = "kept", "flash_results", "inner", "product"


def precision_of(dtype: DTypeLike) -> jax.lax.Precision:
    """Full-precision products for float32, the platform's native ones otherwise."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def adapter_input(module: nn.Module, x: jax.Array, dropout: float) -> jax.Array:
    """Input of the adapters of layers that read ``x``: ``x`` after dropout.

    Layers that read the same share one draw, where PEFT draws for each: an adapter sees the same either way, and a
    layer of the language model writes and reads 4 masked arrays in place of 7.

    Args:
      module: whose ``"dropout"`` RNG is drawn from; without one nothing is dropped.
      x: input of the layers.
      dropout: share of the elements that are dropped, at least 0 and below 1.
    """
    if dropout == 0 or not module.has_rng("dropout"):
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - dropout, x.shape)
    return jnp.where(keep, x / (1 - dropout), 0)


def _product(module: Linear, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ kernel`` in the layer's dtype, or as the scale beside an 8-bit kernel says (`models.quantized`)."""
    precision = precision_of(module.dtype)
    for name in (quantized.WEIGHT_SCALE, quantized.PRODUCT_SCALE):
        if module.has_variable("params", name):
            scale: jax.Array = module.get_variable("params", name)
            products = name == quantized.PRODUCT_SCALE
            return quantized.matmul(x, kernel, scale, module.dtype, precision, products=products)
    return jnp.matmul(x, kernel.astype(module.dtype), precision=precision)


def parameter(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Any:
    """``module.param``, which traces ``init`` again even where the parameter exists: a fifth of all tracing time."""
    if module.has_variable("params", name):
        value: Any = module.get_variable("params", name)
        if jnp.shape(value) == shape:
            return value
    # Makes the parameter, or raises the error of a wrong shape.
    return module.param(name, init, shape)


class Linear(nn.Module):
    """``x @ kernel + bias`` over the last axis: [..., in] -> [..., features].

    Attributes:
      features: width of the result.
      use_bias: add a bias.
      dtype: of the computation.
      kernel_init: initialiser of the kernel.
      plan: whose :meth:`Plan.matrix` arranges what the layer reads.
      saved_as: name of the result for rematerialisation.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    plan: Plan = Plan()
    saved_as: str = PRODUCT

    @nn.compact
    def __call__(self, x: jax.Array, for_adapter: jax.Array | None = None) -> jax.Array:
        """``for_adapter``, of the shape of ``x``, is what the layer's adapter reads in its place."""
        kernel = unpacked(parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features)))
        leading = x.shape[:-1]
        x = self.plan.matrix(x.astype(self.dtype))
        y = _product(self, x, kernel)
        if self.has_variable(LORA, "a"):
            a: jax.Array = self.get_variable(LORA, "a").astype(self.dtype)
            b: jax.Array = self.get_variable(LORA, "b").astype(self.dtype)
            read = x if for_adapter is None else self.plan.matrix(for_adapter.astype(self.dtype))
            low = checkpoint_name(jnp.matmul(read, a, precision=precision_of(self.dtype)), KEPT)
            y = y + jnp.matmul(low, b, precision=precision_of(self.dtype))
        if self.use_bias:
            y = y + parameter(self, "bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return checkpoint_name(y.reshape(*leading, self.features), self.saved_as)


class Embedding(nn.Module):
    """Rows of a table: ids [...] int32 -> [..., features]."""

    num_embeddings: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        table = parameter(self, "embedding", init, (self.num_embeddings, self.features))
        y = jnp.take(table, ids, axis=0)
        if self.has_variable("params", quantized.WEIGHT_SCALE):
            rows = jnp.take(self.get_variable("params", quantized.WEIGHT_SCALE), ids, axis=0)
            y = y.astype(jnp.float32) * rows[..., None]
        y = y.astype(self.dtype)
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
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
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
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        return (layer_norm(x, self.eps) * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)
