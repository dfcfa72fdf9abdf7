"""Stores bfloat16 kernels as 16-bit integers, to avoid float32 copies on CPUs.

XLA's CPU compiler does not slice bfloat16 arrays: a loop over stacked layers first converts the whole stack to float32,
twice the size of the weights. Integers are sliced directly, and converted one layer at a time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_PACKED = jnp.uint16


def pack_kernels(params: dict[str, Any]) -> dict[str, Any]:
    """Packs every bfloat16 kernel of `layers.Linear` as uint16; donates the inputs."""

    def packed(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if path[0].key == "vae" or path[-1].key != "kernel" or leaf.dtype != jnp.bfloat16:  # the VAE has convolutions
            return leaf
        return _as_integers(leaf)

    return jax.tree_util.tree_map_with_path(packed, params)


def unpacked(kernel: jax.Array) -> jax.Array:
    """The bfloat16 values of a packed kernel; other arrays unchanged."""
    return jax.lax.bitcast_convert_type(kernel, jnp.bfloat16) if kernel.dtype == _PACKED else kernel


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, _PACKED)


_as_integers = jax.jit(_bits, donate_argnums=0)
