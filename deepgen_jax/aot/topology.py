"""Devices that are not there: TPU slices and GPU clusters that programs can be compiled for, and what they can do."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from deepgen_jax.errors import DeepGenError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device as JAX sees it; all rates are the vendor's, per second.

    Attributes:
      name: for people.
      memory: bytes that a program may use, as the compiler reports the limit.
      peak_flops: dense bfloat16 operations.
      memory_bandwidth: bytes between HBM and the core.
      link_bandwidth: bytes one way through one link between neighbours (TPU), or into one device from the others of its
        host (GPU).
      network_bandwidth: bytes into one device from other slices (TPU) or other hosts (GPU).
      torus: sizes at which a dimension of a slice is a ring; a shorter one is a line. Empty on GPUs.
      options: for the compiler, where its defaults lose time; runs set them, too (`deepgen_jax.parallel.jit_options`).
      ahead_options: more of them, for programs that gather ahead (`deepgen_jax.parallel.jit_options`).
      deviceless: options that compiling without the device needs.
    """

    name: str
    memory: float
    peak_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    torus: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    ahead_options: tuple[tuple[str, Any], ...] = ()
    deviceless: tuple[tuple[str, Any], ...] = ()

    def options_of(self, gathers_ahead: bool) -> dict[str, Any]:
        """Of a program, which gathers ahead or does not."""
        return dict(self.options + (self.ahead_options if gathers_ahead else ()))


# Products whole: cut into steps that pass pieces from chip to chip, as libtpu prefers on small slices, stage 2 on
# v6e:2x4 and v5e:4x4 counts 1.4 to 1.5 times the arithmetic and is estimated to take 1.6 to 2.4 times as long.
_WHOLE_PRODUCTS = (("xla_jf_spmd_threshold_for_windowed_einsum_mib", 1_000_000),)
# Collectives run beside the products: on v6e on the SparseCores, on v5e within fused loops.
_ON_SPARSE_CORES = tuple(
    (f"xla_{name}", True)
    for name in (
        "enable_async_all_gather",
        "tpu_enable_sparse_core_collective_offload_all_gather",
        "tpu_enable_sparse_core_collective_offload_all_reduce",
        "tpu_enable_sparse_core_collective_offload_reduce_scatter",
        "tpu_use_tc_device_shape_on_sc",
        "sc_disable_megacore_partitioning",
    )
)

# Of layers in a loop: the gradients of one are reduced over "data" beside the backward pass of the next. And no
# products merged that would need their weights joined in memory first, as those of adapters with the weights' own.
_GPU_LOOPS = (("xla_gpu_enable_pipelined_all_reduce", True), ("xla_gpu_dot_merger_threshold_mb", 0))
# Weights of several products are gathered one after another, not each only when the one before is used.
_GPU_AHEAD = (
    ("xla_gpu_enable_latency_hiding_scheduler", True),
    ("xla_gpu_experimental_parallel_collective_overlap_limit", 4),
)

#: What JAX takes of a GPU's memory when a command starts, in the place of its own three quarters.
GPU_MEMORY_SHARE = 0.95

# TPU: cloud.google.com/tpu/docs/{v5e,v5p,v6e} (peak arithmetic, HBM, the interconnect's total per chip: 400, 1200 and
# 800 GB/s both ways over 4, 6 and 4 links; data-centre network per chip: 25, 50 and 100 Gbit/s). HBM is what libtpu
# leaves to programs. A v5e or v6e dimension closes to a ring at 16 chips, a v5p one at 4 and above.
# H100 SXM: NVIDIA's data sheet; NVLink 900 GB/s both ways; one 400 Gbit/s InfiniBand port a GPU. The device
# description tells of 79.1 GiB, of which JAX gets what the command line has it take.
CHIPS = {
    "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 819e9, 50e9, 3.125e9, (16,), _WHOLE_PRODUCTS),
    "v5p": Chip("TPU v5p", 95.74 * GIB, 459e12, 2765e9, 100e9, 6.25e9, (4, 8, 12, 16, 20, 24), _WHOLE_PRODUCTS),
    "v6e": Chip("TPU v6e", 31.24 * GIB, 918e12, 1640e9, 100e9, 12.5e9, (16,), _WHOLE_PRODUCTS + _ON_SPARSE_CORES),
    "h100": Chip(
        "H100 SXM", GPU_MEMORY_SHARE * 84942979072, 989e12, 3352e9, 450e9, 50e9, options=_GPU_LOOPS,
        ahead_options=_GPU_AHEAD,
        deviceless=(("xla_gpu_enable_triton_gemm", False),),
    ),
}  # fmt: skip
#: GPUs of one host.
GPUS_A_HOST = 8
_TARGETS = {"h100": "h100_sxm.txtpb"}


@dataclass(frozen=True)
class Topology:
    """A slice, several slices or a cluster, by name.

    Attributes:
      name: as it was asked for, such as "v6e:8x8" or "h100:64".
      kind: key of :data:`CHIPS`.
      shape: chips along each dimension of one slice; () for GPUs.
      slices: joined by the data-centre network; 1 for GPUs.
      size: devices in all.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int
    size: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    def options(self, gathers_ahead: bool) -> dict[str, Any]:
        """For the compiler of a program, which gathers ahead or does not."""
        return self.chip.options_of(gathers_ahead) | dict(self.chip.deviceless)

    @property
    def gpu(self) -> bool:
        return self.kind in _TARGETS

    @property
    def sort(self) -> str:
        """What these devices are called."""
        return "GPUs" if self.gpu else "chips"

    def __str__(self) -> str:
        slices = f" x {self.slices} slices" if self.slices > 1 else ""
        return f"{self.name}{slices} ({self.size} {self.sort})"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """A topology of ``KIND:SHAPE`` (TPU) or ``KIND:NUMBER`` (GPU).

    Raises:
      DeepGenError: an unknown kind, or a shape that it does not come in.
    """
    kind, _, rest = text.strip().lower().partition(":")
    if kind not in CHIPS:
        raise DeepGenError(f"topology {text!r}: {kind!r} is unknown; choose one of {', '.join(CHIPS)}, as in v6e:8x8")
    if slices < 1:
        raise DeepGenError(f"--slices is {slices}; it must be at least 1")
    if kind in _TARGETS:
        if not rest.isdecimal() or int(rest) < 1 or (int(rest) > GPUS_A_HOST and int(rest) % GPUS_A_HOST):
            raise DeepGenError(
                f"topology {text!r}: {rest!r} is no number of GPUs; write 1 to {GPUS_A_HOST}, or a multiple of "
                f"{GPUS_A_HOST}, as in {kind}:64"
            )
        if slices > 1:
            raise DeepGenError(f"--slices is for TPUs; name all GPUs at once, as in {kind}:{int(rest) * slices}")
        return Topology(text, kind, (), 1, int(rest))
    dimensions = 3 if kind == "v5p" else 2
    sample = "x".join(["4"] * dimensions)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", rest) or rest.count("x") != dimensions - 1:
        raise DeepGenError(f"topology {text!r}: {kind} slices have {dimensions} dimensions, as in {kind}:{sample}")
    shape = tuple(map(int, rest.split("x")))
    return Topology(text, kind, shape, slices, slices * math.prod(shape))


def prepare(topology: Topology) -> None:
    """Sets what JAX and the compilers' plugins read as they start; call it before JAX is imported.

    Raises:
      DeepGenError: the compiler for these devices is not installed.
    """
    plugin, extra = ("jax_cuda12_plugin", "cuda") if topology.gpu else ("libtpu", "tpu")
    if importlib.util.find_spec(plugin) is None:
        raise DeepGenError(f"compiling for {topology.name} needs {plugin}; run pip install 'deepgen-jax[{extra}]'")
    os.environ["JAX_PLATFORMS"] = "cpu"
    # The compiler's warnings would stand between the lines of the report.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not topology.gpu:
        # libtpu asks these of a TPU VM's metadata server when nobody tells it; any will do, none of it is compiled in.
        os.environ.update(
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            TPU_ACCELERATOR_TYPE="v5litepod-16",
            TPU_WORKER_HOSTNAMES="localhost",
            TPU_WORKER_ID="0",
            TPU_SKIP_MDS_QUERY="1",
        )


def describe(topology: Topology) -> Sequence[Any]:
    """The devices, for meshes; after :func:`prepare`.

    Raises:
      DeepGenError: the compiler does not know such a topology.
    """
    from jax.experimental import topologies

    try:
        if topology.gpu:
            target = resources.files("deepgen_jax.aot").joinpath("targets", _TARGETS[topology.kind]).read_text()
            hosts, each = max(topology.size // GPUS_A_HOST, 1), min(topology.size, GPUS_A_HOST)
            found = topologies.get_topology_desc(
                "", platform="cuda", topology=f"1x{hosts}x{each}", target_config=target
            )
        else:
            options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
            if math.prod(topology.shape) < 4:
                options["chips_per_host_bounds"] = [*topology.shape, *[1] * (3 - len(topology.shape))]
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DeepGenError(f"topology {topology.name!r} cannot be compiled for: {reason}") from error
    return found.devices
