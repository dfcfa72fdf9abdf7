"""Search over meshes and rematerialisation: compiles each choice and ranks those that fit by estimated time."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from deepgen_jax.aot.compile import Request
from deepgen_jax.aot.program_report import Report
from deepgen_jax.aot.topology import Topology
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models.stack import Remat
from deepgen_jax.parallel.chips import GIB, GPUS_PER_HOST
from deepgen_jax.training.auto_settings import AUTO

#: Rematerialisation, least memory first. On GPUs "flash" is the same as "full".
REMAT: tuple[Remat, ...] = ("full", "flash", "mlp", "dots", "none")


def meshes(topology: Topology) -> Iterator[str]:
    """Candidate meshes as text.

    Weights are split over 8, 16 or all chips of a slice, or over the GPUs of one, four or all hosts; heads over at most
    four devices. "data" spans slices.
    """
    size, slices = topology.size // topology.slices, topology.slices
    usual = (GPUS_PER_HOST, 4 * GPUS_PER_HOST) if topology.gpu else (8, 16)
    spans = {min(size, span) for span in (*usual, size)}
    for fsdp in sorted(span for span in spans if size % span == 0):
        yield _text(slices * size // fsdp, fsdp, 1)
    tensor = min(4, size)
    fsdp = min(spans) // tensor
    if fsdp > 1:
        yield _text(slices * size // fsdp // tensor, fsdp, tensor)


def search(request: Request, run: Callable[[Request], Report], say: Callable[[str], None]) -> list[Report]:
    """All reports, best first: those that fit by estimated time, then the others by memory.

    Compiles every mesh with every rematerialisation, and the best choice again with ``gather_frozen``.

    Args:
      request: only its mesh is tried, if it has one.
      run: compiles a request.
      say: prints a line about each attempt.

    Raises:
      DeepGenError: no choice can be compiled.
    """
    gathered = getattr(request.config, "gather_frozen", None)
    # On GPUs "auto" is false.
    common = {"gather_frozen": False} if gathered == AUTO and not request.topology.gpu else {}
    found: list[_Choice] = []
    problems: list[str] = []

    def attempt(mesh: str, **settings: Any) -> Report | None:
        words = tuple(f"{name}={str(value).lower()}" for name, value in settings.items())
        config = dataclasses.replace(request.config, **settings)
        command = _command(request.command, mesh, words)
        try:
            report = run(dataclasses.replace(request, config=config, mesh=mesh, command=command))
        except DeepGenError as error:
            problems.append(f"{mesh}: {error}")
            say(problems[-1])
            return None
        report.choice = " ".join((mesh, *words)) if report.trains else mesh
        found.append(_Choice(report, mesh, settings))
        time = f"{report.estimate.seconds:.3f} s" if report.estimate else "out of memory"
        say(f"{report.choice}: {report.needed / GIB:.1f} GiB, {'fits' if report.fits else 'does not fit'}, {time}")
        return report

    for mesh in [request.mesh] if request.mesh else list(meshes(request.topology)):
        for remat in REMAT:
            if remat == "flash" and request.topology.gpu:
                continue
            report = attempt(mesh, remat=remat, **common)
            if report is None or not report.trains:
                break
    if not found:
        raise DeepGenError(f"no mesh of {request.topology} can be compiled: {problems[0]}")
    best = min(found, key=lambda choice: _rank(choice.report))
    split = best.report.program == "step" and best.report.mesh["fsdp"] > 1
    if split and best.report.fits and gathered in (AUTO, False):
        attempt(best.mesh, **{**best.settings, "gather_frozen": True})
    return sorted((choice.report for choice in found), key=_rank)


class _Choice(NamedTuple):
    """A report with the settings of the run."""

    report: Report
    mesh: str
    settings: dict[str, Any]


def ranking(reports: list[Report]) -> str:
    """A table with one line for each choice."""
    lines = [f"{'choice':<48}{'GiB':>8}{'fits':>6}{'seconds':>10}{'MFU':>7}"]
    for report in reports:
        seconds = f"{report.estimate.seconds:.3f}" if report.estimate else "-"
        mfu = f"{report.mfu:.3f}" if report.mfu else "-"
        fits = "yes" if report.fits else "no"
        lines.append(f"{report.choice:<48}{report.needed / GIB:>8.2f}{fits:>6}{seconds:>10}{mfu:>7}")
    return "\n".join(lines)


def _command(command: str, mesh: str, settings: tuple[str, ...]) -> str:
    """The command that compiles only one choice."""
    words = [word for word in shlex.split(command) if word != "--search"]
    words[3:3] = settings
    return shlex.join(words if "--mesh" in words else [*words, "--mesh", mesh])


def _rank(report: Report) -> tuple[bool, float]:
    if report.fits and report.estimate:
        return False, report.estimate.seconds
    return True, report.needed


def _text(data: int, fsdp: int, tensor: int) -> str:
    return f"data={data},fsdp={fsdp}" + (f",tensor={tensor}" if tensor > 1 else "")
