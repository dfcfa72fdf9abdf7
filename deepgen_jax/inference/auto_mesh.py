"""The mesh of generation where none is asked for: all devices, each with whole images as far as there are enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepgen_jax.parallel.chips import device_memory
from deepgen_jax.stores.model_folder import read_manifest

# Share of a device's memory that weights may take; the rest is for activations and the decoder.
_WEIGHTS = 0.6


def auto_mesh(folder: Path, dtype: DTypeLike, images: int, devices: Sequence[jax.Device] | None = None) -> str | None:
    """Sizes of the axes as text; None for one device: on CPUs, and where the memory of devices is not known.

    Args:
      folder: the model's.
      dtype: of the computation.
      images: that are made in all, or at once by a service.
      devices: of this process; by default all.
    """
    devices = list(devices or jax.local_devices())
    memory = device_memory(devices)
    if len(devices) == 1 or devices[0].platform == "cpu" or not memory:
        return None
    manifest = read_manifest(folder)
    used = {part: found for part, found in manifest.parameters.items() if part not in ("unused", "lora")}
    width = jnp.dtype(dtype).itemsize
    size = sum(found.bytes if manifest.config.quantization else found.count * width for found in used.values())
    return mesh_for(len(devices), images, size, memory, manifest.config.mmdit.num_heads)


def mesh_for(count: int, images: int, weights: float, memory: float, heads: int) -> str:
    """Sizes of the axes: "data" where images suffice, "tensor" between devices that share an image, "fsdp" in place of
    "data" where whole weights would not fit.

    Args:
      count: of devices.
      images: to make.
      weights: bytes.
      memory: bytes of a device.
      heads: of the MMDiT, which "tensor" has to divide.
    """
    pieces = max(size for size in range(1, count + 1) if count % size == 0 and size <= max(images, 1))
    tensor = math.gcd(count // pieces, heads)
    pieces = count // tensor
    splits = [size for size in range(1, pieces + 1) if pieces % size == 0]
    fsdp = next((size for size in splits if weights <= _WEIGHTS * memory * size * tensor), pieces)
    return f"data={pieces // fsdp},fsdp={fsdp},tensor={tensor}"
