"""TPU slices and GPU clusters that programs can be compiled for without the devices."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel.chips import CHIPS, GPUS_PER_HOST, Chip

#: Keys of `deepgen_jax.parallel.chips.CHIPS` that programs can be compiled for.
KINDS = ("v5e", "v5p", "v6e", "h100")
_TARGETS = {"h100": "h100_sxm.txtpb"}


@dataclass(frozen=True)
class Topology:
    """A TPU slice, several slices, or a GPU cluster.

    Attributes:
      name: as on the command line, such as "v6e:8x8" or "h100:64".
      kind: one of :data:`KINDS`.
      shape: chips along each dimension of one slice; () for GPUs.
      slices: connected by the data-centre network; 1 for GPUs.
      size: total number of devices.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int
    size: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    def compiler_options(self, latency_hiding: bool) -> dict[str, Any]:
        """Options to compile a program without the device."""
        return self.chip.compiler_options(latency_hiding) | dict(self.chip.deviceless_options)

    @property
    def gpu(self) -> bool:
        return self.kind in _TARGETS

    @property
    def sort(self) -> str:
        """Plural of a device, for messages."""
        return "GPUs" if self.gpu else "chips"

    def __str__(self) -> str:
        slices = f" x {self.slices} slices" if self.slices > 1 else ""
        return f"{self.name}{slices} ({self.size} {self.sort})"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """A topology of ``KIND:SHAPE`` (TPU) or ``KIND:NUMBER`` (GPU).

    Raises:
      DeepGenError: unknown kind, or wrong shape.
    """
    kind, _, rest = text.strip().lower().partition(":")
    if kind not in KINDS:
        raise DeepGenError(f"topology {text!r}: {kind!r} is unknown; choose one of {', '.join(KINDS)}, as in v6e:8x8")
    if slices < 1:
        raise DeepGenError(f"--slices is {slices}; it must be at least 1")
    if kind in _TARGETS:
        if not rest.isdecimal() or int(rest) < 1 or (int(rest) > GPUS_PER_HOST and int(rest) % GPUS_PER_HOST):
            raise DeepGenError(
                f"topology {text!r}: {rest!r} is no number of GPUs; write 1 to {GPUS_PER_HOST}, or a multiple of "
                f"{GPUS_PER_HOST}, as in {kind}:64"
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
    """Sets environment variables that JAX and compiler plugins read on import; call it before JAX is imported.

    Raises:
      DeepGenError: the compiler for these devices is not installed.
    """
    plugin, extra = ("jax_cuda12_plugin", "cuda") if topology.gpu else ("libtpu", "tpu")
    if importlib.util.find_spec(plugin) is None:
        raise DeepGenError(f"compiling for {topology.name} needs {plugin}; run pip install 'deepgen-jax[{extra}]'")
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Keep the compiler's warnings out of the report.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not topology.gpu:
        # Otherwise libtpu queries the metadata server of a TPU VM. The values do not affect compilation.
        os.environ.update(
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            TPU_ACCELERATOR_TYPE="v5litepod-16",
            TPU_WORKER_HOSTNAMES="localhost",
            TPU_WORKER_ID="0",
            TPU_SKIP_MDS_QUERY="1",
        )


def compiler_versions(topology: Topology) -> str:
    """Versions of JAX and of the compiler's package for these devices."""
    package = "jax-cuda12-plugin" if topology.gpu else "libtpu"
    versions = []
    for name in ("jax", package):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} of an unknown version")
    return " and ".join(versions)


def describe(topology: Topology) -> Sequence[Any]:
    """The devices of a topology; after :func:`prepare`.

    Raises:
      DeepGenError: the compiler does not know such a topology.
    """
    from jax.experimental import topologies

    try:
        if topology.gpu:
            target = resources.files("deepgen_jax.aot").joinpath("targets", _TARGETS[topology.kind]).read_text()
            hosts, each = max(topology.size // GPUS_PER_HOST, 1), min(topology.size, GPUS_PER_HOST)
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
