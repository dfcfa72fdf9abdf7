"""Facts about accelerators that programs cannot ask them for, and their memory in use."""

from __future__ import annotations

import jax

# Dense bfloat16 operations a second of one device as JAX sees it, from the vendors' data sheets; the longest name that
# a device's kind contains counts.
_PEAK_FLOPS = {
    "H100": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "B200": 2250e12, "GB200": 2500e12,
    "L40S": 362e12, "RTX 4090": 165e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 2307e12,
}  # fmt: skip


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 operations a second of a device; None where it is not known."""
    kind = device.device_kind.lower()
    known = [name for name in _PEAK_FLOPS if name.lower() in kind]
    return _PEAK_FLOPS[max(known, key=len)] if known else None


def peak_memory() -> float | None:
    """Most bytes that any of this host's devices has had in use; None where devices do not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    return float(max(used)) if used else None
