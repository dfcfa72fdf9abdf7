"""``deepgen convert`` and ``deepgen export`` from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepgen_jax.cli.main import main
from deepgen_jax.stores.model_folder import read_manifest


def test_convert_and_export(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--qwen", data_dir / "qwen2_5_vl", "--sd3", data_dir / "sd3_5_kontext", "--checkpoint",
             data_dir / "model.pt", "--hparams", data_dir / "deepgen_config.json", "--out", tmp_path / "m"]  # fmt: skip
    assert main(["convert", *map(str, words), "--lora-alpha", "4", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr()
    assert not shown.err
    assert "merged 276 adapters in float32 (alpha 4)" in shown.out
    assert "superseded by the checkpoint: 488 tensors of" in shown.out
    assert f"wrote {tmp_path / 'm'}" in shown.out
    options = read_manifest(tmp_path / "m").provenance["options"]
    assert options == {"keep_lora": False, "dtype": "bfloat16", "lora_alpha": 4.0, "ema": False}

    out = tmp_path / "all.pth"
    assert main(["export", str(tmp_path / "m"), "--format", "pth", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert out.stat().st_size > 10**6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "--diffusers", "/nowhere", "--out", "{out}"], "--diffusers: /nowhere does not exist"),
        (["convert", "--out", "{out}"], "give either --diffusers, or --qwen and --sd3"),
        (["export", "/nowhere", "--format", "pth", "--out", "{out}"], "/nowhere is not a folder"),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(out=tmp_path / "m") for word in words]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith(f"deepgen: error: {message}")
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "m").exists()
