"""The training benchmark agrees with its PyTorch peer; the cache's and the 8-bit benchmark count what they print."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmark(name, *arguments)` runs a script in this process; ``benchmark.module(name)`` imports one."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
        importlib.import_module(name).main()

    run.module = importlib.import_module
    return run


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("training", (), "--preset"),
        ("training", ("--preset", "tiny", "--batch-size", "0"), "'0'"),
        ("training", ("--preset", "tiny", "--size", "70"), "multiples of 32"),
        ("training", ("--preset", "tiny", "--remat", "all"), "all"),
        ("training", ("--preset", "tiny", "--table"), "--peer torch"),
        ("cache", ("--steps", "4"), "--preset"),
        ("cache", ("--model", "no-such-folder"), "no-such-folder"),
        ("quantized_scores", ("--variants", "int4"), "int4"),
    ],
)
def test_bad_arguments_end_in_one_line(name, arguments, named, benchmark, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark(name, *arguments)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert named in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_both_sides_have_the_same_losses_and_gradients(benchmark, capsys):
    arguments = ("--preset", "tiny", "--size", "64x32", "--batch-size", "2", "--repetitions", "1", "--peer", "torch")
    benchmark("training", *arguments)
    result = json.loads(capsys.readouterr().out)
    peer = result["peer"]
    assert result["loss"] == pytest.approx(result["steps"][0], rel=1e-5)
    assert peer["loss_difference"] < 1e-5
    assert set(peer["gradients"]) == {"bridge", "mmdit"}
    for row in peer["gradients"].values():
        assert row["rms"] < 1e-4
        assert row["max"] < 1e-4
    # The first update moves every parameter by the learning rate, whatever its gradient.
    assert peer["steps_difference"] < 1e-3
    assert result["steps"][-1] < result["steps"][0]
    assert set(result["seconds"]) == set(peer["seconds"]) == {"loss and gradient", "step"}


def test_psnr_by_hand(benchmark):
    cache = benchmark.module("cache")
    wanted = cache.Run(np.zeros((2, 4, 4, 3)), 1.0, 1.0)
    found = cache.Run(np.stack([np.full((4, 4, 3), 0.1), np.full((4, 4, 3), 0.01)]), 2.0, 0.5)
    assert cache.psnr(found, wanted) == {"psnr": pytest.approx(22.97, abs=0.01), "worst": 20.0}


@pytest.mark.slow
def test_the_cache_saves_what_was_asked(benchmark, capsys):
    words = ("--model", "nano", "--size", "32", "--steps", "12", "--seeds", "1", "--saving", "1.5")
    benchmark("cache", *words, "--prompt", "a red circle")
    whole, *cached, fewer = json.loads(capsys.readouterr().out)["rows"]
    assert whole["psnr"] is None
    assert [row["setting"].endswith("taylor") for row in cached] == [False, True]
    for row in cached:
        assert 1.5 <= row["saving"] < 2.5
        assert row["psnr"] > 20
    assert fewer["setting"] == "8 steps"
    assert fewer["saving"] == 1.5


def test_paired_differences_by_hand(benchmark):
    compare = benchmark.module("quantized_scores").compare
    stored = np.array([True] * 6 + [False] * 4)
    right = np.array([True] * 5 + [False] + [True] * 2 + [False] * 2)
    row = compare(right, stored)
    assert (row["right"], row["lost"], row["gained"]) == (7, 1, 2)
    assert row["points"] == pytest.approx(10)
    assert row["interval"] == pytest.approx(100 * 1.96 * np.std([0] * 5 + [-1, 1, 1, 0, 0]) / np.sqrt(10))
