"""Execution plan of a network: its attention kernel, and how activations are laid out in memory and over a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from deepgen_jax.parallel.mesh import BATCH_AXES, batch_size_multiple

#: Implementations of attention; see :func:`deepgen_jax.models.attention.attention`.
Kernel = Literal["xla", "loop", "cudnn", "splash"]


@dataclass(frozen=True)
class Plan:
    """Execution plan of a network; affects rounding and speed, not results.

    Attributes:
      kernel: of the attention.
      mesh: over which attention and activations are split explicitly; None for a single device. Without constraints the
        compiler lets some activations follow the layout of the weights.
    """

    kernel: Kernel = "xla"
    mesh: Mesh | None = None

    def tensor_axis(self, size: int) -> Literal["tensor"] | None:
        """The "tensor" axis where it divides a dimension of ``size`` heads or tokens."""
        parts = self.mesh.shape["tensor"] if self.mesh else 1
        return "tensor" if parts > 1 and size % parts == 0 else None

    def shard_tokens(self, x: jax.Array) -> jax.Array:
        """Splits the tokens of ``x`` [B, N, D] over the "tensor" axis, if there is one that divides them.

        This is sequence parallelism (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
        Models", section 4.2.2): norms, residual sums and what the backward pass keeps are split as the products between
        them are, and an all-gather and a reduce-scatter replace each all-reduce. Without the constraint the
        partitioner of jax 0.10.2 also computes wrong velocities on ``data=2,fsdp=2,tensor=2``.
        """
        if self.mesh is None or self.mesh.shape["tensor"] == 1:
            return x
        spec = self._spec(x)
        return x if spec is None else jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def token_rows(self, x: jax.Array) -> jax.Array:
        """:meth:`shard_tokens`; on GPUs also with the channels of each token contiguous, in the gradient, too.

        Gradients of modulation, gates and biases are sums over tokens, for which XLA on GPUs makes tokens the
        fastest-varying dimension. Elementwise operations follow, and as norms are sums over channels, each
        transposition would write a float32 array. Other compilers choose well.
        """
        return self.row_major(x) if self.kernel == "cudnn" else self.shard_tokens(x)

    def matrix(self, x: jax.Array) -> jax.Array:
        """What a linear layer reads, ``x`` [..., D]: on a single CPU device as a matrix [N, D], elsewhere as it is.

        The gradient of its kernel is a sum over samples and tokens. Over two dimensions, XLA on CPUs writes a
        transposed copy of the gradient of the output and multiplies at 0.6 to 0.85 times its usual rate.
        """
        return x.reshape(-1, x.shape[-1]) if self.kernel == "loop" else x

    def head_rows(self, x: jax.Array) -> jax.Array:
        """``x`` [B, N, H, D]; for splash attention laid out as [B, H, N, D], which the kernel reads.

        Norms of queries and keys are sums over the channels of a head, for which XLA on TPUs would write float32 arrays
        in other layouts before and after.
        """
        if self.kernel != "splash":
            return x
        return self.row_major(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)

    def row_major(self, x: jax.Array) -> jax.Array:
        """Tokens [B, N, D] or heads [B, H, N, D], in row-major order on each device."""
        if self.mesh is None:
            return _row_major(x)
        spec = self._spec(x)
        if spec is None:
            return x
        # The partitioner does not split an array under a layout constraint, so each device constrains its own shard.
        return jax.shard_map(_row_major, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)

    def _spec(self, x: jax.Array) -> PartitionSpec | None:
        """Samples over the batch axes, the second dimension over "tensor"; None if samples do not divide."""
        assert self.mesh is not None
        if x.shape[0] % batch_size_multiple(self.mesh):
            return None
        return PartitionSpec(BATCH_AXES, self.tensor_axis(x.shape[1]))


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def fastest_plan(mesh: Mesh, dtype: DTypeLike) -> Plan:
    """The plan for programs that run on a mesh in ``dtype``; see :func:`fastest_kernel`."""
    kernel = fastest_kernel(list(mesh.devices.flat), dtype)
    return Plan(kernel, None if mesh.size == 1 else mesh)


def fastest_kernel(devices: Sequence[jax.Device], dtype: DTypeLike) -> Kernel:
    """The attention kernel for programs that run on ``devices`` in ``dtype``.

    "loop" on a single CPU device; in 16-bit types cuDNN flash attention on NVIDIA GPUs and the splash kernel on TPUs;
    "xla" elsewhere.
    """
    if devices[0].platform == "cpu" and len(devices) == 1:
        return "loop"
    if jnp.dtype(dtype).itemsize == 2 and devices[0].platform in ("gpu", "tpu"):
        return "cudnn" if devices[0].platform == "gpu" else "splash"
    return "xla"
