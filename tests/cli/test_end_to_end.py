"""The command line with a real model folder, against the pipeline called from Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepgen_jax.cli import image_run
from deepgen_jax.cli.main import main
from deepgen_jax.inference.outputs import read_metadata


@pytest.fixture
def model(folders, pipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model folder whose pipeline is loaded already; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(image_run, "load_pipeline", lambda *args: pipelines("sft"))
    return str(folders("sft"))


def pixels(image: Path | str | Image.Image) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, (str, Path)) else image).astype(int)


def again(pipe, metadata: dict) -> np.ndarray:
    """Regenerates the image from its metadata."""
    out = pipe(
        metadata["prompt"],
        image=[Image.open(path) for path in metadata["images"]] or None,
        negative_prompt=metadata["negative_prompt"],
        height=metadata["height"],
        width=metadata["width"],
        num_inference_steps=metadata["steps"],
        guidance_scale=metadata["guidance"],
        seed=metadata["seed"],
        padding=metadata["padding"],
        reference_posterior=metadata.get("reference_posterior", "mean"),
    )
    return pixels(out.images[0])


def test_generate(model: str, pipelines):
    assert main(["generate", model, "a red fox", "--steps", "2", "--seed", "5", "--size", "32"]) == 0
    metadata = read_metadata(Path("image.png"))
    assert metadata is not None
    assert pixels("image.png").shape == (32, 32, 3)
    np.testing.assert_array_equal(pixels("image.png"), again(pipelines("sft"), metadata))


def test_edit(model: str, pipelines):
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (32, 32)), ("b.png", (64, 32))):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(name)
    words = ["--image", "a.png", "--image", "b.png", "--steps", "2", "--reference-posterior", "sample"]
    assert main(["edit", model, "make it blue", *words]) == 0
    metadata = read_metadata(Path("image.png"))
    assert metadata is not None
    assert pixels("image.png").shape == (32, 32, 3)
    np.testing.assert_array_equal(pixels("image.png"), again(pipelines("sft"), metadata))


def test_a_batch_is_made_again_from_its_metadata(model: str, pipelines):
    Image.new("RGB", (32, 32), "orange").save("a.png")
    lines = [
        {"prompt": "a fox", "seed": 3},
        {"prompt": "a very much longer prompt about an owl on a branch at night", "negative_prompt": "day"},
        {"prompt": "a house", "num_images": 2, "seed": 11},
        {"prompt": "make it blue", "image": "a.png"},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--size", "32", "--steps", "2", "--out", "out", "--batch-size", "3"]
    assert main(["generate", model, "--prompts", "p.jsonl", *words]) == 0
    told = [json.loads(line) for line in Path("out/metadata.jsonl").read_text().splitlines()]
    assert len(told) == 5
    for metadata in told:
        assert metadata == read_metadata(Path("out") / metadata["file"])
        # Rounding to 8 bits may tip at another batch size.
        assert np.abs(pixels(Path("out") / metadata["file"]) - again(pipelines("sft"), metadata)).max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["word " * 10_000], "tokens long, the model reads 1024; shorten it"),
        (["a <|image_pad|>"], "reserved token <|image_pad|>"),
        (["a fox", "--size", "4096"], "this model takes at most 384 a side"),
    ],
)
def test_refusals(model: str, capsys: pytest.CaptureFixture, words: list[str], message: str):
    assert main(["generate", model, *words, "--steps", "1"]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("deepgen: error: ")
    assert message in captured
    assert captured.count("\n") == 1
    assert not list(Path().iterdir())


def test_in_a_separate_process(folders, pipelines, tmp_path: Path):
    """Loading, the mesh option and the compilation cache as a user meets them."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    words = ["a red fox", "--steps", "2", "--size", "32", "--mesh", "fsdp=2", "--compilation-cache", "kept"]
    command = [sys.executable, "-m", "deepgen_jax.cli.main", "generate", str(folders("sft")), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "image.png\n", "")
    metadata = read_metadata(tmp_path / "image.png")
    assert metadata is not None
    assert metadata["dtype"] == "float32"
    assert np.abs(pixels(tmp_path / "image.png") - again(pipelines("sft"), metadata)).max() <= 1
    assert any((tmp_path / "kept").iterdir())
