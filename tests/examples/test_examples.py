"""The scripts and the notebook of examples/ run on nano."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.services import wait_until

from deepgen_jax import DeepGenPipeline
from deepgen_jax.serving.app import create_app
from deepgen_jax.serving.engine import PipelineEngine
from deepgen_jax.serving.server import BackgroundServer

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def run(script: str, folder: Path, *words: str) -> list[str]:
    command = [sys.executable, str(EXAMPLES / script), *words]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_generate(tmp_path):
    assert run("generate.py", tmp_path) == ["generated.png"]
    sheet = Image.open(tmp_path / "generated.png")
    assert sheet.size == (4 * sheet.height, sheet.height)


def test_edit_chain(tmp_path):
    assert len(run("edit_chain.py", tmp_path)) == 2
    images = [np.asarray(Image.open(tmp_path / f"edited_{step}.png")) for step in range(3)]
    assert all((one != other).any() for one, other in pairwise(images))


def test_openai_client(tmp_path):
    app = create_app(lambda: PipelineEngine(DeepGenPipeline.from_pretrained("nano"), "nano"))
    with BackgroundServer(app) as server:
        wait_until(lambda: app.state.service.state == "ready", 120)
        made = run("openai_client.py", tmp_path, "--url", f"{server.url}/v1")
    assert made == [f"served_{name}.png" for name in ("preview_0", "preview_1", "image", "edited")]
    before, after = (np.asarray(Image.open(tmp_path / f"served_{name}.png")) for name in ("image", "edited"))
    half = before.shape[1] // 2
    np.testing.assert_array_equal(after[:, half:], before[:, half:])
    assert (after[:, :half] != before[:, :half]).any()


def test_notebook(tmp_path, monkeypatch):
    """Its cells run in order; Jupyter itself is not needed."""
    notebook = json.loads((EXAMPLES / "first_look.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "committed without outputs"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["edited"].size == names["images"][0].size


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_script_says_what_it_does(path):
    assert path.read_text(encoding="utf-8").startswith('"""')
