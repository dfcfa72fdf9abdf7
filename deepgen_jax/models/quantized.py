"""8-bit weights and matrix products: symmetric quantisation with a float32 scale per output channel.

A quantised layer stores its kernel as int8 or float8_e4m3fn, with a scale. The scale's name selects the computation:
``weight_scale`` multiplies in the compute dtype (weight-only, half the memory and traffic); ``product_scale`` also
quantises the input per token, so that the product runs on 8-bit units (W8A8). Tables, of embeddings and of positions,
have a scale per row.

We do not use qwix: its interceptors do not see the stacked kernels of `nn.scan` as single layers, and it quantises
after loading. Here model folders store 8 bits, and no 16-bit copy is made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from deepgen_jax.errors import DeepGenError

WEIGHT_SCALE, PRODUCT_SCALE = "weight_scale", "product_scale"
Format = Literal["int8", "fp8"]


class _Type(NamedTuple):
    dtype: Any
    largest: float


#: Storage types and their largest value.
FORMATS: Mapping[str, _Type] = {
    "int8": _Type(np.dtype(np.int8), 127.0),
    "fp8": _Type(np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
}

# Ends of the paths of tables, whose rows are looked up.
_TABLES = ("/embedding", "/pos_embed")
# Sinusoids fill -1..1 evenly: int8 rounds them by at most 0.004, bfloat16 by 0.002, float8 by 0.03.
_INT8_ONLY = ("/pos_embed",)
# Subnormal scales lose precision.
_SMALLEST = np.finfo(np.float32).tiny

#: (pattern, reason) of parameters that keep 16 or 32 bits; the first full match of the path applies.
KEPT: tuple[tuple[str, str], ...] = (
    (r"vae/.*", "80 M parameters, computed in float32: errors show directly in the pixels"),
    (r".*/(scale|bias)", "vectors: no gain"),
    (r"bridge/meta_queries", "think tokens are few, and learned inputs rather than weights"),
    (r"mmdit/(patch_embed|proj_out)/kernel", "input and output of the sampler: 0.2 M parameters"),
    (r"mmdit/(timestep|text)_fc[12]/kernel", "time and pooled embeddings modulate every layer"),
    (r"vision/patch_embed/kernel", "reads pixels: 1.5 M parameters"),
)
#: (pattern, reason) of quantised parameters whose products stay in 16 bits.
WEIGHTS_ONLY: tuple[tuple[str, str], ...] = (
    (r"mmdit/(.*/)?(norm1|norm1_context|norm_out)/kernel", "adaLN shifts and gates scale whole streams"),
    (r"mmdit/context_embedder/kernel", "reads the condition once a step"),
    (r"bridge/projector_\w+/kernel", "condition: computed once an image"),
    (r".*/embed_tokens/embedding|mmdit/pos_embed", "rows are looked up, not multiplied"),
)


def treatment(path: str, products: bool) -> str:
    """Treatment of a parameter: "kept", "weights" (8-bit weights only) or "products" (8-bit products, too).

    Args:
      path: keys joined by slashes, such as "mmdit/blocks_0/attn/to_q/kernel".
      products: quantise products as well as weights.
    """
    if not path.endswith(("/kernel", *_TABLES)) or any(re.fullmatch(pattern, path) for pattern, _ in KEPT):
        return "kept"
    if not products or any(re.fullmatch(pattern, path) for pattern, _ in WEIGHTS_ONLY):
        return "weights"
    return "products"


def is_table(path: str) -> bool:
    """Whether a parameter is a table [rows, D] with a scale per row, not a kernel [..., in, out]."""
    return path.endswith(_TABLES)


def stored_format(path: str, to: Format) -> Format:
    """Storage type of a parameter of a model that is quantised to ``to``: sinusoids are int8 in any case."""
    return "int8" if path.endswith(_INT8_ONLY) else to


def scale_path(path: str, products: bool) -> str:
    """Path of a quantised parameter's scale; its name selects the layer's computation."""
    name = PRODUCT_SCALE if treatment(path, products) == "products" else WEIGHT_SCALE
    return f"{path.rpartition('/')[0]}/{name}"


def scale_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales: kernel [..., in, out] -> [..., out], table [rows, D] -> [rows]."""
    return shape[:-1] if is_table(path) else (*shape[:-2], shape[-1])


def quantize(path: str, value: np.ndarray, to: Format) -> tuple[np.ndarray, np.ndarray]:
    """Quantises a parameter: returns 8-bit values and float32 scales with ``values * scale`` close to ``value``.

    Args:
      path: path of the parameter; distinguishes a kernel [..., in, out] from a table [rows, D].
      value: array of any float dtype.
      to: storage type of the model; see :func:`stored_format`.

    Returns:
      Values with the shape of ``value``, and scales of :func:`scale_shape`. A channel whose scale would be 0 or
      subnormal has scale 1.

    Raises:
      DeepGenError: a value is NaN or infinite.
    """
    to = stored_format(path, to)
    dtype, largest = FORMATS[to]
    axis = -1 if is_table(path) else -2
    values = np.empty(value.shape, dtype)
    scales = np.empty(scale_shape(path, value.shape), np.float32)
    # One matrix at a time: float32 copies of a whole stack take gigabytes.
    for matrix in np.ndindex(value.shape[:-2]):
        exact = value[matrix].astype(np.float32)
        most = np.maximum(exact.max(axis=axis, keepdims=True), -exact.min(axis=axis, keepdims=True))
        if not np.isfinite(most).all():
            raise DeepGenError(f"NaN or infinite weights in {path}; download or train them again")
        scale = most / np.float32(largest)
        scale = np.where(scale >= _SMALLEST, scale, np.float32(1))
        exact /= scale
        if to == "int8":
            np.rint(exact, out=exact)
        # Rounding may exceed the largest value by one part in 10^7.
        np.clip(exact, -largest, largest, out=exact)
        values[matrix], scales[matrix] = exact.astype(dtype), np.squeeze(scale, axis=axis)
    return values, scales


def dequantize(path: str, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns float32 ``values * scale``, the inverse of :func:`quantize` up to rounding."""
    return values.astype(np.float32) * np.expand_dims(scale, -1 if is_table(path) else -2)


def keeps_dtype(path: str, dtype: DTypeLike) -> bool:
    """Whether an array keeps its stored dtype whatever the compute dtype: 8-bit values and their scales."""
    eight_bits = any(jnp.dtype(dtype) == kind.dtype for kind in FORMATS.values())
    return eight_bits or path.rpartition("/")[2] in (WEIGHT_SCALE, PRODUCT_SCALE)


def quantize_tree(params: Mapping[str, Any], to: Format, products: bool, prefix: str = "") -> dict[str, Any]:
    """Quantises kernels and tables of a tree of host arrays or ``ShapeDtypeStruct``, and adds their scales."""
    out: dict[str, Any] = {}
    for name, value in params.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            out[name] = quantize_tree(value, to, products, path)
        elif treatment(path, products) == "kept":
            out[name] = value
        else:
            scale_name = scale_path(path, products).rpartition("/")[2]
            if isinstance(value, jax.ShapeDtypeStruct):
                out[name] = jax.ShapeDtypeStruct(value.shape, FORMATS[stored_format(path, to)].dtype)
                out[scale_name] = jax.ShapeDtypeStruct(scale_shape(path, value.shape), np.float32)
            else:
                out[name], out[scale_name] = quantize(path, np.asarray(value), to)
    return out


def matmul(
    x: jax.Array, kernel: jax.Array, scale: jax.Array, dtype: DTypeLike, precision: Any, *, products: bool
) -> jax.Array:
    """``x @ (kernel * scale)`` over the last axis of ``x``.

    Args:
      x: [..., in] in ``dtype``.
      kernel: int8 or float8_e4m3fn [in, out].
      scale: float32 [out].
      dtype: dtype of the result, and of the product unless it is 8-bit.
      precision: precision of the product unless it is 8-bit.
      products: quantise ``x`` to the kernel's type and multiply in 8 bits; not differentiable in ``x``.
    """
    if not products:
        y = jnp.matmul(x, kernel.astype(dtype), precision=precision)
        return (y.astype(jnp.float32) * scale).astype(dtype)
    integers = jnp.issubdtype(kernel.dtype, jnp.integer)
    largest = FORMATS["int8" if integers else "fp8"].largest
    exact = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(exact), axis=-1, keepdims=True)
    step = most / largest
    step = jnp.where(step >= _SMALLEST, step, 1)
    scaled = jnp.clip(exact / step, -largest, largest)
    rounded = (jnp.rint(scaled) if integers else scaled).astype(kernel.dtype)
    # Pass 8-bit operands: on Hopper, quantise-dequantise pairs before a product make it run in bfloat16.
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    wide = jnp.int32 if integers else jnp.float32
    y = jax.lax.dot_general(rounded, kernel, contract, preferred_element_type=wide)
    return (y.astype(jnp.float32) * step * scale).astype(dtype)
