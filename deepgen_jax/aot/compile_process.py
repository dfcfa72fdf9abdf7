"""Compilation in a subprocess that ends once the optimised program and its memory are known.

Most of a compilation is code generation, after optimisation and buffer assignment: ten minutes of twelve for a training
step on a TPU. XLA dumps the optimised program and its memory usage before that, and neither changes afterwards.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from deepgen_jax.aot.compile import Job, Request
from deepgen_jax.aot.program_report import Report
from deepgen_jax.aot.topology import describe
from deepgen_jax.errors import DeepGenError

_POLL_SECONDS = 0.5


def compile_in_subprocess(request: Request) -> Report:
    """The report of a program for the devices of ``request.topology``; after ``topology.prepare``.

    Raises:
      DeepGenError: the request does not fit together, or the compiler fails.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="deepgen-compile-") as folder:
        process = context.Process(target=_compile, args=(request, folder, sender), daemon=True)
        process.start()
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:
            process.join()
            raise DeepGenError(
                f"the compiler ended with status {process.exitcode} and no message; is there enough memory?"
            ) from None
        finally:
            process.kill()
            process.join()
    if isinstance(result, str):
        raise DeepGenError(result)
    return result


def _compile(request: Request, folder: str, sender: Connection) -> None:
    """Entry point of the subprocess: sends one report, or one error message, and exits."""
    lock = threading.Lock()

    def finish(result: Report | str) -> None:
        with lock:
            sender.send(result)
            # The other thread is inside the compiler, which cannot be interrupted.
            os._exit(0)

    def work() -> Report:
        job = Job(request, describe(request.topology))
        options = request.topology.compiler_options(job.latency_hiding)
        options |= {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        watch = partial(_report_of_dump, job, Path(folder))
        threading.Thread(target=lambda: finish(_guarded(watch)), daemon=True).start()
        return job.compile(options)

    finish(_guarded(work))


def _guarded(run: Callable[[], Report]) -> Report | str:
    """A report, or the message of whatever prevented it: the parent process has nothing but what is sent to it."""
    try:
        return run()
    except DeepGenError as error:
        return str(error)
    except Exception as error:
        return f"the compilation failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _report_of_dump(job: Job, folder: Path) -> Report:
    """Waits for the dumped files and reads them."""
    while (found := _read_dump(folder)) is None:
        time.sleep(_POLL_SECONDS)
    return job.report(*found)


def _read_dump(folder: Path) -> tuple[str, float] | None:
    """(optimised program, bytes it takes with its arguments), once both files are complete."""
    reports = list(folder.glob("module_*.jit_*after_optimizations-memory-usage-report.txt"))
    texts = list(folder.glob("module_*.jit_*after_optimizations.txt"))
    if not reports or not texts:
        return None
    text = texts[0].read_text(encoding="utf-8")
    if not text.rstrip().endswith("}"):
        return None
    return text, total_bytes(reports[0].read_text(encoding="utf-8"))


def total_bytes(report: str) -> float:
    """HBM that a program takes with its arguments, from XLA's memory usage report.

    Raises:
      DeepGenError: the report has a different format.
    """
    found = re.search(r"Total bytes(?: used)?: (\d+)", report)
    if found is None:
        raise DeepGenError("XLA's memory usage report has no total; install versions of JAX listed in setup.py")
    return float(found[1])
