"""Device meshes with the axes ("data", "fsdp", "tensor")."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel.chips import GPUS_PER_HOST

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


def usual_mesh(count: int, slices: int = 1, *, gpu: bool) -> str:
    """The default mesh: batches over all devices, weights over devices with fast links, which are the GPUs of a host or
    16 chips (two dimensions of a slice, or a ring).

    Args:
      count: number of devices.
      slices: TPU slices that they are in.
      gpu: they are GPUs.
    """
    fsdp = math.gcd(count // slices, GPUS_PER_HOST if gpu else 16)
    return f"data={count // fsdp},fsdp={fsdp}"


def usual_mesh_of(devices: Sequence[jax.Device]) -> str:
    """:func:`usual_mesh` over existing devices."""
    return usual_mesh(len(devices), slices_of(devices), gpu=devices[0].platform == "gpu")


def make_mesh(spec: str | None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over ``devices``, all by default; None is a single device. "data" spans TPU slices.

    Raises:
      DeepGenError: the sizes do not multiply to the number of devices, or "data" does not divide over the slices.
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
    slices = slices_of(devices)
    if slices > 1:
        if sizes["data"] % slices:
            raise DeepGenError(
                f"mesh {dict(sizes)}: data must be a multiple of the {slices} slices, which it spans; change its sizes"
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


def slices_of(devices: Sequence[jax.Device]) -> int:
    """Number of TPU slices that the devices are in; 1 for other devices."""
    tpu = devices[0].platform == "tpu"
    return len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1


def batch_size_multiple(mesh: Mesh) -> int:
    """Number of pieces that a global batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(name: str, size: int, mesh: Mesh) -> None:
    """Checks that batches of ``size`` can be split evenly over the mesh.

    Raises:
      DeepGenError: they cannot; the message calls the setting ``name``.
    """
    if size % (pieces := batch_size_multiple(mesh)):
        raise DeepGenError(
            f"{name} is {size}, but the mesh splits batches into {pieces} pieces; make it a multiple of {pieces}"
        )


def batch_sharding(mesh: Mesh, ndim: int, axis: int = 0) -> NamedSharding:
    """Splits dimension ``axis`` of an array over the batch axes of the mesh."""
    spec: list[tuple[str, ...] | None] = [None] * ndim
    spec[axis] = BATCH_AXES
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def host_share(mesh: Mesh) -> tuple[int, int]:
    """The part of a batch on this host's devices: (index, number of parts).

    Its rows need not be consecutive: the devices of a TPU host are a block of the slice, while the axes of the mesh run
    along its dimensions. Hosts along the tensor axis hold the same part.

    Raises:
      DeepGenError: the parts of two hosts overlap, or differ in size.
    """
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(-1, mesh.devices.shape[-1])
    rows = {int(host): frozenset(np.flatnonzero((hosts == host).any(axis=1)).tolist()) for host in np.unique(hosts)}
    parts = sorted(set(rows.values()), key=min)
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != len(hosts):
        raise DeepGenError(f"mesh {dict(mesh.shape)} splits batches unevenly over hosts; make tensor smaller")
    return parts.index(rows[jax.process_index()]), len(parts)


def to_global(mesh: Mesh, local: np.ndarray, axis: int = 0) -> jax.Array:
    """A global batch from this host's part (see :func:`host_share`), split along dimension ``axis``.

    Rows go to this host's devices in the order of the mesh.
    """
    array = jax.make_array_from_process_local_data(batch_sharding(mesh, local.ndim, axis), local)
    # A process with one CPU device starts a program once its inputs are copied, not in the order of calls, so that the
    # collectives of several processes could be matched wrongly.
    return jax.block_until_ready(array) if mesh.devices.flat[0].platform == "cpu" else array


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array on every host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
