"""Runs the parts of `device_parts.py` one after another within a time limit, and writes results as they come.

See `device.sh`. The result is a JSON object: ``size``, ``environment`` (of the first part that gets as far), and
``results``, a list of objects with ``part``, ``name``, ``status`` ("ok", "failed" or "skipped"), and either what was
measured or the ``reason``.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
#: Parts in order of worth, and seconds after which each is stopped.
PARTS: Mapping[str, int] = {
    "attention": 75,
    "generate": 240,
    "few": 90,
    "step": 110,
    "int8-products": 80,
    "update": 110,
    "int8": 80,
    "fp8-products": 80,
}
#: A part that has less time than this is not started.
_LEAST_SECONDS = 20

Result = dict[str, Any]


def run_part(
    part: str, command: Sequence[str], limit: float, on_line: Callable[[Result], None], log: Path | None = None
) -> None:
    """Runs a process that prints results as lines of JSON; passes on each, and a last one if the process fails.

    Args:
      part: name that results carry.
      command: the process.
      limit: seconds after which it and its children are stopped.
      on_line: called with each result as it is printed.
      log: file that the process's stderr is appended to; None for this process's stderr.
    """
    errors = None if log is None else log.open("ab")
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (line := lines.get(timeout=max(limit - (time.monotonic() - start), 0.01))) is not None:
            found = _result(line)
            if found is not None:
                on_line({"part": part, "status": "ok", **found})
        status = process.wait()
        if status:
            on_line({"part": part, "name": "", "status": "failed", "reason": f"exit status {status}"})
    except queue.Empty:
        on_line({"part": part, "name": "", "status": "failed", "reason": f"stopped after {limit:.0f} s"})
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if errors is not None:
            errors.close()


def _result(line: str) -> Result | None:
    """The object on a line; None for what libraries print."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class Report:
    """The file of results, replaced whenever one is added."""

    def __init__(self, path: Path, size: str) -> None:
        self._path = path
        self.content: Result = {"size": size, "environment": {}, "results": []}
        self._write()

    def add(self, result: Result) -> None:
        """Adds a result."""
        if "environment" in result:
            self.content["environment"] = self.content["environment"] or result["environment"]
        else:
            self.content["results"].append(result)
            reason = f": {result['reason']}" if "reason" in result else ""
            print(f"{result['part']} {result['name']}: {result['status']}{reason}", file=sys.stderr, flush=True)
        self._write()

    def _write(self) -> None:
        part = self._path.with_name(f"{self._path.name}.part")
        part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        part.replace(self._path)


def run_all(
    report: Report, commands: Mapping[str, Sequence[str]], minutes: float, log: Path, patience: float = 1.0
) -> None:
    """Runs a process for each part within ``minutes``; parts that there is no time for are recorded as skipped.

    ``patience`` multiplies the limits of the parts.
    """
    end = time.monotonic() + 60 * minutes
    for part, command in commands.items():
        left = end - time.monotonic()
        if left < _LEAST_SECONDS:
            report.add({"part": part, "name": "", "status": "skipped", "reason": "no time left"})
            continue
        run_part(part, command, min(patience * PARTS.get(part, left), left), report.add, log)


def main(arguments: Sequence[str]) -> int:
    """Runs the parts; 0 if any result is ok."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="model (default: full)")
    parser.add_argument("--minutes", type=float, default=10.0, help="limit of all parts (default: 10)")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of the limits of parts (default: 1)")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    options = parser.parse_args(arguments)
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    report, script = Report(options.out, options.size), str(_HERE / "device_parts.py")
    commands = {part: [sys.executable, script, part, "--size", options.size] for part in options.parts}
    run_all(report, commands, options.minutes, options.out.with_suffix(".log"), options.patience)
    return 0 if any(result["status"] == "ok" for result in report.content["results"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
