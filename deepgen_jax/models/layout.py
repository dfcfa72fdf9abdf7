"""How arrays of tokens lie in memory."""

from __future__ import annotations

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from deepgen_jax.models.attention import Attention, Kernel, implementation_of
from deepgen_jax.parallel.mesh import BATCH_AXES, batch_size_multiple


def token_rows(x: jax.Array, attention: Attention) -> jax.Array:
    """``x`` [B, N, D] unchanged, but with each token's channels side by side in memory, and its gradient, too.

    Gradients of modulation, gates and biases are sums over tokens, for which XLA on GPUs lays tokens side by side. All
    that is elementwise follows, and as norms are sums over channels, they would write float32 arrays for every
    transposition. Where attention is not cuDNN's, nothing is done: other compilers choose well.
    """
    if implementation_of(attention) != "cudnn":
        return x
    return laid_out_in_rows(x, attention)


def head_rows(x: jax.Array, attention: Attention) -> jax.Array:
    """``x`` [B, N, H, D] unchanged, but where attention is splash, as that reads it: each head's tokens one by one.

    Norms of queries and keys are sums over a head's channels, for which XLA on TPUs would write float32 arrays in
    layouts of its own, before and after.
    """
    if implementation_of(attention) != "splash":
        return x
    return laid_out_in_rows(x.transpose(0, 2, 1, 3), attention).transpose(0, 2, 1, 3)


def laid_out_in_rows(x: jax.Array, attention: Attention) -> jax.Array:
    """The same on any platform."""
    if not isinstance(attention, Kernel):
        return _pin(x)
    mesh = attention.mesh
    if x.shape[0] % batch_size_multiple(mesh):
        return x
    # The partitioner does not split what is pinned, so each device pins its own samples.
    batch = PartitionSpec(BATCH_AXES)
    return jax.shard_map(_pin, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)(x)


def _pin(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
