"""Report of one compiled program: memory by kind, collectives and estimated time, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deepgen_jax.aot.estimate import ASSUMPTIONS, Estimate
from deepgen_jax.aot.topology import Topology
from deepgen_jax.parallel.abstract import shard_bytes
from deepgen_jax.parallel.chips import GIB

#: Kinds of memory in the order of the report.
KINDS = (
    "trainable weights", "moving average", "frozen weights", "optimiser", "batch", "gradients",
    "activations and work space",
)  # fmt: skip


@dataclass
class Report:
    """One program on one mesh.

    Attributes:
      command: that reproduces the report.
      program, unit, batch, micro_batch, summary: of :class:`deepgen_jax.parallel.abstract.AbstractProgram`.
      topology: what it was compiled for.
      mesh: axis -> size.
      memory: kind -> bytes a device.
      needed: total bytes a device.
      flops: operations of the model in one run, over all devices, recomputation not counted.
      estimate: None if the compiler ran out of memory.
      compile_seconds: spent tracing and compiling.
      trains: it ends in an optimiser step.
      latency_hiding: as for `deepgen_jax.parallel.jit_options`.
      choice: mesh and settings, in a search.
      advice: changes that need less memory, if it does not fit.
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
        """Model FLOPs utilisation: operations of the model over the devices' peak in the estimated time."""
        if self.estimate is None:
            return None
        return self.flops / (self.topology.size * self.topology.chip.peak_flops * self.estimate.seconds)

    @property
    def bound(self) -> float | None:
        """MFU if arithmetic, HBM and network overlapped perfectly, each at full rate: an upper bound."""
        if self.estimate is None:
            return None
        times = (self.estimate.arithmetic_seconds, self.estimate.memory_seconds, self.estimate.network_seconds)
        return self.flops / (self.topology.size * self.topology.chip.peak_flops * max(times))

    def to_json(self) -> dict[str, Any]:
        """All values, in bytes, operations and seconds a device, with the assumptions."""
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
        """The report as text."""
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
            f"({estimate.memory / 1e9:.0f} GB, {estimate.moved / 1e9:.1f} of them copies), the longer for each "
            f"instruction {estimate.device_seconds:.3f} s, network {estimate.network_seconds:.3f} s",
            f"estimated {estimate.seconds:.3f} s a run, {self.batch / estimate.seconds:.1f} {self.unit} a second, "
            f"MFU {self.mfu:.3f} of {chip.peak_flops / 1e12:.0f} TFLOP/s",
            f"bound: MFU if arithmetic, HBM and network overlapped perfectly {self.bound:.3f}",
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
      work: bytes of temporaries and outputs that alias no argument.
      trains: the temporaries include gradients, as large as the trainable weights.
    """
    found = {kind: shard_bytes(tree) for kind, tree in memory.items()}
    if trains:
        found["gradients"] = min(found["trainable weights"], work)
        work -= found["gradients"]
    found["activations and work space"] = work
    return {kind: found[kind] for kind in KINDS if found.get(kind)}
