"""Sources that tests change, and helpers to compare folders."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Flat = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def bases(data_dir: Path) -> dict[str, Path]:
    """Keyword arguments of ``convert`` for the base models."""
    return {
        "qwen": data_dir / "qwen2_5_vl",
        "sd3": data_dir / "sd3_5_kontext",
        "hparams": data_dir / "deepgen_config.json",
    }


@pytest.fixture
def release(data_dir: Path, tmp_path: Path) -> Path:
    """A copy of the diffusers release that a test may damage."""
    folder = tmp_path / "release"
    shutil.copytree(data_dir / "deepgen_diffusers", folder)
    return folder


@pytest.fixture(scope="session")
def read_flat() -> Callable[..., Flat]:
    """``read_flat(folder, "params")`` -> every stored array by path, the unused ones too."""
    from deepgen_jax.convert.stored_params import flatten
    from deepgen_jax.stores.model_folder import PARTS, load_lora, load_params

    def read(folder: Path, name: str = "params") -> Flat:
        tree = (load_params if name == "params" else load_lora)(folder, (*PARTS, "unused"))
        assert tree is not None
        return {"/".join(path): np.asarray(value) for path, value in flatten(tree).items()}

    return read


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Flat, Flat], None]:
    """Asserts that two sets of arrays are equal to the bit, dtypes included."""

    def check(left: Flat, right: Flat) -> None:
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert value.dtype == right[name].dtype, name
            assert value.tobytes() == right[name].tobytes(), name

    return check


@pytest.fixture(scope="session")
def edit_safetensors() -> Callable[..., None]:
    """Rewrites a safetensors file: ``edit(path, change)``; ``change`` works on {name: (dtype, shape, bytes)}."""

    def edit(path: Path, change: Callable[[dict[str, tuple[str, list[int], bytes]]], None]) -> None:
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header: Mapping[str, Any] = json.loads(data[8 : 8 + length])
        body = data[8 + length :]
        tensors = {
            name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        change(tensors)
        table, start = {}, 0
        for name, (dtype, shape, values) in tensors.items():
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(values)]}
            start += len(values)
        text = json.dumps(table).encode()
        path.write_bytes(
            struct.pack("<Q", len(text)) + text + b"".join(values for _, _, values in tensors.values())
        )

    return edit
