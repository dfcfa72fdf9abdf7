"""What compiling one program for one mesh told: memory by kind, collectives, an estimated time; as a table and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from deepgen_jax.aot.estimate import ASSUMPTIONS, Estimate
from deepgen_jax.aot.topology import Topology
from deepgen_jax.parallel.chips import GIB

#: Kinds of memory in the order in which they are told.
KINDS = (
    "trainable weights", "moving average", "frozen weights", "optimiser", "batch", "gradients",
    "activations and work space",
)  # fmt: skip


@dataclass
class Report:
    """One program on one mesh.

    Attributes:
      command: that gives this report again.
      program, unit, batch, micro_batch, summary: of :class:`deepgen_jax.parallel.abstract.AbstractProgram`.
      topology: what it was compiled for.
      mesh: axis -> size.
      memory: kind -> bytes a device; empty where the compiler gave up before it knew.
      needed: bytes a device in all.
      flops: operations of the model in one run, over all devices.
      estimate: None where it was not compiled to the end.
      compile_seconds: that the compiler took.
      trains: it ends in an optimiser step.
      latency_hiding: as for `deepgen_jax.parallel.jit_options`.
      choice: mesh and rematerialisation, where several were tried.
      advice: what would make it fit, where it does not.
    """

    command: str
    program: str
    unit: str
    batch: int
    micro_batch: int
    summary: tuple[str, ...]
    topology: Topology
    mesh: dict[str, int]
    memory: dict[str, float]
    needed: float
    flops: float
    estimate: Estimate | None
    compile_seconds: float
    trains: bool = False
    latency_hiding: bool = False
    choice: str = ""
    advice: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.needed <= self.topology.chip.memory

    @property
    def mfu(self) -> float | None:
        """Operations of the model over what the devices could do in the estimated time."""
        if self.estimate is None:
            return None
        return self.flops / (self.topology.size * self.topology.chip.peak_flops * self.estimate.seconds)

    @property
    def bound(self) -> float | None:
        """MFU if arithmetic, HBM and network each ran at full rate beside the others: no program is faster."""
        if self.estimate is None:
            return None
        times = (self.estimate.arithmetic_seconds, self.estimate.memory_seconds, self.estimate.network_seconds)
        return self.flops / (self.topology.size * self.topology.chip.peak_flops * max(times))

    def to_json(self) -> dict[str, Any]:
        """Everything, in bytes, operations and seconds a device; with the assumptions."""
        chip = self.topology.chip
        found: dict[str, Any] = {
            "command": self.command,
            "program": self.program,
            "topology": str(self.topology),
            "devices": self.topology.size,
            "mesh": self.mesh,
            "batch": {"size": self.batch, "unit": self.unit, "micro_batch": self.micro_batch},
            "shapes": list(self.summary),
            "chip": {key: value for key, value in asdict(chip).items() if isinstance(value, (str, float, int))},
            "compiler_options": chip.compiler_options(self.latency_hiding),
            "memory": {**self.memory, "total": self.needed, "limit": chip.memory},
            "fits": self.fits,
            "advice": self.advice,
            "model_flops": self.flops,
            "compile_seconds": self.compile_seconds,
            "assumptions": list(ASSUMPTIONS),
        }
        if self.estimate is not None:
            found |= {"estimate": asdict(self.estimate), "mfu": self.mfu, "mfu_bound": self.bound}
            found["samples_per_second"] = self.batch / self.estimate.seconds
        return found

    def table(self) -> str:
        """What a person reads."""
        chip, mesh = self.topology.chip, ",".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1)
        lines = [f"{self.program} on {self.topology}, mesh {mesh or 'of one device'}"]
        lines += [*(f"  {line}" for line in self.summary), ""]
        lines.append(f"memory a device, {chip.name}, GiB")
        lines += [f"  {kind:<28}{size / GIB:8.2f}" for kind, size in self.memory.items()]
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines += [f"  {'total':<28}{self.needed / GIB:8.2f} of {chip.memory / GIB:.2f}: {verdict}"]
        lines += [f"  {line}" for line in self.advice]
        if self.estimate is not None:
            lines += ["", *self._traffic(self.estimate), "", *self._times(self.estimate)]
        return "\n".join(lines)

    def _traffic(self, estimate: Estimate) -> list[str]:
        lines = [f"collectives a device and run{'':<4}{'number':>8}{'sent, GB':>10}{'seconds':>9}"]
        for name, group in (("kind", estimate.collectives), ("link", estimate.links)):
            for key, traffic in sorted(group.items(), key=lambda item: -item[1].seconds):
                label = key if name == "kind" else f"over {key}"
                lines.append(f"  {label:<30}{traffic.count:>8}{traffic.bytes / 1e9:>10.2f}{traffic.seconds:>9.3f}")
        return lines

    def _times(self, estimate: Estimate) -> list[str]:
        chip, share = self.topology.chip, self.flops / self.topology.size
        assert self.mfu is not None
        assert self.bound is not None
        lines = [
            f"arithmetic a device: {share / 1e12:.1f} TFLOP of the model, {estimate.operations / 1e12:.1f} computed",
            f"at peak rates: arithmetic {estimate.arithmetic_seconds:.3f} s, HBM {estimate.memory_seconds:.3f} s "
            f"({estimate.memory / 1e9:.0f} GB), the longer for each instruction {estimate.device_seconds:.3f} s, "
            f"network {estimate.network_seconds:.3f} s",
            f"estimated {estimate.seconds:.3f} s a run, {self.batch / estimate.seconds:.1f} {self.unit} a second, "
            f"MFU {self.mfu:.3f} of {chip.peak_flops / 1e12:.0f} TFLOP/s",
            f"bound: arithmetic, HBM and network side by side, each at full rate, give MFU {self.bound:.3f}",
            "assumed:",
            *(f"  {line}" for line in ASSUMPTIONS),
        ]
        if options := chip.compiler_options(self.latency_hiding):
            lines.append(f"  compiler options {' '.join(options)}; runs set them, too")
        return lines


def account(memory: Mapping[str, Any], work: float, trains: bool) -> dict[str, float]:
    """Bytes a device by kind, in the order of :data:`KINDS`.

    Args:
      memory: kind -> tree of shapes with shardings, see ``AbstractProgram.memory``.
      work: what the program needs besides its arguments.
      trains: gradients, as large as what trains, are part of it.
    """
    found = {kind: shard_bytes(tree) for kind, tree in memory.items()}
    if trains:
        found["gradients"] = min(found["trainable weights"], work)
        work -= found["gradients"]
    found["activations and work space"] = work
    return {kind: found[kind] for kind in KINDS if found.get(kind)}


def shard_bytes(tree: Any) -> float:
    """Bytes of a tree of sharded shapes on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        width = leaf.dtype.itemsize
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * width
    return float(total)
