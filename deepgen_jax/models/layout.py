"""How arrays of tokens lie in memory, and on the devices of a mesh."""

from __future__ import annotations

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec

from deepgen_jax.models.attention import Attention, Kernel, implementation_of
from deepgen_jax.parallel.mesh import BATCH_AXES, batch_size_multiple


def split_tokens(x: jax.Array, attention: Attention) -> jax.Array:
    """``x`` [B, N, D] unchanged, but on meshes with a "tensor" axis split by tokens over it, where it divides them.

    This is sequence parallelism (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
    Models", section 4.2.2): norms, residual sums and what the backward pass keeps are split as the products between
    them are, and an all-gather and a reduce-scatter take the place of each all-reduce. Told nothing, the partitioner
    of jax 0.10.2 also computes wrong velocities on ``data=2,fsdp=2,tensor=2``.
    """
    if not isinstance(attention, Kernel) or attention.mesh.shape["tensor"] == 1:
        return x
    spec = _split(x, attention)
    return x if spec is None else jax.lax.with_sharding_constraint(x, NamedSharding(attention.mesh, spec))


def token_rows(x: jax.Array, attention: Attention) -> jax.Array:
    """The same, with each token's channels side by side in memory, and its gradient, too.

    Gradients of modulation, gates and biases are sums over tokens, for which XLA on GPUs lays tokens side by side. All
    that is elementwise follows, and as norms are sums over channels, they would write float32 arrays for every
    transposition. Where attention is not cuDNN's, memory is left alone: other compilers choose well.
    """
    if implementation_of(attention) != "cudnn":
        return split_tokens(x, attention)
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
    """The same on any platform, of tokens [B, N, D] or heads [B, H, N, D]."""
    if not isinstance(attention, Kernel):
        return _pin(x)
    spec = _split(x, attention)
    if spec is None:
        return x
    # The partitioner does not split what is pinned, so each device pins its own samples.
    return jax.shard_map(_pin, mesh=attention.mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _split(x: jax.Array, kernel: Kernel) -> PartitionSpec | None:
    """How samples, and tokens or heads, which are the second dimension, lie on a mesh; None: the samples do not."""
    if x.shape[0] % batch_size_multiple(kernel.mesh):
        return None
    return PartitionSpec(BATCH_AXES, kernel.axis_of(x.shape[1]))


def _pin(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
