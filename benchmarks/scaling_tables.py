"""Writes the table of docs/scale.md from docs/data/scaling.json, and adds reports of ``deepgen compile`` to the latter.

    python benchmarks/scaling_tables.py                                # the table of docs/scale.md
    python benchmarks/scaling_tables.py --all                          # all rows, to the terminal
    deepgen compile sft --topology v6e:8x8 --json report.json
    python benchmarks/scaling_tables.py --add report.json              # a row, or a new one of the same command

docs/data/scaling.json is a list of rows: memory in GiB and bytes sent in GB a device and run, arithmetic in TFLOP a
device, seconds a run; the rows whose ``shown`` is true are in the page.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "docs/data/scaling.json", ROOT / "docs/scale.md"
_MARKS = ("<!-- table -->", "<!-- end -->")
_PROGRAMS = {"pretrain": "stage 1", "sft": "stage 2", "grpo": "GRPO"}
_HEADER = (
    "| program | topology | mesh | batch | GiB a device | sent, GB | TFLOP | seconds | a second | MFU |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)

Row = dict[str, Any]


def row_of(report: dict[str, Any], compiled: dict[str, str]) -> Row:
    """A row of a report of ``deepgen compile --json``.

    Args:
      report: of one program.
      compiled: date and versions.
    """
    config, *words = report["command"].split()[2:]
    settings = [word for word in words if re.match(r"(remat|gather_frozen|data\.image_size|samples\.size)=", word)]
    stage = _PROGRAMS.get(config, config)
    name = report["program"]
    program = {"step": stage, "update": f"{stage} update", "rollout": f"{stage} rollout"}.get(name, name)
    memory, estimate, gib = report["memory"], report["estimate"], 2**30
    kinds = {"weights": ("trainable weights", "moving average", "frozen weights"), "optimiser": ("optimiser",),
             "gradients": ("gradients",), "activations": ("activations and work space",), "total": ("total",),
             "limit": ("limit",)}  # fmt: skip
    sent = {kind: estimate["collectives"].get(kind, {"bytes": 0.0})["bytes"] for kind in (
        "all-gather", "reduce-scatter", "all-reduce"
    )}  # fmt: skip
    seconds = {"arithmetic": "arithmetic_seconds", "hbm": "memory_seconds", "device": "device_seconds",
               "network": "network_seconds", "estimate": "seconds"}  # fmt: skip
    return {
        "shown": False,
        "program": ", ".join([program, *settings]),
        "topology": re.sub(r" \(\d+ \w+\)$", "", report["topology"]),
        "mesh": ",".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1),
        "batch": report["batch"]["size"],
        "memory_gib": {
            key: round(sum(memory.get(kind, 0.0) for kind in names) / gib, 2) for key, names in kinds.items()
        },
        "sent_gb": {kind: round(number / 1e9, 2) for kind, number in sent.items()},
        "tflop": {
            "model": round(report["model_flops"] / report["devices"] / 1e12, 1),
            "computed": round(estimate["operations"] / 1e12, 1),
        },
        "seconds": {key: round(estimate[name], 3) for key, name in seconds.items()},
        "per_second": round(report["samples_per_second"], 2),
        "mfu": round(report["mfu"], 3),
        "mfu_bound": round(report["mfu_bound"], 3),
        "command": report["command"],
        "compiled": compiled,
    }


def added(rows: Sequence[Row], new: Row) -> list[Row]:
    """The rows with a new one, which replaces that of the same command or is appended."""
    places = [place for place, row in enumerate(rows) if row["command"] == new["command"]]
    if not places:
        return [*rows, new]
    place = places[0]
    return [*rows[:place], {**new, "shown": rows[place]["shown"]}, *rows[place + 1 :]]


def table(rows: Sequence[Row], commands: bool = True) -> str:
    """Markdown of rows, and below it their commands."""
    lines = list(_HEADER)
    for row in rows:
        memory, sent = row["memory_gib"], sum(row["sent_gb"].values())
        lines.append(
            f"| {row['program']} | {row['topology']} | {row['mesh']} | {row['batch']} | {memory['total']:.1f} of "
            f"{memory['limit']:.1f} | {sent:.0f} | {row['tflop']['model']:.0f} / {row['tflop']['computed']:.0f} | "
            f"{row['seconds']['estimate']:.2f} | {row['per_second']:.4g} | {row['mfu']:.2f} |"
        )
    if commands:
        lines += ["", "```sh", *(row["command"] for row in rows), "```"]
    return "\n".join(lines)


def page_with(page: str, rows: Sequence[Row]) -> str:
    """The page with the table of the shown rows between its marks."""
    begin, end = _MARKS
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table([row for row in rows if row['shown']])}\n{end}{after}"


def read_rows() -> list[Row]:
    rows: list[Row] = json.loads(DATA.read_text(encoding="utf-8"))
    return rows


def write_rows(rows: Sequence[Row]) -> None:
    """One row a line, so that changes can be read."""
    DATA.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n", encoding="utf-8")


def versions(report: dict[str, Any]) -> dict[str, str]:
    """Current date and versions."""
    from deepgen_jax.aot.topology import compiler_versions, parse_topology

    topology = parse_topology(re.sub(r" .*", "", report["topology"]))
    jax, compiler = compiler_versions(topology).split(" and ")
    return {"date": datetime.now(UTC).date().isoformat(), "jax": jax.removeprefix("jax "), "compiler": compiler}


def main(arguments: Sequence[str]) -> int:
    """Adds reports, and writes or prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="+", default=[], metavar="REPORT", help="JSON of deepgen compile")
    parser.add_argument("--all", action="store_true", help="print all rows")
    options = parser.parse_args(arguments)
    rows = read_rows()
    for name in options.add:
        report = json.loads(Path(name).read_text(encoding="utf-8"))
        rows = added(rows, row_of(report, versions(report)))
    if options.add:
        write_rows(rows)
    if options.all:
        print(table(rows))
    else:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
