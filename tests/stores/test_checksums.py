"""One flipped bit in the arrays of a model folder or a checkpoint is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepgen_jax.cli.main import main
from deepgen_jax.convert import export
from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores import checksums
from deepgen_jax.stores.checkpoint import Checkpoints, stored_weights
from deepgen_jax.stores.model_folder import load_lora, load_params, read_manifest

FUZZ = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def flip(data: st.DataObject, root: Path) -> tuple[Path, bytes]:
    """Flips a random bit of a random file below ``root``; returns the file and what it held."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    path = data.draw(st.sampled_from(files), "file")
    content = path.read_bytes()
    place = int(data.draw(st.floats(0, 1, exclude_max=True), "place") * len(content))
    changed = bytearray(content)
    changed[place] ^= 1 << data.draw(st.integers(0, 7), "bit")
    path.write_bytes(changed)
    return path, content


@pytest.fixture(scope="module")
def model(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checksums") / "m"
    shutil.copytree(folders("sft_adapters"), folder)
    return folder


@FUZZ
@given(data=st.data(), name=st.sampled_from(["params", "lora"]))
def test_a_flipped_bit_of_a_model_folder(data: st.DataObject, name: str, model: Path, tmp_path: Path) -> None:
    path, content = flip(data, model / name)
    try:
        with pytest.raises(DeepGenError, match=r"has changed since it was written|damaged") as caught:
            (load_params if name == "params" else load_lora)(model, ("bridge", "text"))
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        with pytest.raises(DeepGenError, match="has changed since it was written"):
            export(model, "pth", tmp_path / "x.pth")
    finally:
        path.write_bytes(content)


class State(NamedTuple):
    trainable: dict[str, Any]
    step: jax.Array


def state(value: float = 0.0) -> State:
    kernel = jnp.arange(24, dtype=jnp.float32).reshape(4, 6) + value
    return State({"params": {"bridge": {"kernel": kernel}}, "lora": {}}, jnp.int32(3))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    with Checkpoints(run) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"epoch": step})
    return run


@FUZZ
@given(data=st.data(), step=st.sampled_from([1, 2]))
def test_a_flipped_bit_of_a_checkpoint(data: st.DataObject, step: int, run: Path) -> None:
    folder = run / "checkpoints" / str(step)
    path, content = flip(data, folder)
    try:
        with Checkpoints(run) as checkpoints, pytest.raises(DeepGenError, match="cannot be used") as caught:
            checkpoints.restore(step, state())
        assert "\n" not in str(caught.value)
        if path.is_relative_to(folder / "state"):
            with pytest.raises(DeepGenError, match="cannot be used"):
                stored_weights(run, step)
    finally:
        path.write_bytes(content)


def test_intact_files_are_read_and_checked_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = checksums.checksum

    def counting(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(checksums, "checksum", counting)
    monkeypatch.setattr(checksums, "_good", set())
    for _ in range(2):
        with Checkpoints(run) as checkpoints:
            restored, position = checkpoints.restore(2, state())
        jax.tree.map(np.testing.assert_array_equal, restored, state(2))
        assert position == {"epoch": 2}
    assert read
    assert len(read) == len(set(read))


def test_folders_without_checksums_are_read(model: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("checksums")
    path.write_text(json.dumps(values))
    assert read_manifest(tmp_path / "m").checksums == {}
    assert set(load_params(tmp_path / "m", ("bridge",))) == {"bridge"}
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / checksums.LISTS)
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.restore(1, state())[1] == {"epoch": 1}


def test_the_check_can_be_left_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, tmp_path / "m")
    note = tmp_path / "m" / "params" / "commit_success.txt"
    note.write_bytes(note.read_bytes()[::-1])
    words = ["export", str(tmp_path / "m"), "--format", "pth", "--out", str(tmp_path / "x.pth")]
    assert main(words) == 2
    assert f"{note} has changed since it was written" in capsys.readouterr().err
    assert main([*words, "--no-verify"]) == 0
    assert main([*words, "--overwrite"]) == 2


@given(content=st.binary(max_size=200), place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_every_flipped_bit_changes_the_checksum(
    content: bytes, place: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("x") / "file"
    content += b"x"
    path.write_bytes(content)
    before = checksums.checksum(path)
    changed = bytearray(content)
    changed[place % len(content)] ^= 1 << bit
    path.write_bytes(changed)
    assert checksums.checksum(path) != before
