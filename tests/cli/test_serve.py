"""``deepgen serve`` as a process: it answers, and ends on SIGTERM once what it accepted is answered."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from support.services import pixels, wait_until

from deepgen_jax.cli.main import main

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def test_answers_and_a_graceful_stop(pipelines, folders, tmp_path: Path):
    command = [sys.executable, "-m", "deepgen_jax.cli.main", "serve", str(folders("sft")), "--port", "0"]
    options = ["--max-batch", "1", "--model-name", "gpt-image-1"]
    with (tmp_path / "errors").open("w") as errors_file:
        process = subprocess.Popen(
            [*command, *options], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors_file, text=True
        )
    try:
        assert process.stdout is not None
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        answers = []
        with httpx.Client(base_url=url, timeout=100) as client:
            wait_until(lambda: client.get("/ready").status_code == 200, 100)
            fields = {"prompt": "a red fox", "size": "64x64", "num_inference_steps": 2, "model": "gpt-image-1"}

            def ask(seed: int) -> None:
                answers.append((seed, client.post("/v1/images/generations", json={**fields, "seed": seed})))

            ask(1)
            threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2, 6)]
            for thread in threads:
                thread.start()
            wait_until(lambda: "deepgen_running_images 1.0" in client.get("/metrics").text)
            process.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    errors = (tmp_path / "errors").read_text()
    assert process.returncode == 0, errors
    assert "accepted requests were finished" in output
    pipe = pipelines("sft")
    finished = [(seed, answer) for seed, answer in answers if answer.status_code == 200]
    assert len(finished) >= 2
    for seed, answer in finished:
        want = pipe("a red fox", height=64, width=64, num_inference_steps=2, seed=seed, output_type="np").images[0]
        np.testing.assert_array_equal(pixels(answer.json()["data"][0]["b64_json"]), want)
    for _, answer in answers:
        assert answer.status_code in (200, 503)
    log = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert len([line for line in log if line["status"] == 200 and line["method"] == "POST"]) == len(finished)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-batch", "0"], "max_batch is 0; use 1 or more"),
        (["--deadline", "-1"], "use more than 0"),
        (["--api-keys", "absent.txt"], "key file absent.txt cannot be read"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_options_that_are_refused(words, message, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_told(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_damaged_weights_are_told(folders, tmp_path: Path):
    folder = tmp_path / "damaged"
    shutil.copytree(folders("sft"), folder)
    files = [path for path in (folder / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(b"")
    words = [sys.executable, "-m", "deepgen_jax.cli.main", "serve", str(folder), "--port", "0"]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("deepgen: error: ")
    assert done.stderr.count("\n") == 1
