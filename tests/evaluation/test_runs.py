"""Benchmark runs in processes: killed and resumed; on several devices and in two processes the images are the same."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import benchmark_data as data
from support import runs

from deepgen_jax.evaluation.run import RECORDS

TESTS = Path(__file__).parents[1]
SCRIPT = """
import sys
from support.fake_pipeline import FakePipeline, check_prompt
from deepgen_jax.cli import eval as eval_command, image_run
from deepgen_jax.cli.main import main
from deepgen_jax.config import DeepGenConfig
eval_command.open_model = lambda folder: (DeepGenConfig(), check_prompt)
image_run.load_pipeline = lambda *args: FakePipeline(seconds=float(sys.argv[1]))
sys.exit(main(sys.argv[2:]))
"""


def images(out: Path) -> dict[str, np.ndarray]:
    """Pixels of the tree's pictures by file."""
    return {path.relative_to(out).as_posix(): np.asarray(Image.open(path)).astype(int) for path in out.rglob("*.png")}


def start(name: str, given: Path, out: Path, seconds: float) -> subprocess.Popen:
    words = ["eval", name, "model", "--data", str(given), "--out", str(out), "--name", data.MODEL, "--size", "64"]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(seconds), *words, "--dtype", "float32", "--batch-size", "1"],
        env={**os.environ, "PYTHONPATH": str(TESTS)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dpg", "gedit"])
def test_killed_runs_go_on_where_they_were(name: str, tmp_path: Path):
    (tmp_path / "data").mkdir()
    given = data.WRITERS[name](tmp_path / "data")
    runs.finish(start(name, given, tmp_path / "whole", 0.0))
    out = tmp_path / "out"
    wanted = 12 if name == "dpg" else 3
    metadata = out / RECORDS / "metadata.jsonl"
    killed = start(name, given, out, 0.3)
    deadline = time.monotonic() + 60
    while not metadata.exists() or len(metadata.read_text().splitlines()) < 1 + wanted // 6:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait(30)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    made = len(metadata.read_text().splitlines())
    printed = runs.finish(start(name, given, out, 0.0))
    assert 0 < made < wanted
    assert f"{made} there already" in printed or f"{made + 1} there already" in printed
    # Nothing finished was touched, nothing is left over, and the result is that of a run that was not killed.
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items() if path.exists())
    assert not [path for path in out.rglob("*") if "tmp" in path.name]
    whole, resumed = images(tmp_path / "whole"), images(out)
    assert whole.keys() == resumed.keys()
    for file, pixels in whole.items():
        np.testing.assert_array_equal(resumed[file], pixels, err_msg=file)


def evaluate(words: list[str], devices: int = 1, processes: int = 1) -> list[str]:
    """Runs ``deepgen eval`` in separate processes; returns their output."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    others = ["--coordinator", address, "--num-processes", str(processes), "--process-id"]
    command = [sys.executable, "-m", "deepgen_jax.cli.main", "eval", *words]
    started = [
        subprocess.Popen(
            [*command, *([*others, str(i)] if processes > 1 else [])],
            env=runs.environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    return [runs.finish(process) for process in started]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["geneval", "gedit"])
def test_images_are_those_of_one_device(name: str, tmp_path: Path):
    (tmp_path / "data").mkdir()
    given = data.WRITERS[name](tmp_path / "data")
    model = runs.write_model(tmp_path)
    words = [name, str(model), "--data", str(given), "--name", data.MODEL, "--size", "64", "--steps", "2"]
    words += ["--dtype", "float32", "--batch-size", "8"]
    evaluate([*words, "--out", str(tmp_path / "one")])
    evaluate([*words, "--out", str(tmp_path / "eight"), "--mesh", "data=8"], devices=8)
    first, second = evaluate([*words, "--out", str(tmp_path / "both")], processes=2)
    assert "written to" in first
    assert "written to" not in second
    one = images(tmp_path / "one")
    assert len(one) == (12 if name == "geneval" else 6)
    for other in ("eight", "both"):
        found = images(tmp_path / other)
        assert found.keys() == one.keys()
        for file, pixels in one.items():
            # A value between two bytes may round to either.
            assert np.abs(found[file] - pixels).max() <= 1, (other, file)
