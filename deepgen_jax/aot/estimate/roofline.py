"""Roofline estimate of a compiled program's time, from the vendors' rates and the order of its instructions.

An instruction takes the longer of its arithmetic at peak rate and its traffic at full HBM bandwidth, one after another.
Asynchronous collectives and copies overlap with the instructions between their start and end; collectives share one
link and copies one engine, first come, first served. :data:`ASSUMPTIONS` lists what is not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepgen_jax.aot.estimate.costs import (
    collectives_of,
    eight_bit_operations,
    high_operations,
    is_copy,
    memory_bytes,
    only_moves,
    operations,
    piece_of,
    sent_to_slices,
    wire_bytes,
)
from deepgen_jax.aot.estimate.hlo import Computation, Instruction, Module, device_groups
from deepgen_jax.aot.topology import Topology
from deepgen_jax.parallel.chips import GPUS_PER_HOST

ASSUMPTIONS = (
    "products at the chip's peak bfloat16 rate (float32 at full precision: 1/6 of it on TPUs, 1/15 on GPUs, at high "
    "precision: 1/3 and 1/2; 8-bit types of the chip: twice), HBM at its full bandwidth; the longer of the two for "
    "each instruction, one instruction after another",
    "collectives at full link bandwidth, one at a time, overlapped with what the compiler scheduled between start "
    "and end",
    "left out: launches, latency of collectives, others' traffic on the network, arithmetic of vectors, and the time "
    "of data loading, encoders, checkpoints and the host",
)

_RENDEZVOUS = r'_xla_host_transfer_rendezvous="([^"]*)"'


@dataclass
class Traffic:
    """Collectives of one kind in one run.

    Attributes:
      count: number of collectives.
      bytes: sent by a device.
      seconds: at full bandwidth.
    """

    count: int = 0
    bytes: float = 0.0
    seconds: float = 0.0


@dataclass
class Estimate:
    """One run of a program on one device.

    Attributes:
      operations: of products, recomputation included.
      exact: of these, in full-precision float32.
      eight_bit: of these, with both operands of 8 bits.
      memory: bytes read from and written to HBM.
      moved: of these, by instructions that only copy, slice or transpose.
      arithmetic_seconds, memory_seconds, device_seconds, network_seconds: of the arithmetic alone, the traffic alone,
        the longer of the two for each instruction, all collectives one after another.
      seconds: in the compiler's order, collectives overlapped.
      collectives: kind -> traffic.
      links: "ici", "dcn", "nvlink" or "infiniband" -> traffic.
    """

    operations: float = 0.0
    exact: float = 0.0
    eight_bit: float = 0.0
    memory: float = 0.0
    moved: float = 0.0
    arithmetic_seconds: float = 0.0
    memory_seconds: float = 0.0
    device_seconds: float = 0.0
    network_seconds: float = 0.0
    seconds: float = 0.0
    collectives: dict[str, Traffic] = field(default_factory=dict)
    links: dict[str, Traffic] = field(default_factory=dict)


class Network:
    """Times of collectives between the devices of a mesh."""

    def __init__(self, topology: Topology, devices: Sequence[Any]) -> None:
        """Reads where the devices are; ``devices`` are those of the mesh in its order."""
        self._chip, self._gpu = topology.chip, topology.gpu
        self._shape = topology.shape
        if topology.gpu:
            self._place = np.array([[index // GPUS_PER_HOST] for index in (device.id for device in devices)])
        else:
            slices = [getattr(device, "slice_index", 0) or 0 for device in devices]
            coordinates = [device.coords[: len(topology.shape)] for device in devices]
            self._place = np.array([[where, *at] for where, at in zip(slices, coordinates, strict=True)])

    def seconds(self, kind: str, operand: int, groups: np.ndarray | None) -> tuple[float, str, int]:
        """Time of a collective, the link that bounds it, and the members of a group.

        Args:
          kind: of the collective.
          operand: bytes that a device puts in.
          groups: [groups, members] places in the mesh; None for all devices.
        """
        groups = np.arange(len(self._place))[None] if groups is None else groups
        members = groups.shape[1]
        if members == 1:
            return 0.0, "none", 1
        times = {self._one(kind, operand, tuple(group)) for group in groups[:: max(len(groups) // 8, 1)]}
        seconds, link = max(times)
        return seconds, link, members

    def _one(self, kind: str, operand: int, group: tuple[int, ...]) -> tuple[float, str]:
        places = self._place[list(group)]
        far = len(np.unique(places[:, 0]))
        near = len(group) // far
        near_link, far_link = ("nvlink", "infiniband") if self._gpu else ("ici", "dcn")
        # Within a slice or host every device sends its share of `near` members; what crosses is split over them.
        whole = operand * len(group) if kind == "all-gather" else operand
        turns = 2 if kind == "all-reduce" else 1
        if kind in ("collective-permute", "collective-broadcast"):
            inside, outside = float(operand), float(operand)
        elif kind in ("all-to-all", "ragged-all-to-all"):
            # Each pair of devices exchanges different data.
            inside, outside = operand * (near - 1) / len(group), operand * (len(group) - near) / len(group)
        else:
            inside = turns * whole * (near - 1) / near
            outside = turns * whole * (far - 1) / far / near
        found = []
        if near > 1 or far == 1:
            found.append((inside / self._near_bandwidth(places), near_link))
        if far > 1:
            found.append((outside / self._chip.network_bandwidth, far_link))
        return max(found)

    def _near_bandwidth(self, places: np.ndarray) -> float:
        """Bytes a second into one device from the others of its slice or host."""
        if self._gpu:
            return self._chip.link_bandwidth
        total = 0.0
        for dimension, size in enumerate(self._shape, start=1):
            spanned = len(np.unique(places[:, dimension]))
            if spanned > 1:
                # A ring is entered from both sides.
                ring = spanned == size and size in self._chip.torus
                total += self._chip.link_bandwidth * (2 if ring else 1)
        return total or self._chip.link_bandwidth


def estimate(module: Module, topology: Topology, devices: Sequence[Any]) -> Estimate:
    """Times and traffic of one run of a program.

    Args:
      module: the optimised program.
      topology: what it was compiled for.
      devices: of the mesh, in its order.
    """
    walk = _Walk(module, topology, Network(topology, devices))
    total = walk.computation(module.entry)
    total.seconds = max(total.seconds, total.network_seconds, total.memory_seconds)
    return total


class _Walk:
    def __init__(self, module: Module, topology: Topology, network: Network) -> None:
        self._module, self._chip, self._network = module, topology.chip, network
        self._exact_cost, self._high_cost = (15.0, 2.0) if topology.gpu else (6.0, 3.0)
        self._known: dict[str, Estimate] = {}

    def computation(self, name: str) -> Estimate:
        """One run of a computation."""
        if name not in self._known:
            self._known[name] = self._run(self._module.computations[name])
        return self._known[name]

    def _run(self, computation: Computation) -> Estimate:
        total, link, copier, far = Estimate(), 0.0, 0.0, 0.0
        # End times of asynchronous operations by the name of their latest instruction; and durations of those that wait
        # for operands: on TPUs the program of a collective starts before an update passes its operands.
        pending: dict[str, float] = {}
        waiting: dict[str, float] = {}
        # Arrival times of data from other slices, by the rendezvous of send and recv.
        arriving: dict[str | None, float] = {}
        for one in computation.instructions:
            if one.opcode in ("while", "call", "conditional"):
                turns = self._module.trips(computation, one)
                if turns is None:
                    raise ValueError(f"the trip count of {one.name} cannot be determined")
                for called in one.called():
                    _add(total, self.computation(called), turns)
                continue
            if one.opcode == "recv-done":
                total.seconds = max(total.seconds, arriving.get(_rendezvous(computation, one), 0.0))
                continue
            if one.opcode.endswith("-done"):
                ends = [pending[name] for name in one.operands if name in pending]
                total.seconds = max([total.seconds, *ends])
                continue
            if one.opcode.endswith("-update"):
                started = next((name for name in one.operands if name in pending or name in waiting), "")
                if started in waiting:
                    link = max(link, total.seconds) + waiting[started]
                    pending[one.name] = link
                elif started:
                    pending[one.name] = pending[started]
                continue
            busy = self._device(total, computation, one)
            part, channel = piece_of(self._module, one) or ("", "")
            if part == "start":
                link = max(link, total.seconds) + self._collectives(total, computation, one)
                pending[channel] = link
                continue
            if part == "done":
                total.seconds = max(total.seconds, pending.get(channel, 0.0))
                continue
            if one.opcode in ("send", "recv"):
                if crossing := self._between_slices(total, one):
                    far = max(far, total.seconds) + crossing
                    arriving[one.attribute(_RENDEZVOUS)] = far
                continue
            sent = self._collectives(total, computation, one)
            if not sent and is_copy(one):
                copier = max(copier, total.seconds) + busy
                pending[one.name] = copier
            elif not sent:
                total.seconds += busy
            elif one.opcode.endswith("-start") and not one.operands:
                waiting[one.name] = sent
            elif one.opcode.endswith("-start"):
                link = max(link, total.seconds) + sent
                pending[one.name] = link
            else:
                link = max(link, total.seconds) + sent
                total.seconds = max(total.seconds + busy, link)
        total.seconds = max(total.seconds, link, far)
        return total

    def _device(self, total: Estimate, computation: Computation, one: Instruction) -> float:
        count, exact = operations(self._module, computation, one)
        moved = memory_bytes(self._module, computation, one)
        small = eight_bit_operations(self._module, computation, one) if count else {}
        fast = sum(number for kind, number in small.items() if kind in self._chip.fast_types)
        high = high_operations(self._module, computation, one) if count else 0
        plain = count - exact - high - fast
        work = plain + exact * self._exact_cost + high * self._high_cost + fast / 2
        arithmetic = work / self._chip.peak_flops
        memory = moved / self._chip.memory_bandwidth
        total.operations += count
        total.exact += exact
        total.eight_bit += sum(small.values())
        total.memory += moved
        total.moved += moved if moved and only_moves(self._module, one) else 0
        total.arithmetic_seconds += arithmetic
        total.memory_seconds += memory
        total.device_seconds += 0.0 if is_copy(one) else max(arithmetic, memory)
        return max(arithmetic, memory)

    def _collectives(self, total: Estimate, computation: Computation, one: Instruction) -> float:
        sent = 0.0
        for kind, collective, operand in collectives_of(self._module, one, computation):
            seconds, link, members = self._network.seconds(kind, operand, device_groups(collective.attributes))
            carried = Traffic(1, wire_bytes(kind, operand, members), seconds)
            _carry(total.collectives, kind, carried, 1)
            _carry(total.links, link, carried, 1)
            sent += seconds
        total.network_seconds += sent
        return sent

    def _between_slices(self, total: Estimate, one: Instruction) -> float:
        found = sent_to_slices(one)
        if found is None:
            return 0.0
        kind, operand, slices = found
        sent = wire_bytes(kind, operand, slices)
        carried = Traffic(1, sent, sent / self._chip.network_bandwidth)
        _carry(total.collectives, kind, carried, 1)
        _carry(total.links, "dcn", carried, 1)
        total.network_seconds += carried.seconds
        return carried.seconds


def _rendezvous(computation: Computation, done: Instruction) -> str | None:
    received = computation.by_name.get(done.operands[0]) if done.operands else None
    return received.attribute(_RENDEZVOUS) if received else None


def _add(total: Estimate, one: Estimate, times: int) -> None:
    for name in (
        "operations", "exact", "eight_bit", "memory", "moved", "arithmetic_seconds", "memory_seconds",
        "device_seconds", "network_seconds", "seconds",
    ):  # fmt: skip
        setattr(total, name, getattr(total, name) + times * getattr(one, name))
    for mine, other in ((total.collectives, one.collectives), (total.links, one.links)):
        for kind, traffic in other.items():
            _carry(mine, kind, traffic, times)


def _carry(into: dict[str, Traffic], kind: str, traffic: Traffic, times: int) -> None:
    found = into.setdefault(kind, Traffic())
    found.count += times * traffic.count
    found.bytes += times * traffic.bytes
    found.seconds += times * traffic.seconds
