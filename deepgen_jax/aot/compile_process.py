"""Compiles in a process of its own, and ends it as soon as the compiler has written what there is to know.

Most of a compiler's time goes into machine code, after the program is optimised and its memory is assigned: ten minutes
of twelve for a training step on a TPU. XLA can write the optimised program and the memory it takes to a folder before
that; nothing later changes either.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from deepgen_jax.aot.compile import Job, Request
from deepgen_jax.aot.report import Report
from deepgen_jax.aot.topology import describe
from deepgen_jax.errors import DeepGenError

_SECONDS_BETWEEN_LOOKS = 0.5


def compile_apart(request: Request) -> Report:
    """The report of a program for the devices of ``request.topology``; after ``topology.prepare``.

    Raises:
      DeepGenError: the program cannot be made of what was asked for, or its compiler fails.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="deepgen-compile-") as folder:
        process = context.Process(target=_compile, args=(request, folder, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            found = ours.recv()
        except EOFError:
            process.join()
            raise DeepGenError(
                f"the compiler ended with status {process.exitcode} and said nothing; is there enough memory?"
            ) from None
        finally:
            process.kill()
            process.join()
    if isinstance(found, str):
        raise DeepGenError(found)
    return found


def _compile(request: Request, folder: str, answer: Connection) -> None:
    """The other process: answers with a report or with what went wrong, once."""
    lock = threading.Lock()

    def tell(what: Report | str) -> None:
        with lock:
            answer.send(what)
            # The compiler is still at work in another thread and cannot be asked to stop.
            os._exit(0)

    try:
        job = Job(request, describe(request.topology))
        options = request.topology.options(job.gathers_ahead) | {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        threading.Thread(target=lambda: tell(_watched(job, Path(folder))), daemon=True).start()
        tell(job.compile(options))
    except DeepGenError as error:
        tell(str(error))
    except Exception as error:
        tell(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _watched(job: Job, folder: Path) -> Report | str:
    """Waits for the compiler's files."""
    while (found := _written(folder)) is None:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    try:
        return job.report(*found)
    except Exception as error:  # a thread's error would be lost
        return f"the optimised program cannot be read: {type(error).__name__}: {error}"


def _written(folder: Path) -> tuple[str, float] | None:
    """(optimised program, bytes it takes with its arguments), once both are there as a whole."""
    reports = list(folder.glob("module_*.jit_*after_optimizations-memory-usage-report.txt"))
    texts = list(folder.glob("module_*.jit_*after_optimizations.txt"))
    if not reports or not texts:
        return None
    text = texts[0].read_text(encoding="utf-8")
    if not text.rstrip().endswith("}"):
        return None
    return text, total_bytes(reports[0].read_text(encoding="utf-8"))


def total_bytes(report: str) -> float:
    """HBM that a program takes with its arguments, from XLA's memory usage report."""
    found = re.search(r"Total bytes(?: used)?: (\d+)", report)
    if found is None:
        raise DeepGenError("XLA's memory usage report does not tell a total; this JAX version writes another form")
    return float(found[1])
