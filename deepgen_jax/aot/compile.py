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

from deepgen_jax.aot import abstract, programs
from deepgen_jax.aot.estimate import Estimate, estimate
from deepgen_jax.aot.report import Report, account, shard_bytes
from deepgen_jax.aot.topology import Topology, compiler_versions
from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel.mesh import AXES, batch_size_multiple, host_share, make_mesh, usual_mesh
from deepgen_jax.rl.rl_config import GRPOConfig
from deepgen_jax.training.run_config import RunConfig, SupervisedConfig

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
#: Words of a prompt with the template around them, in tokens: the length that most captions stay below.
PROMPT_TOKENS = 100
# Of the model's operations, the fraction that every program computes: compilers drop a little, such as products with
# padding and the gradient of what nothing depends on.
_LEAST_COMPUTED = 0.95


@dataclass(frozen=True)
class Request:
    """What is to be compiled.

    Attributes:
      config: of the run.
      topology: for which devices.
      mesh: sizes of the axes as text; "" for :func:`usual_mesh`.
      program: name; "" for the configuration's first.
      batch: see ``programs.make_program``.
      prompt_tokens: length of prompts.
      command: what the report says it came from.
    """

    config: RunConfig
    topology: Topology
    mesh: str = ""
    program: str = ""
    batch: int | None = None
    prompt_tokens: int = PROMPT_TOKENS
    command: str = ""

    @property
    def mesh_text(self) -> str:
        return self.mesh or usual_mesh(self.topology.size, self.topology.slices, gpu=self.topology.gpu)

    @property
    def program_name(self) -> str:
        return self.program or programs.names_of(self.config)[0]


class Job:
    """One program on one mesh, traced but not compiled."""

    def __init__(self, request: Request, devices: Sequence[Any]) -> None:
        """Traces the program.

        Args:
          request: what.
          devices: for which; they need not be there.

        Raises:
          DeepGenError: the program cannot be made of what was asked for.
        """
        self._request, self._start = request, time.monotonic()
        self._mesh: Mesh = make_mesh(request.mesh_text, devices)
        host_share(self._mesh)  # training refuses a mesh whose batches hosts cannot share
        sizes, whose = abstract.model_sizes(request.config)
        subject = abstract.Subject(request.config, sizes, self._mesh, request.prompt_tokens)
        program = programs.make_program(subject, request.program_name, request.batch)
        self._program = dataclasses.replace(program, facts=(whose, *program.facts))
        self._lowered = program.lower()

    @property
    def latency_hiding(self) -> bool:
        """Whether the compiler is to begin collectives early."""
        return self._program.latency_hiding

    def compile(self, options: dict[str, Any]) -> Report:
        """Compiles to the end.

        Raises:
          DeepGenError: the compiler fails for another reason than memory.
        """
        try:
            compiled = self._lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            return self.report(None, needed_bytes(str(error), shard_bytes(self._program.arguments)))
        stats = compiled.memory_analysis()
        total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
        return self.report(compiled.as_text(), total + stats.output_size_in_bytes - stats.alias_size_in_bytes)

    def report(self, text: str | None, total: float) -> Report:
        """What there is to tell.

        Args:
          text: the optimised program; None where there is none.
          total: bytes a device that the program and its arguments take.
        """
        program, request, mesh = self._program, self._request, self._mesh
        work = max(total - shard_bytes(program.arguments), 0.0)
        memory = account(program.memory, work, program.trains)
        found = None if text is None else estimate(text, request.topology, list(mesh.devices.flat))
        if found is not None:
            _check_operations(found, program.flops / mesh.size, request.topology)
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
            sum(memory.values()),
            program.flops,
            found,
            time.monotonic() - self._start,
            program.trains,
            latency_hiding=program.latency_hiding,
        )
        if not report.fits:
            report.advice = self._advice()
        return report

    def _advice(self) -> list[str]:
        """What would take less memory; none of it is compiled here."""
        config, mesh, program = self._request.config, self._mesh, self._program
        pieces = batch_size_multiple(mesh)
        advice = ["what would take less (--search compiles and ranks such choices):"]
        if program.trains and config.remat != "full":
            advice.append("remat=full, which computes activations again in the backward pass")
        if program.name == "step" and isinstance(config, SupervisedConfig):
            if config.gather_frozen:
                advice.append("gather_frozen=false, which splits the language model, too, and gathers its layers")
            if config.merge > 1:
                advice.append("merge=1, which takes the micro-batches of a task one after another")
        each = program.micro_batch // pieces
        if each > 1:
            smaller = program.micro_batch // 2
            if program.name == "step" and isinstance(config, SupervisedConfig):
                smaller = config.data.micro_batch // 2
                mend = f"accumulation={2 * config.accumulation} data.micro_batch={smaller}, the same batch"
            elif program.name == "update":
                mend = f"policy.micro_batch={smaller}, the same batch"
            else:
                mend = f"--batch {smaller}"
            advice.append(f"{mend}: {each // 2} instead of {each} at once on each device")
        if mesh.shape["data"] > 1:
            held = sum(shard_bytes(tree) for kind, tree in program.memory.items() if kind != "batch")
            tensor = f",tensor={mesh.shape['tensor']}" if mesh.shape["tensor"] > 1 else ""
            advice.append(
                f"--mesh data={mesh.shape['data'] // 2},fsdp={mesh.shape['fsdp'] * 2}{tensor}: weights and optimiser, "
                f"now {held / 2**30:.1f} GiB a device, are split over twice as many"
            )
        if len(advice) == 1:
            advice.append("more devices: every sample has a device of its own, and weights are split over all")
        return advice


def _check_operations(found: Estimate, model_flops: float, topology: Topology) -> None:
    """Refuses an estimate that counts fewer operations than the model has: the parser missed products.

    Args:
      found: of one device.
      model_flops: of one device.
      topology: that was compiled for.

    Raises:
      DeepGenError: operations are missing.
    """
    if found.operations < _LEAST_COMPUTED * model_flops:
        raise DeepGenError(
            f"the optimised program shows {found.operations / 1e12:.4g} TFLOP a device, but the model alone has "
            f"{model_flops / 1e12:.4g}: the text of its HLO is not understood. It was compiled with "
            f"{compiler_versions(topology)}; install versions listed in setup.py"
        )


def needed_bytes(message: str, arguments: float) -> float:
    """Bytes that a program and its arguments need, from the compiler's complaint that they are too many.

    Args:
      message: which names either all of it or the temporaries alone.
      arguments: bytes of the arguments.

    Raises:
      DeepGenError: it complains about something else.
    """
    whole = re.search(r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of", message)
    temporaries = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)i?B?\)", message)
    found = whole or temporaries
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        reason = " ".join(message.split())[:300]
        raise DeepGenError(f"the compiler failed: {reason}")
    return float(found[1]) * _UNITS[found[2]] + (0.0 if whole else arguments)


def largest(request: Request, run: Callable[[Request], Report], say: Callable[[str], None]) -> Report:
    """The report of the largest batch that fits, the number of micro-batches as the configuration says.

    Args:
      request: its batch is not looked at.
      run: compiles a request.
      say: is told of every try.

    Raises:
      DeepGenError: not even one sample a device fits.
    """
    topology, name, config = request.topology, request.program_name, request.config
    pieces = topology.size
    if "tensor" in request.mesh_text:
        pieces //= int(request.mesh_text.partition("tensor=")[2].partition(",")[0])
    unit = pieces * programs.micro_batches(config, name)
    if name in ("update", "rollout") and isinstance(config, GRPOConfig):
        unit = math.lcm(unit, config.rollout.group_size)
    reports: dict[int, Report] = {}

    def fits(count: int) -> bool:
        reports[count] = report = run(dataclasses.replace(request, program=name, batch=count * unit))
        verdict = "fits" if report.fits else "does not fit"
        say(f"{report.micro_batch // pieces} at once on a device: {report.needed / 2**30:.1f} GiB, {verdict}")
        return report.fits

    best = bisect(fits)
    if not best:
        raise DeepGenError(f"not even one sample a device fits on {topology}; {reports[1].advice[-1]}")
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
