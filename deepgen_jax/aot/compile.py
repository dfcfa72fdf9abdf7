"""Compiles a run's programs for absent devices, and reports the memory and time they would take."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh

from deepgen_jax.aot.estimate import Estimate, estimate
from deepgen_jax.aot.program_report import Report, account
from deepgen_jax.aot.topology import Topology, compiler_versions
from deepgen_jax.config import QuantizationConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel.abstract import shard_bytes
from deepgen_jax.parallel.mesh import AXES, batch_size_multiple, host_share, make_mesh, parse_mesh
from deepgen_jax.training.abstract_run import INFERENCE, PROMPT_TOKENS, AbstractRun, Compilable
from deepgen_jax.training.auto_settings import Choice, Devices
from deepgen_jax.training.run_config import RunConfig
from deepgen_jax.training.stage import model_sizes, settings_for, stage_class

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Fraction of the model's operations that every program computes: compilers drop a little, such as products with padding
# and unused gradients.
_LEAST_COMPUTED = 0.95


@dataclass(frozen=True)
class Request:
    """Compilation options.

    Attributes:
      config: of the run.
      topology: for which devices.
      mesh: sizes of the axes as text; "" for the configuration's.
      program: name; "" for the configuration's first.
      batch: samples of an optimiser step, or images of a rollout or of inference, over all devices; None for what the
        configuration says.
      prompt_tokens: length of prompts.
      quantization: 8-bit weights for inference; None for those of the model folder.
      stacked: inference keeps layers stacked where the pipeline would split them.
      command: that the report quotes.
    """

    config: RunConfig
    topology: Topology
    mesh: str = ""
    program: str = ""
    batch: int | None = None
    prompt_tokens: int = PROMPT_TOKENS
    quantization: QuantizationConfig | None = None
    stacked: bool = False
    command: str = ""

    @cached_property
    def choice(self) -> Choice:
        """Settings left to "auto", as training chooses them on these devices."""
        topology, chip = self.topology, self.topology.chip
        platform = "gpu" if topology.gpu else "tpu"
        devices = Devices(chip.device_kinds[0], platform, topology.size, topology.slices, chip.memory)
        config = dataclasses.replace(self.config, mesh=self.mesh) if self.mesh else self.config
        return settings_for(config, devices)

    @property
    def mesh_text(self) -> str:
        """Sizes of the axes."""
        return self.choice.mesh

    @property
    def program_name(self) -> str:
        return self.program or next(iter(self._programs))

    @property
    def compilable(self) -> Compilable:
        """The requested program.

        Raises:
          DeepGenError: the configuration has none of that name.
        """
        if self.program_name not in self._programs:
            known = ", ".join(self._programs)
            raise DeepGenError(f"--program {self.program!r} is not one of this configuration; choose one of {known}")
        if self.program_name not in INFERENCE and (self.quantization or self.stacked):
            option = "--quantize" if self.quantization else "--stacked"
            raise DeepGenError(f"{option} is for inference; add --program and one of {', '.join(INFERENCE)}")
        return self._programs[self.program_name]

    @property
    def _programs(self) -> Mapping[str, Compilable]:
        programs: Mapping[str, Compilable] = getattr(stage_class(self.config), "abstract_programs", {})
        if not programs:
            raise DeepGenError(
                f"a {type(self.config).__name__} has no programs to compile; name a configuration of stage 1, 2 or 3"
            )
        return programs


class Job:
    """One program on one mesh, traced but not compiled."""

    def __init__(self, request: Request, devices: Sequence[Any]) -> None:
        """Traces the program.

        Args:
          request: what.
          devices: for which; they may be absent.

        Raises:
          DeepGenError: the parts of the request do not fit together.
        """
        self._request, self._start = request, time.monotonic()
        self._mesh: Mesh = make_mesh(request.mesh_text, devices)
        host_share(self._mesh)  # A mesh whose batches hosts cannot share is refused in training, too.
        sizes, source = model_sizes(request.config)
        if request.quantization is not None:
            sizes = dataclasses.replace(sizes, quantization=request.quantization)
        config = request.choice.applied(request.config)
        run = AbstractRun(config, sizes, self._mesh, request.prompt_tokens, request.batch, request.stacked)
        program = request.compilable.make(run)
        self._program = dataclasses.replace(program, summary=(source, str(request.choice), *program.summary))
        self._lowered = program.lower()

    @property
    def latency_hiding(self) -> bool:
        """As for `deepgen_jax.parallel.jit_options`."""
        return self._program.latency_hiding

    def compile(self, options: dict[str, Any]) -> Report:
        """Runs the whole compilation.

        Raises:
          DeepGenError: the compiler fails for a reason other than memory.
        """
        try:
            compiled = self._lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            return self.report(None, needed_bytes(str(error), shard_bytes(self._program.arguments)))
        stats = compiled.memory_analysis()
        total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
        return self.report(compiled.as_text(), total + stats.output_size_in_bytes - stats.alias_size_in_bytes)

    def report(self, text: str | None, total: float) -> Report:
        """The report of a compilation.

        Args:
          text: the optimised program; None if the compiler ran out of memory before.
          total: bytes a device that the program and its arguments take.

        Raises:
          DeepGenError: the text cannot be estimated.
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
            program.summary,
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
        """Changes that would take less memory; they are not compiled here."""
        mesh, program = self._mesh, self._program
        advice = ["to take less memory (--search compiles and ranks such choices):"]
        if program.trains and self._request.choice.remat != "full":
            advice.append("remat=full, which recomputes activations in the backward pass")
        advice += program.advice
        each = program.micro_batch // batch_size_multiple(mesh)
        if each > 1:
            advice.append(f"{program.half_batch}: {each // 2} instead of {each} at once on each device")
        if mesh.shape["data"] > 1:
            held = sum(shard_bytes(tree) for kind, tree in program.memory.items() if kind != "batch")
            tensor = f",tensor={mesh.shape['tensor']}" if mesh.shape["tensor"] > 1 else ""
            advice.append(
                f"--mesh data={mesh.shape['data'] // 2},fsdp={mesh.shape['fsdp'] * 2}{tensor}: weights and optimiser, "
                f"now {held / 2**30:.1f} GiB a device, are split over twice as many"
            )
        if len(advice) == 1:
            advice.append("more devices: each sample has its own device already, and weights are split over all")
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
    """Bytes that a program and its arguments need, from the compiler's out-of-memory error.

    Args:
      message: the error, which gives either the total or the temporaries alone.
      arguments: bytes of the arguments.

    Raises:
      DeepGenError: it is a different error.
    """
    whole = re.search(r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of", message)
    temporaries = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)i?B?\)", message)
    found = whole or temporaries
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        reason = " ".join(message.split())[:300]
        raise DeepGenError(f"the compiler failed: {reason}")
    return float(found[1]) * _UNITS[found[2]] + (0.0 if whole else arguments)


def largest(request: Request, run: Callable[[Request], Report], say: Callable[[str], None]) -> Report:
    """The report of the largest batch that fits, in as many micro-batches as the configuration says.

    Args:
      request: its batch is ignored.
      run: compiles a request.
      say: prints a line about each attempt.

    Raises:
      DeepGenError: not even one sample a device fits.
    """
    pieces = request.topology.size // parse_mesh(request.mesh_text)["tensor"]
    unit = request.compilable.smallest_batch(request.config, pieces)
    reports: dict[int, Report] = {}

    def fits(count: int) -> bool:
        reports[count] = report = run(dataclasses.replace(request, batch=count * unit))
        verdict = "fits" if report.fits else "does not fit"
        say(f"{report.micro_batch // pieces} at once on a device: {report.needed / 2**30:.1f} GiB, {verdict}")
        return report.fits

    best = bisect(fits)
    if not best:
        raise DeepGenError(f"not even one sample a device fits on {request.topology}; {reports[1].advice[-1]}")
    return reports[best]


def bisect(fits: Callable[[int], bool], most: int = 256) -> int:
    """The largest number from 1 to ``most`` for which the monotonic ``fits`` is true; 0 if none."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
