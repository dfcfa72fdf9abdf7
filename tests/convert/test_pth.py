"""Torch checkpoints are read tensor by tensor, whatever their storages look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deepgen_jax.convert.checkpoints import open_checkpoint
from deepgen_jax.convert.pth import TorchFile
from deepgen_jax.errors import DeepGenError


def _tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    return {
        "plain": base.clone(),
        "bfloat16": base.bfloat16(),
        "float16": base.half(),
        "transposed": base.transpose(0, 2),
        "part": base[1:, 2],
        "tied": base.view(12, 5),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base.clone()),
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_every_kind(legacy: bool, tmp_path: Path) -> None:
    torch.save(_tensors(), tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    source = open_checkpoint(tmp_path / "a.pth")
    assert source.layout == "bare state dict"
    for name, tensor in _tensors().items():
        expected = tensor.detach().float().numpy()
        assert source.tensors[name].shape == expected.shape
        value = source.tensors[name].read()
        assert value.dtype.name == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(value.astype(np.float32), expected)
        if len(expected) > 1 if expected.ndim else False:
            np.testing.assert_array_equal(source.tensors[name].read(slice(1, 3)).astype(np.float32), expected[1:3])


def test_reading_touches_only_what_is_asked_for(tmp_path: Path) -> None:
    torch.save({f"t{i}": torch.full((1000, 1000), float(i)) for i in range(5)}, tmp_path / "a.pth")
    with (tmp_path / "a.pth").open("rb") as file:
        taken = 0
        real = file.readinto

        class Counting:
            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

            def readinto(self, buffer: memoryview) -> int:
                nonlocal taken
                taken += len(buffer)
                return real(buffer)

        source = TorchFile(Counting(), "a.pth", {})  # type: ignore[arg-type]
        assert taken < 10_000
        taken = 0
        assert (source.tensors["t3"].read(slice(10, 12)) == 3).all()
        assert taken < 10_000


def test_unsupported_dtypes_are_named(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2, dtype=torch.int64)}, tmp_path / "a.pth")
    assert open_checkpoint(tmp_path / "a.pth").tensors["a"].dtype == "torch.int64"


@pytest.mark.parametrize("wrapper", ["state_dict", "module"])
def test_training_state_beside_the_weights_is_told(wrapper: str, tmp_path: Path) -> None:
    torch.save({wrapper: {"a": torch.ones(1), "step": 3}, "optimizer": {"lr": 1}}, tmp_path / "a.pth")
    source = open_checkpoint(tmp_path / "a.pth")
    assert set(source.tensors) == {"a"}
    assert source.ignored == {"optimizer": "training state beside the weights", "step": "not a tensor"}


def test_a_deepspeed_folder_with_optimiser_states(data_dir: Path, tmp_path: Path) -> None:
    states = (data_dir / "deepgen_ds" / "mp_rank_00_model_states.pt").read_bytes()
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(states)
    torch.save({"optimizer_state_dict": {}}, tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert open_checkpoint(tmp_path).layout == "DeepSpeed checkpoint"


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("notes.txt", "hello")
    with pytest.raises(DeepGenError, match=r"holds no torch checkpoint \(members: notes.txt\)"):
        open_checkpoint(tmp_path / "a.zip")
