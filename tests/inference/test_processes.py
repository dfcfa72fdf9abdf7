"""Several processes together make the same images as one."""

from __future__ import annotations

import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import runs

MAKE = """
import sys
import jax
import numpy as np
from PIL import Image
from deepgen_jax import DeepGenPipeline
from deepgen_jax.parallel import hosts
jax.config.update("jax_cpu_enable_async_dispatch", False)
folder, out, mesh, coordinator, count, process = sys.argv[1:]
hosts.join(coordinator, int(count), int(process))
pipe = DeepGenPipeline.from_pretrained(folder, dtype="float32", mesh=mesh)
reference = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8))
kept = {}
for name, image in (("generated", None), ("edited", [[reference], [reference]])):
    made = pipe(["a red fox", "snow"], image=image, height=64, width=64, num_inference_steps=3, output_type="np")
    kept |= {name: made.latents, f"{name}-images": made.images}
np.savez(f"{out}-{process}.npz", **kept)
"""


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def make(folder, out, mesh, count):
    address = free_address() if count > 1 else ""
    words = [sys.executable, "-c", MAKE, str(folder), str(out), mesh, address, str(count if count > 1 else 0)]
    numbers = range(count) if count > 1 else (-1,)
    started = [
        subprocess.Popen(
            [*words, str(i)], env=runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in numbers
    ]
    for process in started:
        runs.finish(process)
    return [np.load(f"{out}-{i}.npz") for i in numbers]


@pytest.mark.slow
def test_two_and_four_processes(tmp_path):
    model = runs.write_model(tmp_path)
    (alone,) = make(model, tmp_path / "alone", "data=1", 1)
    for mesh, count in (("data=1,fsdp=2", 2), ("data=2,fsdp=2", 4)):
        for made in make(model, tmp_path / mesh, mesh, count):
            for name in ("generated", "edited"):
                np.testing.assert_allclose(made[name], alone[name], rtol=1e-5, atol=1e-5, err_msg=f"{mesh} {name}")
                # A value between two bytes may round to either.
                assert np.abs(made[f"{name}-images"].astype(int) - alone[f"{name}-images"]).max() <= 1


def generate(*words, numbers=(None,), extra=((), ()), status=0):
    """Runs ``deepgen generate`` in one process per entry of ``numbers``; returns their output."""
    address, started = free_address(), []
    for number, more in zip(numbers, extra, strict=False):
        others = [] if number is None else ["--coordinator", address, "--num-processes", "2", "--process-id"]
        command = [sys.executable, "-m", "deepgen_jax.cli.main", "generate", *map(str, words), *more, *others]
        command += [] if number is None else [str(number)]
        started.append(
            subprocess.Popen(
                command, env=runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return [runs.finish(process, status) for process in started]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
def test_the_command_line_of_two_processes(tmp_path):
    model = runs.write_model(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\nsnow\na house by the sea\n")
    words = (model, "--prompts", prompts, "--size", "64", "--steps", "3", "--batch-size", "2", "--out")
    generate(*words, tmp_path / "alone")
    first, second = generate(*words, tmp_path / "both", numbers=(0, 1))
    assert "3 images written" in first
    assert "images" not in second
    for name in ("00000.png", "00001.png", "00002.png"):
        assert np.abs(pixels(tmp_path / "both" / name) - pixels(tmp_path / "alone" / name)).max() <= 1
    assert len((tmp_path / "both/metadata.jsonl").read_text().splitlines()) == 3

    (tmp_path / "both/00001.png").unlink()
    first, _ = generate(*words, tmp_path / "both", numbers=(0, 1))
    assert "1 image written" in first
    assert "2 there already" in first

    one_file = (model, "snow", "--size", "64", "--steps", "3", "--out", tmp_path / "snow.png")
    first, second = generate(*one_file, numbers=(0, 1))
    assert [str(tmp_path / "snow.png") in text.splitlines() for text in (first, second)] == [True, False]
    for text in generate(*one_file, numbers=(0, 1), extra=((), ("--steps", "4")), status=2):
        assert "processes were asked for different images" in text
    first, second = generate(*one_file, numbers=(0, 1), status=2)
    assert "snow.png exists" in first
    assert "snow.png exists" in second
