"""``deepgen info``."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepgen_jax.cli.info import lines
from deepgen_jax.cli.main import main
from deepgen_jax.config import DeepGenConfig, LoRAConfig, SchedulerConfig
from deepgen_jax.stores.model_folder import Manifest, PartSummary


def test_a_converted_folder(folders, capsys: pytest.CaptureFixture):
    folder = folders("sft")
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for part in ("text", "vision", "bridge", "mmdit", "vae", "unused"):
        summary = facts["parameters"][part]
        assert f"{summary['count']:,}" in text
        assert sum(summary["dtypes"].values()) == summary["count"]
    used = [summary for part, summary in facts["parameters"].items() if part != "unused"]
    assert facts["total"]["count"] == sum(summary["count"] for summary in used)
    assert f"total           {facts['total']['count']:>14,}" in text
    assert facts["config"]["text"]["num_layers"] == 36
    assert facts["scheduler"]["shift"] == 3.0
    for wanted in ("36 layers, hidden 32", "128 think tokens", "shift 3", "deepgen_sft.pth (mmengine checkpoint"):
        assert wanted in text
    assert "276 adapters merged into the weights" in text


def test_adapters_that_are_kept(folders, capsys: pytest.CaptureFixture):
    assert main(["info", str(folders("sft_adapters"))]) == 0
    text = capsys.readouterr().out
    assert "LoRA            kept apart, rank 4, alpha 8" in text
    assert "LoRA adapters" in text


def test_full_size_figures():
    sizes = {"text": 3_085_938_688, "mmdit": 2_470_000_000, "unused": 311_000_000}
    parameters = {part: PartSummary(count, 2 * count, {"bfloat16": count}) for part, count in sizes.items()}
    config = dataclasses.replace(DeepGenConfig(), lora=LoRAConfig())
    scheduler = SchedulerConfig(use_dynamic_shifting=True)
    text = "\n".join(lines(Path("deepgen"), Manifest(config, {}, parameters), scheduler))
    assert "language model   3,085,938,688    6.17 GB  bfloat16" in text
    assert "total            5,555,938,688   11.11 GB  bfloat16" in text
    assert "24 layers (13 with dual attention), hidden 1536, 24 heads, images up to 6144 pixels a side" in text
    assert "kept apart, rank 64, alpha 128" in text
    assert "dynamic shift 0.5 to 1.15" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.mkdir(), "is not a model folder"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{")), "config.json cannot be read"),
        (
            lambda folder: (
                folder.mkdir(),
                (folder / "config.json").write_text('{"format": "deepgen-jax", "version": 1}'),
            ),
            "config.json is damaged",
        ),
    ],
)
def test_wrong_folders(tmp_path: Path, capsys: pytest.CaptureFixture, make, message: str):
    make(tmp_path / "model")
    assert main(["info", str(tmp_path / "model")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("deepgen: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_it_is_quick(folders):
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "deepgen_jax.cli.main", "info", folders("sft")], check=True)
    assert time.monotonic() - start < 2
