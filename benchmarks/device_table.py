"""Writes the tables of docs/performance_accelerators.md about a GPU from docs/data/device.json.

    benchmarks/device.sh --out device.json
    python benchmarks/device_table.py --add device.json   # keeps it as docs/data/device.json, and writes the tables
    python benchmarks/device_table.py                     # writes the tables

Without a file, or without a result in it, a row says "not measured".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "docs/data/device.json", ROOT / "docs/performance_accelerators.md"
_BEGIN, _END = "<!-- device -->", "<!-- end of device -->"
_MISSING = "not measured"

Results = Mapping[tuple[str, str], Mapping[str, Any]]
#: (row, part, name) of programs, at each batch.
_PROGRAMS = (
    ("4 evaluations: sampler", "few", "sampler"),
    ("4 evaluations: prompts", "few", "prompts"),
    ("decoder", "few", "decoder"),
    ("sampler, int8 products", "int8-products", "sampler"),
    ("sampler, int8 weights", "int8", "sampler"),
    ("sampler, fp8 products", "fp8-products", "sampler"),
)
_TRAINING = (("step of stage 2", "step", "step"), ("RL update", "update", "update"))
_SHAPES = ("joint", "joint, four times the pixels", "image", "prompt")


def results_of(content: Mapping[str, Any]) -> Results:
    """Results that were measured, by part and name."""
    found = content.get("results", [])
    return {(each["part"], each["name"]): each for each in found if each["status"] == "ok"}


def tables(content: Mapping[str, Any]) -> str:
    """All tables."""
    results, batches = results_of(content), (1, 8) if content.get("size", "full") == "full" else (1, 2)
    device = content.get("environment", {}).get("device", {}).get("kind")
    versions = content.get("environment", {}).get("versions", {})
    date = content.get("environment", {}).get("date", "")[:10]
    where = f"{device}, {date}, jax {versions.get('jax')}." if device else "No GPU was at hand: nothing is measured."
    blocks = [where, _images(results, batches), _programs(results, batches), _attention(results)]
    return "\n\n".join(blocks)


def _images(results: Results, batches: Sequence[int]) -> str:
    """Whole images of 50 guided steps, ours and PyTorch's in the same run."""
    lines = [
        "| whole images | batch | ours, s | PyTorch, s | ratio | evaluated | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for batch in batches:
        ours = results.get(("generate", f"ours, batch {batch}"))
        row = [_MISSING, "", "", "", ""]
        if ours:
            row = [f"{ours['seconds']['end_to_end']['median']:.3f}", "", "", "100%", _memory(ours)]
        lines.append(_line("50 guided steps", batch, row))
        for name in ("eager", "compiled"):
            found = results.get(("generate", f"PyTorch {name}, batch {batch}"))
            row = [_MISSING, "", "", "", ""]
            if found:
                peer = found["peer"]
                ratio = peer["peer_seconds_over_ours"]["end_to_end"]["median"]
                seconds = (side["seconds"]["end_to_end"]["median"] for side in (found, peer))
                row = [*(f"{value:.3f}" for value in seconds), f"{ratio:.2f}", "", ""]
            lines.append(_line(f"against PyTorch, {name}", batch, row))
        for threshold in (0.08, 0.3):
            found = results.get(("generate", f"cache {threshold}, batch {batch}"))
            row = [_MISSING, "", "", "", ""]
            if found:
                row = [f"{found['seconds']:.3f}", "", "", f"{found['evaluated']:.0%}", ""]
            lines.append(_line(f"block cache {threshold}", batch, row))
    return "\n".join(lines)


def _programs(results: Results, batches: Sequence[int]) -> str:
    lines = ["| program | batch | seconds | MFU | peak GiB |", "| --- | --- | --- | --- | --- |"]
    rows: list[tuple[str, str, str, str]] = [
        (label, part, f"{name}, batch {batch}", str(batch)) for label, part, name in _PROGRAMS for batch in batches
    ]
    rows += [(label, part, name, "") for label, part, name in _TRAINING]
    for label, part, name, batch in rows:
        found = results.get((part, name))
        row = [_MISSING, "", ""]
        if found:
            mfu = "" if found["mfu"] is None else f"{found['mfu']:.2f}"
            row = [f"{found['seconds']:.3f}", mfu, _memory(found)]
            batch = f"{found['batch']} {found['unit']}" if "batch" in found else batch
        lines.append(_line(label, batch, row))
    return "\n".join(lines)


def _attention(results: Results) -> str:
    """Errors are the largest differences from attention in float32."""
    lines = [
        "| attention | fused, ms | XLA, ms | error fused | error XLA |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in _SHAPES:
        found = results.get(("attention", name))
        row = [_MISSING, "", "", ""]
        if found:
            times = (f"{1000 * found[f'{kind}_seconds']:.3f}" for kind in ("fused", "xla"))
            row = [*times, *(f"{found[f'{kind}_max_error']:.1e}" for kind in ("fused", "xla"))]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines)


def _line(label: str, batch: object, row: Sequence[str]) -> str:
    return f"| {label} | {batch} | {' | '.join(row)} |"


def _memory(found: Mapping[str, Any]) -> str:
    """Peak memory of the device in the process up to this result; of the host where a device does not report it."""
    memory = found["peak_memory"]
    return f"{(memory['device_bytes'] or memory['host_bytes']) / 2**30:.1f}"


def page_with(page: str, content: Mapping[str, Any]) -> str:
    """The page with the tables between their marks."""
    before, rest = page.split(_BEGIN)
    return f"{before}{_BEGIN}\n{tables(content)}\n{_END}{rest.split(_END)[1]}"


def read() -> dict[str, Any]:
    """The kept results; empty without a file."""
    content: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8")) if DATA.is_file() else {}
    return content


def main(arguments: Sequence[str]) -> int:
    """Keeps results, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, metavar="RESULTS", help="JSON of device.sh")
    parser.add_argument("--print", action="store_true", help="print the tables, and write nothing")
    options = parser.parse_args(arguments)
    content = json.loads(options.add.read_text(encoding="utf-8")) if options.add else read()
    if options.print:
        print(tables(content))
        return 0
    if options.add:
        if content["size"] != "full":
            parser.error(f"{options.add} is of the {content['size']} model, a rehearsal; only --print it")
        DATA.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), content), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
