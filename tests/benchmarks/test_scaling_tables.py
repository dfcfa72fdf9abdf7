"""Tables of docs/scale.md are those of its data, and reports of `deepgen compile` become rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "scaling_tables", Path(__file__).parents[2] / "benchmarks" / "scaling_tables.py"
)
tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tables)


def test_the_page_shows_eight_rows_of_its_data():
    rows, page = tables.read_rows(), tables.PAGE.read_text(encoding="utf-8")
    assert sum(row["shown"] for row in rows) == 8
    assert tables.page_with(page, rows) == page, "run python benchmarks/scaling_tables.py"
    assert len(page.encode()) <= 10_240


def test_rows_are_whole():
    rows = tables.read_rows()
    assert len({row["command"] for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() == rows[0].keys()
        memory = row["memory_gib"]
        kinds = sum(memory[kind] for kind in ("weights", "optimiser", "gradients", "activations"))
        assert kinds == pytest.approx(memory["total"], abs=0.21)
        assert row["seconds"]["estimate"] >= max(row["seconds"][key] for key in ("arithmetic", "hbm")) - 0.011
        assert row["tflop"]["computed"] >= 0.99 * row["tflop"]["model"]
        assert row["mfu"] <= row["mfu_bound"]


def test_a_report_becomes_a_row(tmp_path, monkeypatch, capsys):
    report = {
        "command": "deepgen compile sft remat=flash --topology v6e:8x8 --slices 2", "program": "step",
        "topology": "v6e:8x8 x 2 slices (128 chips)", "devices": 128, "mesh": {"data": 8, "fsdp": 16, "tensor": 1},
        "batch": {"size": 768}, "memory": {"trainable weights": 2**30, "frozen weights": 2**29, "total": 2**31,
        "limit": 2**35}, "estimate": {"collectives": {"all-gather": {"bytes": 3e9}}, "operations": 4e12,
        "arithmetic_seconds": 0.1, "memory_seconds": 0.2, "device_seconds": 0.3, "network_seconds": 0.1,
        "seconds": 0.4}, "model_flops": 128 * 2e12, "samples_per_second": 1920.0, "mfu": 0.25, "mfu_bound": 0.5,
    }  # fmt: skip
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report), encoding="utf-8")
    monkeypatch.setattr(tables, "DATA", tmp_path / "scaling.json")
    tables.write_rows([])
    assert tables.main(["--add", str(file), "--all"]) == 0
    assert tables.main(["--add", str(file), "--all"]) == 0
    (row,) = tables.read_rows()
    assert (row["program"], row["topology"], row["mesh"]) == (
        "stage 2, remat=flash", "v6e:8x8 x 2 slices", "data=8,fsdp=16"
    )  # fmt: skip
    assert row["memory_gib"]["weights"] == 1.5
    assert row["sent_gb"] == {"all-gather": 3.0, "reduce-scatter": 0.0, "all-reduce": 0.0}
    assert row["tflop"] == {"model": 2.0, "computed": 4.0}
    assert "| 2.0 of 32.0 | 3 | 2 / 4 | 0.40 | 1920 | 0.25 |" in capsys.readouterr().out
