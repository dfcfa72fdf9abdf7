"""Compiles programs of a run for devices that are not there, and finds out what they would need and take."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel import hlo, programs, roofline
from deepgen_jax.parallel.mesh import AXES, batch_size_multiple, make_mesh
from deepgen_jax.parallel.report import Report, account, shard_bytes
from deepgen_jax.parallel.topology import GPUS_A_HOST, Topology
from deepgen_jax.training.config import RunConfig, SupervisedConfig

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
#: Words of a prompt with the template around them, in tokens: the length that most captions stay below.
PROMPT_TOKENS = 100


@dataclass(frozen=True)
class Request:
    """What is to be compiled.

    Attributes:
      config: of the run.
      topology: for which devices.
      devices: of the topology.
      mesh: sizes of the axes as text; "" for :func:`default_mesh`.
      program: name; "" for the configuration's first.
      batch: see ``programs.make_program``.
      prompt_tokens: length of prompts.
      command: what the report says it came from.
    """

    config: RunConfig
    topology: Topology
    devices: Sequence[Any]
    mesh: str = ""
    program: str = ""
    batch: int | None = None
    prompt_tokens: int = PROMPT_TOKENS
    command: str = ""


def default_mesh(topology: Topology) -> str:
    """Weights split over a slice's last dimension (TPU) or a host (GPU), and no further than 16 devices."""
    fsdp = topology.shape[-1] if topology.shape else min(topology.size, GPUS_A_HOST)
    return f"data={topology.size // fsdp},fsdp={fsdp}"


def run(request: Request) -> Report:
    """Compiles a program and reports.

    Raises:
      DeepGenError: the program cannot be made of what was asked for.
    """
    mesh = make_mesh(request.mesh or default_mesh(request.topology), request.devices)
    program = _program(request, mesh)
    start = time.monotonic()
    needed, memory, estimate = 0.0, {}, None
    try:
        compiled = program.lower().compile(compiler_options=dict(request.topology.chip.options))
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
    else:
        stats = compiled.memory_analysis()
        memory = account(program.memory, stats, program.trains)
        needed = sum(memory.values())
        estimate = roofline.estimate(hlo.parse(compiled.as_text()), request.topology, list(mesh.devices.flat))
    report = Report(
        request.command,
        program.name,
        program.unit,
        program.batch,
        program.micro_batch,
        program.facts,
        request.topology,
        {axis: mesh.shape[axis] for axis in AXES},
        memory,
        needed,
        program.flops,
        estimate,
        time.monotonic() - start,
        program.trains,
    )
    if not report.fits:
        report.advice = _advice(request, mesh, program)
    return report


def _program(request: Request, mesh: Mesh) -> programs.Program:
    sizes, whose = programs.model_sizes(request.config)
    subject = programs.Subject(request.config, sizes, mesh, request.prompt_tokens)
    name = request.program or programs.names_of(request.config)[0]
    program = programs.make_program(subject, name, request.batch)
    return dataclasses.replace(program, facts=(whose, *program.facts))


def _needed(message: str) -> float:
    """Bytes that a program needs, from the compiler's complaint that it is too large.

    Raises:
      DeepGenError: it complains about something else.
    """
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of", message) or re.search(
        r"requires ([\d.]+)([KMGT]?)i?B? of", message
    )
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        reason = " ".join(message.split())[:300]
        raise DeepGenError(f"the compiler failed: {reason}")
    return float(found[1]) * _UNITS[found[2]]


def _advice(request: Request, mesh: Mesh, program: programs.Program) -> list[str]:
    """What would take less memory, most effective first; none of it is compiled here."""
    config, pieces = request.config, batch_size_multiple(mesh)
    advice = []
    if program.trains and config.remat != "full":
        advice.append("remat=full computes activations again in the backward pass")
    each = program.micro_batch // pieces
    if each > 1:
        smaller = program.micro_batch // 2
        if program.name == "step" and isinstance(config, SupervisedConfig):
            mend = f"accumulation={2 * config.accumulation} data.micro_batch={smaller}, the same batch"
        elif program.name == "update":
            mend = f"policy.micro_batch={smaller}, the same batch"
        else:
            mend = f"--batch {smaller}"
        advice.append(f"{mend}: {each // 2} instead of {each} at once on each device")
    held = sum(shard_bytes(tree) for kind, tree in program.memory.items() if kind != "batch")
    if mesh.shape["data"] > 1:
        fsdp = mesh.shape["fsdp"] * 2
        advice.append(
            f"--mesh data={mesh.shape['data'] // 2},fsdp={fsdp}"
            + (f",tensor={mesh.shape['tensor']}" if mesh.shape["tensor"] > 1 else "")
            + f": weights and optimiser, {held / 2**30:.1f} GiB a device, are split over twice as many"
        )
    elif each <= 1:
        advice.append("more devices: every sample is on a device of its own, and all weights are split")
    return ["what would take less (--search compiles and ranks such choices):", *advice]


def largest(request: Request, say: Callable[[str], None]) -> Report:
    """The report of the largest batch that fits, the number of micro-batches as the configuration says.

    Raises:
      DeepGenError: not even one sample a device fits.
    """
    mesh = make_mesh(request.mesh or default_mesh(request.topology), request.devices)
    name = request.program or programs.names_of(request.config)[0]
    unit = batch_size_multiple(mesh) * programs.micro_batches(request.config, name)
    if name in ("update", "rollout"):
        group = request.config.rollout.group_size  # type: ignore[attr-defined]
        unit = math.lcm(unit, group)
    reports: dict[int, Report] = {}

    def fits(count: int) -> bool:
        report = run(dataclasses.replace(request, program=name, batch=count * unit))
        reports[count] = report
        per_device = report.micro_batch // batch_size_multiple(mesh)
        say(
            f"micro-batch of {per_device} a device: {report.needed / 2**30:.1f} GiB, "
            f"{'fits' if report.fits else 'does not fit'}"
        )
        return report.fits

    best = bisect(fits)
    if not best:
        raise DeepGenError(f"one sample a device does not fit on {request.topology}; {reports[1].advice[-1]}")
    return reports[best]


def bisect(fits: Callable[[int], bool], most: int = 256) -> int:
    """The largest number from 1 to ``most`` that fits, 0 if none does; what fits is taken to be without gaps."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
