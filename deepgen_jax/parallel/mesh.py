"""Device meshes with the axes ("data", "fsdp", "tensor")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepgen_jax.errors import DeepGenError

AXES = ("data", "fsdp", "tensor")
#: Axes over which a batch is split.
BATCH_AXES = ("data", "fsdp")


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of the mesh axes from ``"data=2,fsdp=4"``; axes left out have size 1.

    Raises:
      DeepGenError: an unknown axis, a repeated one, or a size that is no positive number.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in AXES or name in sizes or not value.isdecimal() or int(value) == 0:
            raise DeepGenError(f"mesh {text!r}: {item.strip()!r} is not usable; write it like data=1,fsdp=8,tensor=1")
        sizes[name] = int(value)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(spec: str | None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over ``devices`` (all devices by default); None is a single device.

    TPU slices that only the data-centre network joins are along "data".

    Raises:
      DeepGenError: the sizes do not multiply to the number of devices, or "data" cannot join the slices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = dict.fromkeys(AXES, 1) if spec is None else parse_mesh(spec)
    needed = math.prod(sizes.values())
    if spec is None:
        devices = devices[:1]
    elif needed != len(devices):
        raise DeepGenError(f"mesh {spec!r} needs {needed} devices, but there are {len(devices)}; change its sizes")
    shape = tuple(sizes[axis] for axis in AXES)
    tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1
    if slices > 1:
        if sizes["data"] % slices:
            raise DeepGenError(
                f"mesh {dict(sizes)}: data must be a multiple of the {slices} slices, which it joins; change its sizes"
            )
        inner = (sizes["data"] // slices, *shape[1:])
        array = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    elif len(devices) > 1 and tpu:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = np.asarray(devices).reshape(shape)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_size_multiple(mesh: Mesh) -> int:
    """Global batches must be multiples of this to be split evenly."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, ndim: int, axis: int = 0) -> NamedSharding:
    """Splits dimension ``axis`` of an array over the batch axes of the mesh."""
    spec: list[tuple[str, ...] | None] = [None] * ndim
    spec[axis] = BATCH_AXES
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def host_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch this host's devices hold: (index, number of parts).

    Hosts that a tensor axis joins hold the same part.

    Raises:
      DeepGenError: the mesh spreads a host's devices so that its part of a batch is not one piece.
    """
    rows = batch_size_multiple(mesh)
    sharding = batch_sharding(mesh, 1)
    parts: dict[int, set[int]] = {}
    pieces: dict[Any, Any] = dict(sharding.devices_indices_map((rows,)))
    for device, (piece,) in pieces.items():
        start, stop, _ = piece.indices(rows)
        parts.setdefault(device.process_index, set()).update(range(start, stop))
    mine = sorted(parts[jax.process_index()])
    if len({len(part) for part in parts.values()}) > 1 or mine != list(range(mine[0], mine[-1] + 1)):
        raise DeepGenError(f"mesh {dict(mesh.shape)} splits batches unevenly over hosts; make tensor smaller")
    return mine[0] // len(mine), rows // len(mine)


def to_global(mesh: Mesh, local: np.ndarray, axis: int = 0) -> jax.Array:
    """A batch over all hosts from this host's part of it, split along dimension ``axis``."""
    array = jax.make_array_from_process_local_data(batch_sharding(mesh, local.ndim, axis), local)
    # A process of one CPU device starts a program once its inputs are copied, not in the order of the calls: those of
    # several processes would then meet in different collectives.
    return jax.block_until_ready(array) if mesh.devices.flat[0].platform == "cpu" else array


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of an array on every host, wherever its pieces lie."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def to_local(array: jax.Array) -> np.ndarray:
    """This host's part of a batch that is split along its first dimension; the inverse of :func:`to_global`."""
    pieces = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])
