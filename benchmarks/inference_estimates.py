"""Estimated time and memory of one image on absent accelerators: the tables of docs/performance_accelerators.md.

    python benchmarks/inference_estimates.py --topology h100:1   # compiles what is missing with `deepgen compile`
    python benchmarks/inference_estimates.py                     # writes the tables from docs/data/inference.json

docs/data/inference.json is a list of compiled programs, one a command: seconds of a run, memory in GiB and traffic in
GB, all of the device. An image takes the sum of prompts, sampler ("inference") and decoder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "docs/data/inference.json", ROOT / "docs/performance_accelerators.md"
_FEW, _MANY = "4", "50, guided"
_STEPS = {
    _FEW: ("samples.num_inference_steps=4", "samples.guidance_scale=1", "samples.sampler=pi_flow"),
    _MANY: ("samples.num_inference_steps=50",),
}
_WEIGHTS = {"bfloat16": (), "int8": ("--quantize", "int8"), "int8, products": ("--quantize", "int8", "--products")}
_TOPOLOGIES = {"h100:1": "H100", "v6e:1x1": "TPU v6e", "v5e:1x1": "TPU v5e"}
_PROGRAMS = ("prompts", "inference", "decoder")

Row = dict[str, Any]


class Image(NamedTuple):
    """A row of the table of images: topology, storage of the weights, images at once, and evaluations an image."""

    topology: str
    weights: str
    batch: int
    steps: str

    def words(self, program: str) -> tuple[str, ...]:
        """Arguments of ``deepgen compile`` for one of its programs; the decoder's depend on the batch alone."""
        weights = () if program == "decoder" else _WEIGHTS[self.weights]
        steps = _STEPS[_FEW if program == "decoder" else self.steps]
        place = ("--topology", self.topology, "--program", program, "--batch", str(self.batch))
        return ("sft", *steps, *place, *weights)


def images() -> Iterator[Image]:
    """All rows of the table of images."""
    for topology in _TOPOLOGIES:
        yield from (Image(topology, weights, 1, _FEW) for weights in _WEIGHTS)
        if topology != "v5e:1x1":
            yield Image(topology, "bfloat16", 8, _FEW)
            yield from (Image(topology, "bfloat16", batch, _MANY) for batch in (1, 8))


def copied() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Arguments of the sampler of 50 guided steps on an H100 with stacked and with split layers."""
    words = Image("h100:1", "bfloat16", 1, _MANY).words("inference")
    return (*words, "--stacked"), words


def command(words: Sequence[str]) -> str:
    """The command of arguments, as a report quotes it."""
    return " ".join(("deepgen", "compile", *words))


def compiled(words: Sequence[str]) -> Row:
    """Compiles a program and returns its row."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        print(command(words), file=sys.stderr, flush=True)
        program = [sys.executable, "-m", "deepgen_jax.cli.main", "compile", *words, "--json", str(report)]
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
        return row_of(words, json.loads(report.read_text(encoding="utf-8")))


def row_of(words: Sequence[str], report: dict[str, Any]) -> Row:
    """The row of a report of ``deepgen compile --json``."""
    from deepgen_jax.aot.topology import compiler_versions, parse_topology

    memory, gib = report["memory"], 2**30
    row: Row = {
        "command": command(words),
        "weights_gib": round(memory["frozen weights"] / gib, 2),
        "work_gib": round((memory["total"] - memory["frozen weights"]) / gib, 3),
        "limit_gib": round(memory["limit"] / gib, 1),
    }
    if estimate := report.get("estimate"):
        row |= {
            "seconds": round(estimate["seconds"], 5),
            "tflop": round(estimate["operations"] / 1e12, 2),
            "tflop_8_bit": round(estimate["eight_bit"] / 1e12, 2),
            "hbm_gb": round(estimate["memory"] / 1e9, 1),
            "copies_gb": round(estimate["moved"] / 1e9, 2),
        }
    date = datetime.now(UTC).date().isoformat()
    topology = parse_topology(words[words.index("--topology") + 1])
    return row | {"compiled": f"{date}, {compiler_versions(topology)}"}


def image_table(rows: Sequence[Row]) -> str:
    """The table of images; programs without a row are "not compiled"."""
    known = {row["command"]: row for row in rows}
    lines = [
        "| device | weights | images | evaluations | GiB | prompts | sampler | decoder | seconds an image |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for image in images():
        found = [known.get(command(image.words(program)), {}) for program in _PROGRAMS]
        seconds = [row.get("seconds") for row in found]
        times = ["not compiled" if value is None else f"{value:.3f}" for value in seconds]
        memory = total = ""
        if found[1]:
            # Weights of all parts stay on the device; the programs run one after another.
            needed = found[1]["weights_gib"] + max(row.get("work_gib", 0.0) for row in found)
            memory = f"{needed:.1f} of {found[1]['limit_gib']}"
        if None not in seconds:
            total = f"{sum(filter(None, seconds)) / image.batch:.3f}"
        where = (_TOPOLOGIES[image.topology], image.weights, image.batch, image.steps)
        lines.append(f"| {' | '.join(map(str, where))} | {memory} | {' | '.join(times)} | {total} |")
    return "\n".join(lines)


def copies_table(rows: Sequence[Row]) -> str:
    """Copies of the sampler on an H100 before and after layers are split."""
    known = {row["command"]: row for row in rows}
    lines = ["| layers | copies a step, GB | HBM a step, GB | seconds a step |", "| --- | --- | --- | --- |"]
    for name, words in zip(("stacked", "split"), copied(), strict=True):
        row = known.get(command(words))
        values = ["not compiled", "", ""]
        if row is not None:
            digits = {"copies_gb": 2, "hbm_gb": 1, "seconds": 4}
            values = [f"{row[key] / 50:.{count}f}" for key, count in digits.items()]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def page_with(page: str, rows: Sequence[Row]) -> str:
    """The page with both tables between their marks."""
    for name, table in (("images", image_table(rows)), ("copies", copies_table(rows))):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return page


def main(arguments: Sequence[str]) -> int:
    """Compiles programs, or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", choices=sorted(_TOPOLOGIES), help="compile the programs of this device")
    parser.add_argument("--match", default="", metavar="TEXT", help="only commands with this text, such as 'batch 8'")
    parser.add_argument("--again", action="store_true", help="compile those that are there, too")
    options = parser.parse_args(arguments)
    rows: list[Row] = json.loads(DATA.read_text(encoding="utf-8")) if DATA.is_file() else []
    if options.topology is None:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
        return 0
    needed = [image.words(program) for image in images() if image.topology == options.topology for program in _PROGRAMS]
    needed += copied() if options.topology == "h100:1" else ()
    there = set() if options.again else {row["command"] for row in rows}
    for words in dict.fromkeys(needed):
        if command(words) in there or options.match not in command(words):
            continue
        new = compiled(words)
        rows = [row for row in rows if row["command"] != new["command"]] + [new]
        # One row a line, written after each so that an interruption loses none.
        DATA.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
