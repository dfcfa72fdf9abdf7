"""Accelerators: peak rates, memory, links and compiler options; one row a chip. Importing it does not import JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

GIB = 2**30
#: GPUs joined by NVLink in one host.
GPUS_PER_HOST = 8
#: Fraction of GPU memory that JAX preallocates when a command starts, in place of its default of 0.75.
GPU_MEMORY_FRACTION = 0.95

Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Chip:
    """One device as JAX sees it. Rates are the vendor's, per second; 0 where no program is estimated for the chip.

    Attributes:
      name: for reports.
      device_kinds: parts of ``jax.Device.device_kind``; the longest match over all chips counts.
      peak_flops: dense bfloat16 operations.
      memory: bytes that a program may use, as the compiler reports the limit.
      memory_bandwidth: bytes between HBM and the core.
      link_bandwidth: bytes one way through one link between neighbours (TPU), or into one device from the others of its
        host (GPU).
      network_bandwidth: bytes into one device from other slices (TPU) or other hosts (GPU).
      torus: sizes at which a dimension of a slice is a ring; a shorter one is a line. Empty on GPUs.
      options: compiler options for large programs, where the defaults are slow.
      latency_hiding_options: further ones, for programs jitted with ``latency_hiding``
        (`deepgen_jax.parallel.jit_options`).
      deviceless_options: further ones that compiling without the device needs.
      fast_types: element types, in XLA's names, whose products run at twice ``peak_flops``.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    memory: float = 0.0
    memory_bandwidth: float = 0.0
    link_bandwidth: float = 0.0
    network_bandwidth: float = 0.0
    torus: tuple[int, ...] = ()
    options: Options = ()
    latency_hiding_options: Options = ()
    deviceless_options: Options = ()
    fast_types: tuple[str, ...] = ()

    def compiler_options(self, latency_hiding: bool) -> dict[str, Any]:
        """Options for a program on the device."""
        return dict(self.options + (self.latency_hiding_options if latency_hiding else ()))


# No windowed einsum: libtpu's choice for small slices splits products into steps that pass shards from chip to chip.
# Stage 2 on v6e:2x4 and v5e:4x4 then counts 1.4 to 1.5 times the arithmetic, estimated 1.6 to 2.4 times as slow.
_NO_WINDOWED_EINSUM: Options = (("xla_jf_spmd_threshold_for_windowed_einsum_mib", 1_000_000),)
# Collectives overlap with products: on v6e on the SparseCores, on v5e within fused loops.
_SPARSE_CORE_COLLECTIVES: Options = tuple(
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
# In loops over layers, reduce the gradients of one layer over "data" during the backward pass of the next. Do not merge
# products whose weights would first be concatenated in memory, such as those of adapters with the base weights.
_GPU: Options = (("xla_gpu_enable_pipelined_all_reduce", True), ("xla_gpu_dot_merger_threshold_mb", 0))
# Gather the weights of several products at once, not each only when the previous one is used.
_GPU_LATENCY_HIDING: Options = (
    ("xla_gpu_enable_latency_hiding_scheduler", True),
    ("xla_gpu_experimental_parallel_collective_overlap_limit", 4),
)

# TPU: cloud.google.com/tpu/docs/{v5e,v5p,v6e} (peak arithmetic, HBM, the interconnect's total per chip: 400, 1200 and
# 800 GB/s both ways over 4, 6 and 4 links; data-centre network per chip: 25, 50 and 100 Gbit/s). HBM is what libtpu
# leaves to programs. A v5e or v6e dimension closes to a ring at 16 chips, a v5p one at 4 and above.
# GPU: NVIDIA's data sheets; H100 SXM: NVLink 900 GB/s both ways; one 400 Gbit/s InfiniBand port a GPU; its device
# description gives 79.1 GiB, of which JAX preallocates a fraction.
CHIPS: dict[str, Chip] = {
    "v4": Chip("TPU v4", ("TPU v4",), 275e12),
    "v5e": Chip(
        "TPU v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9, (16,), _NO_WINDOWED_EINSUM,
        fast_types=("s8",),
    ),
    "v5p": Chip(
        "TPU v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2765e9, 100e9, 6.25e9, (4, 8, 12, 16, 20, 24),
        _NO_WINDOWED_EINSUM, fast_types=("s8",),
    ),
    "v6e": Chip(
        "TPU v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.24 * GIB, 1640e9, 100e9, 12.5e9, (16,),
        _NO_WINDOWED_EINSUM + _SPARSE_CORE_COLLECTIVES, fast_types=("s8",),
    ),
    "tpu7x": Chip("TPU7x", ("TPU7x",), 2307e12),
    "a100": Chip("A100", ("A100",), 312e12),
    "h100": Chip(
        "H100 SXM", ("H100",), 989e12, GPU_MEMORY_FRACTION * 84942979072, 3352e9, 450e9, 50e9,
        options=_GPU, latency_hiding_options=_GPU_LATENCY_HIDING,
        deviceless_options=(("xla_gpu_enable_triton_gemm", False),), fast_types=("s8", "f8e4m3fn"),
    ),
    "h100-pcie": Chip("H100 PCIe", ("H100 PCIe",), 756e12),
    "h200": Chip("H200", ("H200",), 989e12, options=_GPU, latency_hiding_options=_GPU_LATENCY_HIDING),
    "b200": Chip("B200", ("B200",), 2250e12),
    "gb200": Chip("GB200", ("GB200",), 2500e12),
    "l40s": Chip("L40S", ("L40S",), 362e12),
    "rtx4090": Chip("RTX 4090", ("RTX 4090",), 165e12),
}  # fmt: skip


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls ``device_kind``; None for one that is not in :data:`CHIPS`."""
    name = device_kind.lower()
    matches = [(len(kind), chip) for chip in CHIPS.values() for kind in chip.device_kinds if kind.lower() in name]
    return max(matches, key=lambda match: match[0])[1] if matches else None


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 operations a second of a device; None if it is not known."""
    chip = find_chip(device.device_kind)
    return chip.peak_flops if chip else None


def device_memory(devices: Sequence[jax.Device]) -> float:
    """Bytes that programs may use on each device: the smaller of the chip's and of what JAX reports; 0 if not known."""
    import jax

    first, chip = devices[0], find_chip(devices[0].device_kind)
    here = next((device for device in devices if device.process_index == jax.process_index()), None)
    reported = (here.memory_stats() or {}).get("bytes_limit", 0) if here and first.platform != "cpu" else 0
    known = [float(size) for size in (chip.memory if chip else 0.0, reported) if size]
    return min(known, default=0.0)


def peak_memory() -> float | None:
    """Peak bytes in use on any device of this host; None if devices do not report it."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    return float(max(used)) if used else None
