"""Reading model folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.checksums import unverified
from deepgen_jax.stores.model_folder import load_lora, load_params, read_manifest, read_scheduler


@pytest.fixture
def folder(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(folders("none"), tmp_path / "m")
    return tmp_path / "m"


def test_parts_and_dtypes(folders: Callable[[str], Path]) -> None:
    params = load_params(folders("none"))
    assert set(params) == {"text", "vision", "bridge", "mmdit", "vae"}
    assert params["mmdit"]["proj_out"]["kernel"].dtype == jnp.bfloat16
    assert params["bridge"]["meta_queries"].dtype == jnp.float32
    cast = load_params(folders("none"), ("mmdit", "unused"), jnp.float32)
    assert set(cast) == {"mmdit", "unused"}
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {np.dtype(np.float32)}
    stored = params["mmdit"]["proj_out"]["kernel"].astype(jnp.float32)
    np.testing.assert_array_equal(cast["mmdit"]["proj_out"]["kernel"], stored)


def test_arrays_come_with_the_sharding_asked_for(folders: Callable[[str], Path]) -> None:
    mesh = jax.make_mesh((1,), ("fsdp",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    params = load_params(folders("none"), ("bridge",), shardings=spec)
    assert params["bridge"]["meta_queries"].sharding == spec
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = {"bridge": jax.tree.map(lambda _: replicated, params["bridge"])}
    tree["bridge"]["meta_queries"] = spec
    params = load_params(folders("none"), ("bridge",), shardings=tree)
    assert params["bridge"]["meta_queries"].sharding == spec
    assert params["bridge"]["projector_in"]["bias"].sharding == replicated


def test_adapters(folders: Callable[[str], Path]) -> None:
    assert load_lora(folders("none")) is None
    adapters = load_lora(folders("sft_adapters"), ("text", "vision"), jnp.float32)
    assert adapters is not None
    assert set(adapters) == {"text", "vision"}
    assert adapters["text"]["embed_tokens"]["a"].shape == (1120, 4)
    assert adapters["vision"]["blocks"]["qkv"]["b"].shape == (4, 4, 96)
    assert set(load_lora(folders("sft_adapters"), ("text", "bridge")) or {}) == {"text"}


def test_the_manifest_needs_no_jax(folders: Callable[[str], Path]) -> None:
    program = (
        "import sys; from deepgen_jax.stores.model_folder import read_manifest, read_scheduler; "
        f"read_manifest({str(folders('none'))!r}); read_scheduler({str(folders('none'))!r}); "
        "print([m for m in ('jax', 'orbax', 'torch', 'numpy') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_reports_folders_that_are_not_models(data_dir: Path, tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "nowhere", "is not a folder; give the folder that `deepgen convert` wrote"),
        (data_dir / "model.pt", "is not a folder"),
        (data_dir / "deepgen_diffusers", r"DeepGen diffusers release .*; run `deepgen convert --diffusers "),
        (data_dir / "qwen2_5_vl", r"it is a Qwen2.5-VL folder; run `deepgen convert --qwen "),
        (data_dir / "sd3_5_kontext", r"it is a diffusers SD3.5 folder .*; run `deepgen convert --qwen DIR --sd3 "),
        (tmp_path, "it is an empty folder"),
    ):
        with pytest.raises(DeepGenError, match=reason):
            read_manifest(path)


def test_damaged_manifests(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for changes, reason in (
        ({"version": 99}, "is of version 99, expected 1"),
        ({"config": {"text": {}}}, "fields of DeepGenConfig do not match"),
        ({"parameters": {"text": {"count": 1}}}, "is damaged"),
        ({"parameters": None}, "is damaged"),
    ):
        path.write_text(json.dumps({**values, **changes}))
        with pytest.raises(DeepGenError, match=reason):
            read_manifest(folder)
    path.write_text("{")
    with pytest.raises(DeepGenError, match="cannot be read"):
        read_manifest(folder)


def test_missing_and_damaged_files(folder: Path) -> None:
    (folder / "scheduler_config.json").unlink()
    with pytest.raises(DeepGenError, match=r"scheduler_config\.json is missing"):
        read_scheduler(folder)
    files = [path for path in (folder / "params").rglob("*") if path.is_file()]
    data = max(files, key=lambda path: path.stat().st_size)
    content = data.read_bytes()
    data.write_bytes(content[:100])
    with pytest.raises(DeepGenError, match=f"{data.name} has 100 bytes, expected .*; copy the model folder again"):
        load_params(folder)
    data.unlink()
    with pytest.raises(DeepGenError, match=f"{data.name} is missing; copy the model folder again"):
        load_params(folder)
    data.write_bytes(bytes(len(content)))
    with pytest.raises(DeepGenError, match=f"{data.name} has changed since it was written"):
        load_params(folder)
    with unverified(), pytest.raises(DeepGenError, match="params is damaged") as caught:
        load_params(folder)
    assert len(str(caught.value)) < 400 + len(str(folder))
    shutil.rmtree(folder / "params")
    with pytest.raises(DeepGenError, match="params is missing"):
        load_params(folder)


def test_too_little_memory_is_no_damage(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def restore(*_: object, **__: object) -> None:
        try:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        except RuntimeError as error:
            raise ValueError("while reading an array") from error

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", restore)
    with pytest.raises(DeepGenError, match=r"out of memory while loading .*; split the model over more devices"):
        load_params(folders("none"), ("vae",))
