"""Any fault in the sources gives one clear line, and leaves no files behind."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deepgen_jax.convert import convert
from deepgen_jax.convert.checkpoints import open_checkpoint
from deepgen_jax.convert.sources import WEIGHT_DTYPES
from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.model_folder import read_manifest
from deepgen_jax.user_warnings import DeepGenWarning

Stage = dict[str, torch.Tensor]


@pytest.fixture
def stage(data_dir: Path) -> Stage:
    """The tensors of a stage-1 checkpoint."""
    return torch.load(data_dir / "deepgen_pretrain.pth", weights_only=True)["state_dict"]


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[..., str]:
    """Converts, expects a refusal, checks that nothing is left, and returns the message."""

    def check(**arguments: Any) -> str:
        out = tmp_path / "place" / "deeper" / "model"
        with pytest.raises(DeepGenError) as caught:
            convert(out=out, **arguments)
        assert not (tmp_path / "place").exists()
        message = str(caught.value)
        assert "\n" not in message
        return message

    return check


@pytest.fixture
def refuse_stage(bases: dict[str, Path], tmp_path: Path, refuse: Callable[..., str]) -> Callable[[Stage], str]:
    """The message with which a stage checkpoint is refused."""

    def check(tensors: Stage) -> str:
        torch.save({"state_dict": tensors}, tmp_path / "stage.pth")
        return refuse(checkpoint=tmp_path / "stage.pth", **bases)

    return check


def test_missing_tensors(stage: Stage, refuse_stage: Callable[[Stage], str]) -> None:
    for name in ("projector_2.bias", "connector.layers.3.mlp.fc1.weight"):
        del stage[name]
    message = refuse_stage(stage)
    assert "2 missing: projector_2.bias, connector.layers.3.mlp.fc1.weight" in message


def test_unknown_tensors(stage: Stage, refuse_stage: Callable[[Stage], str]) -> None:
    stage["projector_4.weight"] = torch.zeros(2)
    assert "1 unknown: projector_4.weight of" in refuse_stage(stage)


def test_a_layer_too_many(stage: Stage, refuse_stage: Callable[[Stage], str]) -> None:
    stage["lmm.model.language_model.layers.36.input_layernorm.weight"] = torch.ones(32)
    assert "1 unknown: lmm.model.language_model.layers.36.input_layernorm.weight" in refuse_stage(stage)


def test_wrong_shapes(stage: Stage, refuse_stage: Callable[[Stage], str]) -> None:
    stage["projector_3.weight"] = stage["projector_3.weight"].T.contiguous()
    message = refuse_stage(stage)
    assert "1 misshaped: projector_3.weight of" in message
    assert "is [32, 40], expected [40, 32]" in message


def test_everything_wrong_is_one_list(stage: Stage, refuse_stage: Callable[[Stage], str]) -> None:
    del stage["projector_1.bias"]
    stage["stray"] = torch.zeros(1)
    stage["projector_2.bias"] = torch.zeros(7)
    stage["module.projector_3.bias"] = stage["projector_3.bias"]
    stage["projector_3.weight"] = stage["projector_3.weight"].to(torch.int8)
    message = refuse_stage(stage)
    for part in ("1 missing: projector_1.bias", "1 unknown: stray", "1 misshaped: projector_2.bias",
                 "1 duplicated: module.projector_3.bias and projector_3.bias", "projector_3.weight of"):  # fmt: skip
        assert part in message
    assert "is torch.int8" in message


def test_long_lists_are_cut(refuse_stage: Callable[[Stage], str]) -> None:
    message = refuse_stage({f"stray.{i}": torch.zeros(1) for i in range(1000)})
    assert "1000 unknown" in message
    assert "and 996 more" in message
    assert len(message) < 2000


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_any_tensor_is_noticed(
    stage: Stage, refuse_stage: Callable[[Stage], str], data: st.DataObject
) -> None:
    broken = dict(stage)
    name = data.draw(st.sampled_from(sorted(stage)))
    fault = data.draw(st.sampled_from(["drop", "rename", "shape", "nan", "inf"]))
    if fault == "drop":
        del broken[name]
    elif fault == "rename":
        broken[f"{name}_"] = broken.pop(name)
    elif fault == "shape":
        broken[name] = torch.zeros(*stage[name].shape, 1)
    else:
        broken[name] = stage[name].clone()
        place = data.draw(st.integers(0, stage[name].numel() - 1))
        broken[name].view(-1)[place] = float(fault)
    assert name.rpartition(".")[0] in refuse_stage(broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_not_finite_weights(dtype: torch.dtype, stage: Stage, refuse_stage: Callable[[Stage], str]) -> None:
    stage = {name: value.to(dtype) for name, value in stage.items()}
    stage["projector_1.weight"][3, 4] = float("nan")
    stage["meta_queries"][0, 0] = float("-inf")
    message = refuse_stage(stage)
    assert message.startswith("NaN or infinite weights in meta_queries of")
    assert "projector_1.weight of" in message


def test_large_finite_weights_are_accepted(stage: Stage, bases: dict[str, Path], tmp_path: Path) -> None:
    stage["projector_1.weight"][:] = 3e38
    torch.save(stage, tmp_path / "stage.pth")
    convert(out=tmp_path / "m", checkpoint=tmp_path / "stage.pth", **bases)


def test_half_an_adapter(data_dir: Path, refuse_stage: Callable[[Stage], str]) -> None:
    sft = torch.load(data_dir / "deepgen_sft.pth", weights_only=True)["state_dict"]
    del sft["lmm.lm_head.lora_B.default.weight"]
    assert "the other factor of lmm.lm_head.lora_A.default.weight" in refuse_stage(sft)


def test_two_adapters(data_dir: Path, refuse_stage: Callable[[Stage], str]) -> None:
    sft = torch.load(data_dir / "deepgen_sft.pth", weights_only=True)["state_dict"]
    for factor in "AB":
        name = f"lmm.lm_head.lora_{factor}.default.weight"
        sft[name.replace("default", "other")] = sft.pop(name)
    assert "adapters default, other where one is expected" in refuse_stage(sft)


def test_adapters_of_other_ranks(data_dir: Path, refuse_stage: Callable[[Stage], str]) -> None:
    sft = torch.load(data_dir / "deepgen_sft.pth", weights_only=True)["state_dict"]
    sft["lmm.lm_head.lora_A.default.weight"] = torch.zeros(5, 32)
    assert "lmm.lm_head.lora_A.default.weight" in refuse_stage(sft)


def test_an_adapter_where_none_may_be(data_dir: Path, refuse_stage: Callable[[Stage], str]) -> None:
    sft = torch.load(data_dir / "deepgen_sft.pth", weights_only=True)["state_dict"]
    for factor, shape in (("A", (4, 48)), ("B", (48, 4))):
        sft[f"transformer.context_embedder.lora_{factor}.default.weight"] = torch.zeros(shape)
    assert "2 unknown: transformer.context_embedder.lora_A.default.weight" in refuse_stage(sft)


def test_truncated_safetensors(release: Path, refuse: Callable[..., str]) -> None:
    file = release / "vlm" / "model-00002-of-00002.safetensors"
    data = file.read_bytes()
    for length, reason in ((len(data) - 1, "1 of"), (1000, "header is cut off"), (3, "is not a safetensors file")):
        file.write_bytes(data[:length])
        message = refuse(diffusers=release)
        assert str(file) in message
        assert reason in message


def test_shards_that_do_not_fit_the_index(
    release: Path, refuse: Callable[..., str], edit_safetensors: Callable[..., None]
) -> None:
    file = release / "vlm" / "model-00002-of-00002.safetensors"
    edit_safetensors(file, lambda tensors: tensors.pop("model.norm.weight"))
    assert "lacks model.norm.weight" in refuse(diffusers=release)
    edit_safetensors(file, lambda tensors: tensors.update({"model.norm.weight": ("BF16", [32], bytes(64)),
                                                           "stray": ("F32", [1], bytes(4))}))  # fmt: skip
    assert "holds, unlisted, stray" in refuse(diffusers=release)
    file.unlink()
    assert "model-00002-of-00002.safetensors is missing though" in refuse(diffusers=release)
    (release / "vlm" / "model.safetensors.index.json").write_text("{}")
    assert "is not a safetensors index" in refuse(diffusers=release)


def test_sets_of_weights_must_be_one(release: Path, refuse: Callable[..., str]) -> None:
    weights = release / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("second.safetensors"))
    assert "several sets of weights" in refuse(diffusers=release)
    weights.unlink()
    weights.with_name("second.safetensors").unlink()
    assert "holds no .safetensors file" in refuse(diffusers=release)


@pytest.mark.parametrize("cut", [0.5, 0.999])
def test_truncated_pth(
    cut: float, data_dir: Path, tmp_path: Path, bases: dict[str, Path], refuse: Callable[..., str]
) -> None:
    data = (data_dir / "deepgen_sft.pth").read_bytes()
    file = tmp_path / "cut.pth"
    file.write_bytes(data[: int(cut * len(data))])
    message = refuse(checkpoint=file, **bases)
    assert str(file) in message
    assert "truncated" in message


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["deepgen_pretrain.pth", "deepgen_rl/model.safetensors", "DeepGen_CKPT.zip.part-aa"]),
    kept=st.floats(0, 1, exclude_max=True),
    flips=st.dictionaries(st.floats(0, 1, exclude_max=True), st.integers(0, 255), max_size=20),
    cut=st.booleans(),
)
def test_damaged_files_never_raise_anything_else(
    data_dir: Path, tmp_path: Path, name: str, kept: float, flips: dict[float, int], cut: bool
) -> None:
    content = bytearray((data_dir / name).read_bytes())
    for place, value in flips.items():
        content[int(place * len(content))] = value
    file = tmp_path / "damaged"
    file.write_bytes(content[: int(kept * len(content))] if cut else content)
    try:
        source = open_checkpoint(file)
        for tensor in source.tensors.values():
            if tensor.dtype in WEIGHT_DTYPES:
                tensor.read()
    except DeepGenError:
        return
    assert not cut


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(
    kind: str, stage: Stage, tmp_path: Path, bases: dict[str, Path], refuse: Callable[..., str]
) -> None:
    file, witness = tmp_path / "evil.pth", tmp_path / "witness"
    content = {"state_dict": stage, "meta": _Evil(witness)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"meta": _Evil(witness)}, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    message = refuse(checkpoint=file, **bases)
    assert f"{file} is refused: it calls posix.system, which can run code" in message
    assert not witness.exists()


def test_files_without_weights(tmp_path: Path, bases: dict[str, Path], refuse: Callable[..., str]) -> None:
    torch.save({"epoch": 3, "lr": 1e-4}, tmp_path / "a.pth")
    assert "holds no weights (entries: epoch, lr)" in refuse(checkpoint=tmp_path / "a.pth", **bases)
    torch.save([1, 2], tmp_path / "b.pth")
    assert "holds a list, expected a state dict" in refuse(checkpoint=tmp_path / "b.pth", **bases)
    (tmp_path / "c.pth").write_text("hello")
    assert "is a file of another kind" in refuse(checkpoint=tmp_path / "c.pth", **bases)
    (tmp_path / "d.pth").write_bytes(b"")
    assert "is a file of another kind" in refuse(checkpoint=tmp_path / "d.pth", **bases)


def test_wrong_folders(
    data_dir: Path, tmp_path: Path, folders: Callable[[str], Path], refuse: Callable[..., str]
) -> None:
    qwen, sd3, release = data_dir / "qwen2_5_vl", data_dir / "sd3_5_kontext", data_dir / "deepgen_diffusers"
    stage = data_dir / "deepgen_pretrain.pth"
    assert f"--qwen: {sd3} is a diffusers SD3.5 folder" in refuse(qwen=sd3, sd3=qwen)
    assert f"--sd3: {qwen} is a Qwen2.5-VL folder" in refuse(qwen=qwen, sd3=qwen)
    assert f"--diffusers: {sd3} is a diffusers SD3.5 folder" in refuse(diffusers=sd3)
    assert f"--diffusers: {data_dir} is a folder with DeepGen_CKPT.zip.part-aa, " in refuse(diffusers=data_dir)
    assert "--qwen: /nowhere does not exist" in refuse(qwen="/nowhere", sd3=sd3)
    assert f"--qwen: {stage} is a zip file or torch checkpoint, expected" in refuse(qwen=stage, sd3=sd3)
    assert "does not exist" in refuse(qwen=qwen, sd3=sd3, checkpoint="/nowhere.pth")
    assert "pass it as --diffusers" in refuse(qwen=qwen, sd3=sd3, checkpoint=release)
    assert "is converted already" in refuse(qwen=qwen, sd3=sd3, checkpoint=folders("none"))
    (tmp_path / "empty").mkdir()
    assert "is an empty folder, expected a checkpoint" in refuse(qwen=qwen, sd3=sd3, checkpoint=tmp_path / "empty")
    for name in ("iter_1.pth", "iter_2.pth"):
        shutil.copy(stage, tmp_path / "empty" / name)
    message = refuse(qwen=qwen, sd3=sd3, checkpoint=tmp_path / "empty")
    assert "holds 2 checkpoints (files: iter_1.pth, iter_2.pth); give the path of one" in message


def test_options_that_do_not_go_together(data_dir: Path, refuse: Callable[..., str]) -> None:
    qwen, release = data_dir / "qwen2_5_vl", data_dir / "deepgen_diffusers"
    assert "give either --diffusers, or --qwen and --sd3" in refuse()
    assert "give either --diffusers, or --qwen and --sd3" in refuse(qwen=qwen, diffusers=release)
    assert "--qwen and --sd3 go together" in refuse(qwen=qwen)
    assert "a diffusers release is complete" in refuse(diffusers=release, checkpoint=qwen)
    assert "--dtype int8 is unknown" in refuse(diffusers=release, dtype="int8")


def test_hyper_parameters_that_contradict_the_checkpoint(
    data_dir: Path, bases: dict[str, Path], tmp_path: Path, refuse: Callable[..., str]
) -> None:
    sources = {**bases, "checkpoint": data_dir / "deepgen_sft.pth", "hparams": tmp_path / "h.json"}
    for text, reason in (
        ('{"num_queries": 64}', "num_queries is 64, but the checkpoint's tensors say 128"),
        ('{"lora_rank": 8, "connector": {"num_attention_heads": 4}}', "lora_rank is 8, but the checkpoint's adapters"),
        ('{"connector": {"num_hidden_layers": 5, "num_attention_heads": 4}}', "num_hidden_layers is 5"),
        ('{"connector": {"num_attention_heads": 5}}', "cannot be split into 5 heads"),
        ('{"connector": {"hidden_act": "relu"}}', "hidden_act='relu' is not supported"),
        ('{"queries": 3}', "the option queries=3 is unknown"),
        ('{"max_length": "long"}', "max_length is 'long', expected int"),
        ("[]", "is not a JSON object"),
        ("{", "cannot be read"),
    ):
        (tmp_path / "h.json").write_text(text)
        assert reason in refuse(**sources)
    (tmp_path / "h.json").unlink()
    assert "is missing" in refuse(**sources)


def test_an_existing_folder_is_kept(data_dir: Path, tmp_path: Path, release: Path) -> None:
    out = tmp_path / "m"
    convert(out=out, diffusers=release)
    before = (out / "config.json").read_bytes()
    with pytest.raises(DeepGenError, match="exists; choose another --out or pass --overwrite"):
        convert(out=out, diffusers=release)
    file = release / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DeepGenError, match="truncated"):
        convert(out=out, diffusers=release, overwrite=True)
    assert (out / "config.json").read_bytes() == before
    convert(out=out, diffusers=data_dir / "deepgen_diffusers", overwrite=True)
    read_manifest(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "release"]


def test_unreadable_and_unwritable_places_are_named(
    monkeypatch: pytest.MonkeyPatch, release: Path, refuse: Callable[..., str], tmp_path: Path
) -> None:
    file = release / "vae" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.mkdir()
    assert refuse(diffusers=release) == f"{file} is a folder, not a regular file; give a file on disk"
    (tmp_path / "file").touch()
    with pytest.raises(DeepGenError, match="cannot be written to"):
        convert(out=tmp_path / "file" / "m", diffusers=release)


def test_a_full_disk_is_told_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, release: Path, refuse: Callable[..., str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6})())
    assert "its disk has 1.0 MB free" in refuse(diffusers=release)


def test_a_checkpoint_of_part_of_the_mmdit_is_told_of(
    stage: Stage, bases: dict[str, Path], data_dir: Path, tmp_path: Path
) -> None:
    """The remaining tensors are the base model's; one shard of two is almost certainly a mistake."""
    transformer = load_file(data_dir / "sd3_5_kontext" / "transformer" / "diffusion_pytorch_model.safetensors")
    stage |= {f"transformer.{name}": transformer[name] for name in sorted(transformer)[:2]}
    torch.save({"state_dict": stage}, tmp_path / "stage.pth")
    lacks = rf"stage\.pth holds 2 of the tensors of transformer and lacks {len(transformer) - 2}, such as .* taken from"
    with pytest.warns(DeepGenWarning, match=lacks):
        convert(checkpoint=tmp_path / "stage.pth", out=tmp_path / "m", **bases)


def test_a_damaged_checkpoint_beside_a_whole_one_is_told_of(data_dir: Path, tmp_path: Path) -> None:
    shutil.copy(data_dir / "deepgen_pretrain.pth", tmp_path / "iter_1.pth")
    (tmp_path / "iter_2.pth").write_bytes((tmp_path / "iter_1.pth").read_bytes()[:-5000])
    with pytest.warns(DeepGenWarning, match=r"iter_2\.pth is left out: "):
        open_checkpoint(tmp_path).close()
