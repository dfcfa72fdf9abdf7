"""The node pack as ComfyUI drives it: discovery, input types, execution; against a service with a fake model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.fake_engine import FakeEngine, image_of
from support.services import noise, wait_until

from deepgen_jax.serving.app import create_app
from deepgen_jax.serving.server import BackgroundServer

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
#: Types of inputs that ComfyUI knows and that these nodes use.
TYPES = {"STRING", "INT", "FLOAT", "IMAGE", "MASK"}


@pytest.fixture(scope="module")
def pack():
    """The package loaded as ComfyUI loads a folder of custom_nodes: by its path, under a different name."""
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_deepgen", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def url(engine):
    app = create_app(lambda: engine)
    with BackgroundServer(app) as server:
        wait_until(lambda: app.state.service.state == "ready", 120)
        yield server.url


def execute(pack, name: str, **given):
    """Runs a node as ComfyUI's executor does: defaults for what is not given, types checked, `FUNCTION` called."""
    node = pack.NODE_CLASS_MAPPINGS[name]
    values = {}
    for group, inputs in node.INPUT_TYPES().items():
        for key, (kind, *rest) in inputs.items():
            options = rest[0] if rest else {}
            if key in given:
                values[key] = given.pop(key)
                if kind in ("INT", "FLOAT"):
                    assert options.get("min", values[key]) <= values[key] <= options.get("max", values[key])
            elif "default" in options:
                values[key] = options["default"]
            else:
                assert group == "optional", f"{key} is required"
    assert not given, "unknown inputs"
    outputs = getattr(node(), node.FUNCTION)(**values)
    assert isinstance(outputs, tuple)
    assert len(outputs) == len(node.RETURN_TYPES)
    return outputs


def batch(*arrays: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays).astype(np.float32) / 255)


def test_the_protocol(pack):
    assert set(pack.NODE_CLASS_MAPPINGS) == set(pack.NODE_DISPLAY_NAME_MAPPINGS)
    for node in pack.NODE_CLASS_MAPPINGS.values():
        assert callable(getattr(node, node.FUNCTION))
        assert node.CATEGORY
        assert set(node.RETURN_TYPES) <= TYPES
        inputs = node.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional", "hidden"}
        for group in inputs.values():
            for kind, *options in group.values():
                assert isinstance(kind, list) or kind in TYPES
                assert all(isinstance(entry, dict) for entry in options)
        # ComfyUI sends the inputs of all nodes to the browser.
        assert json.dumps(inputs)


def test_generate(pack, url, engine):
    (images,) = execute(pack, "DeepGenGenerate", prompt="a fox", width=64, height=96, seed=5, num_images=2, server=url,
                        steps=9, guidance=2.5, sampler="heun", negative_prompt="snow")  # fmt: skip
    jobs = [job for ran in engine.batches for job in ran]
    assert images.shape == (2, 96, 64, 3)
    assert images.dtype == torch.float32
    for image, job in zip(images, jobs, strict=True):
        np.testing.assert_array_equal(np.rint(image.numpy() * 255), image_of(job))
    assert [(j.seed, j.steps, j.guidance, j.sampler, j.negative_prompt) for j in jobs] == [
        (seed, 9, 2.5, "heun", "snow") for seed in (5, 6)
    ]


def test_zeros_take_the_models_own_settings(pack, url, engine):
    (images,) = execute(pack, "DeepGenGenerate", prompt="a fox", width=0, height=0, server=url)
    job = engine.batches[0][0]
    assert images.shape == (1, 64, 64, 3)
    assert (job.steps, job.guidance, job.sampler) == (4, 1.0, "euler")


def test_edit_with_references_and_a_mask(pack, url, engine):
    first, second, mask = noise(64, 96), noise(32, 32), np.zeros((1, 96, 64), np.float32)
    mask[0, 10:30, 20:40] = 1
    (images,) = execute(pack, "DeepGenEdit", image=batch(first), prompt="make it blue", seed=3, server=url,
                        mask=torch.from_numpy(mask), reference_1=batch(second, second), strength=0.5)  # fmt: skip
    job = engine.batches[0][0]
    assert images.shape == (1, 96, 64, 3)
    np.testing.assert_array_equal(np.asarray(job.source), first)
    np.testing.assert_array_equal(job.mask, mask[0] == 1)
    assert [image.size for image in job.images] == [(64, 96), (32, 32), (32, 32)]
    assert job.strength == 0.5


def test_a_batch_is_edited_image_by_image(pack, url, engine):
    pictures = [noise(64, 64), np.full((64, 64, 3), 9, np.uint8)]
    (images,) = execute(pack, "DeepGenEdit", image=batch(*pictures), prompt="x", server=url, num_images=2)
    assert images.shape == (4, 64, 64, 3)
    sources = {job.images[0].tobytes() for ran in engine.batches for job in ran}
    assert sources == {Image.fromarray(picture).tobytes() for picture in pictures}


def test_errors_say_what_is_wrong(pack, url):
    with pytest.raises(RuntimeError, match="'prompt' is missing or empty"):
        execute(pack, "DeepGenGenerate", prompt="", width=0, height=0, server=url)
    with pytest.raises(RuntimeError, match="start it with: deepgen serve"):
        execute(pack, "DeepGenGenerate", prompt="x", width=0, height=0, server="http://127.0.0.1:1")
    with pytest.raises(RuntimeError, match="write http://HOST:PORT"):
        execute(pack, "DeepGenGenerate", prompt="x", width=0, height=0, server="localhost")
    with pytest.raises(RuntimeError, match="go together"):
        execute(pack, "DeepGenGenerate", prompt="x", width=64, height=0, server=url)


def test_comfyui_needs_no_further_package():
    """Only modules that ComfyUI has are imported."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['deepgen_jax', 'httpx', 'openai', 'jax', 'requests']));"
        "import importlib; importlib.import_module('comfyui')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FOLDER.parent)
