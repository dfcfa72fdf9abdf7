"""bfloat16 kernels stored as 16-bit integers, so that programs on CPUs hold no float32 copy of them.

XLA's CPU compiler does not slice bfloat16 arrays: where a loop takes a layer's weights out of a stack, it converts the
whole stack to float32 first, twice the size of the weights. Integers are sliced as they are, and one layer at a time is
converted.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_PACKED = jnp.uint16


def pack_kernels(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with every bfloat16 kernel of `layers.Linear` as uint16, which it reads; given arrays are donated."""

    def packed(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if path[0].key == "vae" or path[-1].key != "kernel" or leaf.dtype != jnp.bfloat16:  # it has convolutions
            return leaf
        return _as_integers(leaf)

    return jax.tree_util.tree_map_with_path(packed, params)


def unpacked(kernel: jax.Array) -> jax.Array:
    """The bfloat16 values of a packed kernel; any other array as it is."""
    return jax.lax.bitcast_convert_type(kernel, jnp.bfloat16) if kernel.dtype == _PACKED else kernel


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, _PACKED)


_as_integers = jax.jit(_bits, donate_argnums=0)
