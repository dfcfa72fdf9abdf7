"""A tiny model memorises 8 pictures with captions and 4 edits, through the packaged configurations."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from deepgen_jax import DeepGenPipeline
from deepgen_jax.convert import export

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def overfit(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("overfit")


def test_samples_become_the_pictures(overfit, tmp_path):
    """PSNR to the targets: within 3 dB of the autoencoder's own, which is a good one, and far from other targets."""
    overfit.prepare(tmp_path, seed=0)
    for name in overfit.STAGES:
        overfit.train_stage(tmp_path, name, 0, lambda line: None)
    export(tmp_path / overfit.LAST, "model", tmp_path / "trained")
    pipeline = DeepGenPipeline.from_pretrained(tmp_path / "trained")
    ratios = overfit.compare(pipeline, overfit.read_samples(tmp_path / "example")).psnr()
    means = {name: values.mean() for name, values in ratios.items()}
    assert means["reconstructions"] >= 25
    assert means["samples"] >= min(25, means["reconstructions"] - 3), ratios
    # Pictures of the wrong prompt, and edits left undone, are far below.
    assert means["swapped"] < 12
    assert means["references"] < means["samples"] - 5
