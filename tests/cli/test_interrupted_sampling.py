"""``deepgen generate`` in a process that is killed or interrupted, around a stand-in for the pipeline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TESTS = Path(__file__).parents[1]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


SCRIPT = """
import sys
from support.fake_pipeline import FakePipeline, check_prompt
from deepgen_jax.stores import model_folder
from deepgen_jax.cli import image_run, sampling
from deepgen_jax.cli.main import main
from deepgen_jax.config import DeepGenConfig, MMDiTConfig
sampling.open_model = lambda folder: (DeepGenConfig(mmdit=MMDiTConfig(sample_size=8)), check_prompt)
image_run.load_pipeline = lambda *args: FakePipeline(seconds=float(sys.argv[1]))
sys.exit(main(sys.argv[2:]))
"""


def start(folder: Path, seconds: float, *words: str) -> subprocess.Popen:
    words = ("generate", "model", "--prompts", "p.txt", "--out", "out", "--dtype", "float32", *words)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(seconds), *words], cwd=folder, env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(folder: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 30
    while len(list((folder / "out").glob("*.png"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: np.asarray(Image.open(path)).tobytes() for path in sorted(folder.glob("*.png"))}


def test_killed_and_resumed(tmp_path: Path):
    prompts = "".join(f"prompt {i}\n" for i in range(12))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
        (folder / "p.txt").write_text(prompts)
    for count in (1, 4, 7):
        process = start(killed, 0.05, "--batch-size", "2", "--size", "256")
        wait_for(killed, count, process)
        process.kill()
        process.communicate()
        for path in (killed / "out").glob("*.png"):
            Image.open(path).load()
    for folder in (killed, whole):
        process = start(folder, 0, "--batch-size", "2", "--size", "256")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert pixels(killed / "out") == pixels(whole / "out")
    assert len(pixels(whole / "out")) == 12

    def told(folder: Path) -> list[dict]:
        lines = [json.loads(line) for line in (folder / "out/metadata.jsonl").read_text().splitlines()]
        return sorted(lines, key=lambda line: line["file"])

    assert told(killed) == [{**line, "model": told(killed)[0]["model"]} for line in told(whole)]
    assert files(killed / "out") == files(whole / "out")


@pytest.mark.parametrize(
    ("signum", "name", "status"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_a_signal_lets_the_batch_finish(tmp_path: Path, signum: int, name: str, status: int):
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(40)))
    process = start(tmp_path, 0.3, "--batch-size", "2")
    wait_for(tmp_path, 2, process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    made = len(pixels(tmp_path / "out"))
    assert 2 <= made < 40
    assert made % 2 == 0
    assert f"deepgen: {name}: finishing the current batch; once more stops at once" in err
    text = f"{made} of 40 images are in out; run the same command for the rest"
    assert f"deepgen: stopped by {name}: {text}" in err
    assert "Traceback" not in err


def test_a_second_signal_stops_at_once(tmp_path: Path):
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(8)))
    process = start(tmp_path, 1.0, "--batch-size", "2")
    wait_for(tmp_path, 2, process)
    time.sleep(0.3)  # into the next batch
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(pixels(tmp_path / "out")) == 2


@pytest.mark.parametrize(("signum", "name", "status"), [(2, "Ctrl-C", 130), (15, "SIGTERM", 143)])
@pytest.mark.parametrize("busy", [False, True])
def test_a_signal_while_one_image_is_made(tmp_path: Path, signum: int, name: str, status: int, busy: bool):
    """Also while the main thread runs no Python, as in a compiled program."""
    work = "hashlib.pbkdf2_hmac('sha512', b'', b'', 20_000_000)" if busy else "sleep(seconds)"
    script = (
        "import time, hashlib, pathlib; sleep = time.sleep\n"
        f"time.sleep = lambda seconds: (pathlib.Path('started').touch(), {work})\n{SCRIPT}"
    )
    words = ["generate", "model", "a cat", "--dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, "20", *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(TESTS)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    start = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - start < 4
    assert (process.returncode, err.strip()) == (status, f"deepgen: stopped by {name}")
    assert files(tmp_path) == ["started"]
