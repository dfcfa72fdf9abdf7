"""Runs `deepgen` commands that arrive as JSON lines on stdin, and answers each with its output as a user would see it.

One process runs many commands, so that imports are paid once. Image models are replaced by a cheap stand-in: what is
tested is everything around them. The answer holds the exit status, stderr, seconds and the peak of memory.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def peak_mib() -> float:
    """Peak memory since `reset_peak`, in MiB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def replace_model() -> None:
    """Replaces the pipeline of every command by a fake; options, files and outputs stay real."""
    from support.fake_pipeline import FakePipeline

    from deepgen_jax.cli import image_run

    if not hasattr(image_run, "load_pipeline"):
        raise AttributeError("image_run.load_pipeline has moved: replace the model where the command line loads it")
    image_run.load_pipeline = lambda *args, **kwargs: FakePipeline()


def run(argv: list[str], folder: str) -> dict:
    from deepgen_jax.cli.main import main

    os.chdir(folder)
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        reset_peak()
        start = time.perf_counter()
        try:
            status: int | str = main(argv)
        except SystemExit as end:
            status = f"SystemExit {end.code}"
        except BaseException:
            status = traceback.format_exc()
        seconds = time.perf_counter() - start
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(saved[0], 1), os.dup2(saved[1], 2)
        os.close(saved[0]), os.close(saved[1])
        err.seek(0), out.seek(0)
        return {
            "status": status,
            "stderr": err.read(200_000).decode("utf-8", "replace"),
            "stdout": out.read(20_000).decode("utf-8", "replace"),
            "seconds": seconds,
            "peak_mib": peak_mib(),
        }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    replace_model()
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps(run(case["argv"], case["folder"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
