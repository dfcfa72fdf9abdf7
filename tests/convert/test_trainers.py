"""Checkpoints of other trainers: wrapped names, entries of training state, moving averages, variants, adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deepgen_jax.convert import convert
from deepgen_jax.convert.checkpoints import open_checkpoint
from deepgen_jax.convert.keys import is_adapter, parse_key
from deepgen_jax.convert.sources import open_safetensors
from deepgen_jax.errors import DeepGenError

Flat = dict[str, np.ndarray]
Stage = dict[str, torch.Tensor]
WRAPPERS = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


@pytest.fixture(scope="module")
def stage(data_dir: Path) -> Stage:
    return torch.load(data_dir / "deepgen_pretrain.pth", weights_only=True)["state_dict"]


def values(path: Path, **options: Any) -> dict[str, list[float]]:
    source = open_checkpoint(path, **options)
    return {name: tensor.read().tolist() for name, tensor in source.tensors.items()}


@given(data=st.data())
def test_wrappers_may_stand_anywhere_in_a_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([
        "connector.layers.3.self_attn.q_proj.weight", "lmm.model.visual.blocks.1.attn.qkv.bias", "meta_queries",
        "transformer.transformer_blocks.0.ff.net.0.proj.weight", "vae.encoder.conv_in.weight",
        "lmm.model.language_model.layers.2.mlp.up_proj.lora_A.default.weight",
    ]))  # fmt: skip
    words = name.split(".")
    for _ in range(data.draw(st.integers(0, 4))):
        # After the last module's name no wrapper can follow.
        words.insert(data.draw(st.integers(0, max(0, name.count(".") - 2))), data.draw(st.sampled_from(WRAPPERS)))
    prefix = data.draw(st.sampled_from(["", "module.", "model.", "module.model."]))
    assert parse_key(prefix + ".".join(words)) == parse_key(name)


def test_a_wrapped_checkpoint_converts(
    stage: Stage, bases: dict[str, Path], folders: Callable[[str], Path], tmp_path: Path,
    read_flat: Callable[..., Flat], assert_same: Callable[[Flat, Flat], None],
) -> None:  # fmt: skip
    wrapped = {
        "_orig_mod." + name.replace("connector.", "connector._fsdp_wrapped_module.").replace(
            ".self_attn.", "._checkpoint_wrapped_module.self_attn."
        ): value
        for name, value in stage.items()
    }
    torch.save({"model": wrapped, "optimizer": {}, "ema": {"x": torch.ones(1)}}, tmp_path / "stage.pth")
    report = convert(out=tmp_path / "m", checkpoint=tmp_path / "stage.pth", **bases)
    assert_same(read_flat(tmp_path / "m"), read_flat(folders("pretrain")))
    assert report.provenance["sources"][-1]["layout"] == "training checkpoint"
    assert "--ema takes the average" in str(report)


@pytest.mark.parametrize("entry", ["state_dict", "module", "model", "model_state_dict"])
def test_entries_that_hold_the_weights(entry: str, tmp_path: Path) -> None:
    torch.save({"step": 3, entry: {"a": torch.ones(2)}, "optimizer": {"state": {}}}, tmp_path / "x.pth")
    source = open_checkpoint(tmp_path / "x.pth")
    assert set(source.tensors) == {"a"}
    assert source.ignored == dict.fromkeys(("step", "optimizer"), "training state beside the weights")
    torch.save({"step": 3, entry: {"state_dict": {"a": torch.ones(2)}}}, tmp_path / "nested.pth")
    assert set(open_checkpoint(tmp_path / "nested.pth").tensors) == {"a"}


@pytest.mark.parametrize("entry", ["ema", "ema_state_dict", "model_ema", "ema_model"])
@pytest.mark.parametrize("inner", [None, "shadow", "module"])
def test_the_trained_weights_are_taken_unless_the_average_is_asked_for(
    entry: str, inner: str | None, tmp_path: Path
) -> None:
    trained = {"a": torch.zeros(2), "module.projector_2.bias": torch.zeros(1)}
    average: dict[str, Any] = {"projector_2.bias": torch.ones(1)}
    path = tmp_path / "x.pth"
    torch.save({"model": trained, entry: average if inner is None else {inner: average, "decay": 0.99}}, path)
    assert values(path) == {"a": [0, 0], "module.projector_2.bias": [0]}
    assert "--ema takes the average" in open_checkpoint(path).ignored[entry]
    assert values(path, ema=True) == {"a": [0, 0], "projector_2.bias": [1]}
    assert open_checkpoint(path, ema=True).layout == "training checkpoint, moving average"
    torch.save({entry: average if inner is None else {inner: average}, "step": 1}, path)
    assert values(path) == {"projector_2.bias": [1]}
    assert open_checkpoint(path).layout == "moving average"


def test_an_average_without_names_is_refused(tmp_path: Path) -> None:
    torch.save({"decay": 0.99, "shadow_params": [torch.ones(2)]}, tmp_path / "x.pth")
    with pytest.raises(DeepGenError, match="moving average without names"):
        open_checkpoint(tmp_path / "x.pth")


def test_averages_beside_the_weights(
    stage: Stage, bases: dict[str, Path], folders: Callable[[str], Path], tmp_path: Path,
    read_flat: Callable[..., Flat], assert_same: Callable[[Flat, Flat], None],
) -> None:  # fmt: skip
    """In every file the averages are the weights, and the tensors under the weights' names are noise."""
    noise = {name: torch.zeros_like(value) for name, value in stage.items() if not name.startswith("lmm")}
    averages = {f"ema.{name}": value for name, value in stage.items() if name in noise}
    save_file({**stage, **noise, **averages}, tmp_path / "stage.safetensors")
    convert(out=tmp_path / "m", checkpoint=tmp_path / "stage.safetensors", ema=True, **bases)
    assert_same(read_flat(tmp_path / "m"), read_flat(folders("pretrain")))


def test_a_missing_average_is_refused(stage: Stage, bases: dict[str, Path], tmp_path: Path) -> None:
    torch.save(stage, tmp_path / "stage.pth")
    with pytest.raises(DeepGenError, match=r"--ema: .*stage\.pth holds no moving average"):
        convert(out=tmp_path / "m", checkpoint=tmp_path / "stage.pth", ema=True, **bases)
    with pytest.raises(DeepGenError, match="--ema is for --checkpoint"):
        convert(out=tmp_path / "m", ema=True, **bases)


def write_set(folder: Path, files: list[str], index: str | None, value: float) -> None:
    tensors = {name: torch.full((2,), value) for name in "abc"}
    weight_map = {name: files[i % len(files)] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file)
    if index is not None:
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))


SETS = {
    "one": (["model.safetensors"], None),
    "shards": (
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        "model.safetensors.index.json",
    ),
}
VARIANTS = {
    "one": (["model.fp16.safetensors"], None),
    "transformers": (
        ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
        "model.safetensors.index.fp16.json",
    ),
    "diffusers": (
        ["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"],
        "model.fp16.safetensors.index.json",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("full", [None, *SETS])
def test_variants_of_weights(variant: str, full: str | None, tmp_path: Path) -> None:
    write_set(tmp_path, *VARIANTS[variant], value=0.5)
    if full is not None:
        write_set(tmp_path, *SETS[full], value=1.0)
    source = open_safetensors(tmp_path, "layout")
    assert set(source.tensors) == {"a", "b", "c"}
    assert {source.tensors[name].read()[0] for name in "abc"} == {0.5 if full is None else 1.0}


def test_two_variants_and_no_full_weights_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, ["model.fp16.safetensors"], None, 0.5)
    write_set(tmp_path, ["model.bf16.safetensors"], None, 0.5)
    with pytest.raises(DeepGenError, match=r"several sets of weights \(model\.bf16\.safetensors, model\.fp16"):
        open_safetensors(tmp_path, "layout")


def test_a_release_of_fp16_variants_converts(release: Path, tmp_path: Path, read_flat: Callable[..., Flat]) -> None:
    convert(out=tmp_path / "full", diffusers=release)
    for part in ("transformer", "vae"):
        file = release / part / "diffusion_pytorch_model.safetensors"
        tensors = {name: value.half() for name, value in load_file(file).items()}
        save_file(tensors, file.with_suffix(".fp16.safetensors"))
        file.unlink()
    convert(out=tmp_path / "m", diffusers=release)
    half, full = read_flat(tmp_path / "m"), read_flat(tmp_path / "full")
    for name, value in half.items():
        converted = name.removeprefix("unused/").split("/")[0] in ("mmdit", "vae")
        assert value.dtype == (np.float16 if converted else full[name].dtype)
        np.testing.assert_allclose(value.astype(np.float32), full[name].astype(np.float32), rtol=1e-2, atol=1e-3)


ADAPTERS = {
    "peft": ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
             "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"],
    "peft, named": ["lmm.x.q_proj.lora_A.default.weight", "lmm.x.q_proj.lora_B.default.weight"],
    "diffusers": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
                  "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"],
    "kohya": ["lora_unet_blocks_0_to_q.lora_down.weight", "lora_unet_blocks_0_to_q.lora_up.weight",
              "lora_unet_blocks_0_to_q.alpha"],
}  # fmt: skip


@pytest.mark.parametrize("names", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_alone_is_recognised(names: list[str], bases: dict[str, Path], tmp_path: Path) -> None:
    assert all(map(is_adapter, names))
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "adapter_model.safetensors")
    expected = r"is a LoRA adapter without its base model; merge it into its base model.* with peft's merge_and_unload"
    with pytest.raises(DeepGenError, match=expected):
        convert(out=tmp_path / "m", checkpoint=tmp_path / "adapter_model.safetensors", **bases)
    config = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(DeepGenError, match=r"base model \(Qwen/Qwen2\.5-VL-3B-Instruct\)"):
        convert(out=tmp_path / "m", checkpoint=tmp_path, **bases)
    with pytest.raises(DeepGenError, match=r"--qwen: .* is a LoRA adapter .*; merge it"):
        convert(out=tmp_path / "m", **{**bases, "qwen": tmp_path})


def test_a_distributed_checkpoint_is_recognised(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(DeepGenError, match=r"torch distributed checkpoint .*dcp_to_torch"):
        convert(out=tmp_path / "m", checkpoint=tmp_path, **bases)
    shutil.rmtree(tmp_path)
