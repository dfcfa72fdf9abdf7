"""Every released layout converts, and the values are where they belong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepgen_jax.config import LoRAConfig
from deepgen_jax.convert import convert
from deepgen_jax.stores.model_folder import PARTS, load_params, read_manifest, read_scheduler

Flat = dict[str, np.ndarray]
LAYOUT_NAMES = ("sft", "pretrain", "rl", "ds", "model_pt", "zip", "none", "diffusers")


def _f32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().numpy()


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_layout_converts(layout: str, folders: Callable[[str], Path]) -> None:
    folder = folders(layout)
    manifest = read_manifest(folder)
    config = manifest.config
    assert (config.text.num_layers, config.bridge.num_heads, config.mmdit.num_layers) == (36, 4, 4)
    assert config.text.pad_token_id == 1096
    assert config.lora is None
    assert read_scheduler(folder).shift == 3.0
    assert set(manifest.parameters) == {*PARTS, "unused"}
    assert config.text.tie_word_embeddings == (layout in ("pretrain", "none"))
    assert all((folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    for source in manifest.provenance["sources"]:
        assert source.get("header_sha256") or "seed" in source


def test_stored_arrays_do_not_tell_where_they_were_written(folders: Callable[[str], Path]) -> None:
    folder = folders("sft")
    files = [path for path in (folder / "params").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert str(folder.parent).encode() not in path.read_bytes(), path


def test_summaries_count_what_is_stored(folders: Callable[[str], Path], read_flat: Callable[..., Flat]) -> None:
    arrays, parameters = read_flat(folders("sft")), read_manifest(folders("sft")).parameters
    for part, summary in parameters.items():
        mine = [value for name, value in arrays.items() if name.startswith(f"{part}/")]
        assert summary.count == sum(value.size for value in mine)
        assert summary.bytes == sum(value.nbytes for value in mine)
        assert sum(summary.dtypes.values()) == summary.count


def test_merged_weights_equal_the_goldens(
    folders: Callable[[str], Path], goldens: Callable[[str], Any], tolerance: Callable[[str, str], float],
    read_flat: Callable[..., Flat],
) -> None:  # fmt: skip
    arrays, expected = read_flat(folders("sft")), goldens("lora")
    ours = {
        "layers.3.self_attn.q_proj.weight": arrays["text/first_layers/q_proj/kernel"][3].T,
        "embed_tokens.weight[:16]": arrays["text/embed_tokens/embedding"][:16],
        "visual.blocks.1.attn.qkv.weight": arrays["vision/blocks/qkv/kernel"][1].T,
        "lm_head.weight[:16]": arrays["unused/text/lm_head/kernel"].T[:16],
    }
    for name, value in ours.items():
        assert value.dtype == np.float32
        golden = f"merged/{name}"
        np.testing.assert_allclose(value, expected[golden], rtol=0, atol=tolerance("lora", golden))


def test_layers_stand_where_the_model_reads_them(
    data_dir: Path, folders: Callable[[str], Path], read_flat: Callable[..., Flat]
) -> None:
    qwen = load_file(data_dir / "qwen2_5_vl" / "model.safetensors")
    sd3 = load_file(data_dir / "sd3_5_kontext" / "transformer" / "diffusion_pytorch_model.safetensors")
    stage = torch.load(data_dir / "deepgen_pretrain.pth", weights_only=True)["state_dict"]
    ours = read_flat(folders("pretrain"))
    for layer in range(36):
        places = {
            **{i: ("text/first_layers", (i,)) for i in range(5)},
            **{i: ("text/layer_groups", divmod(i - 5, 6)) for i in range(5, 35)},
            35: ("unused/text/last_layer", ()),
        }
        parent, index = places[layer]
        source = qwen[f"model.layers.{layer}.mlp.up_proj.weight"]
        value = ours[f"{parent}/up_proj/kernel"][index]
        assert value.dtype.name == "bfloat16"
        np.testing.assert_array_equal(value.astype(np.float32).T, _f32(source))
    for layer, (run, i) in {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (2, 0)}.items():
        source = sd3[f"transformer_blocks.{layer}.ff.net.2.weight"]
        np.testing.assert_array_equal(ours[f"mmdit/blocks_{run}/ff/fc2/kernel"][i].astype(np.float32).T, _f32(source))
    np.testing.assert_array_equal(
        ours["unused/mmdit/add_q/kernel"].astype(np.float32).T, _f32(sd3["transformer_blocks.3.attn.add_q_proj.weight"])
    )
    np.testing.assert_array_equal(ours["bridge/projector_pooled/kernel"].T, _f32(stage["projector_2.weight"]))
    np.testing.assert_array_equal(ours["bridge/meta_queries"], _f32(stage["meta_queries"]))


def test_layouts_of_equal_weights_agree(
    folders: Callable[[str], Path], read_flat: Callable[..., Flat], assert_same: Callable[[Flat, Flat], None]
) -> None:
    assert_same(read_flat(folders("rl")), read_flat(folders("model_pt")))
    ds, zipped = read_flat(folders("ds")), read_flat(folders("zip"))
    assert_same(ds, zipped)
    released = read_flat(folders("diffusers"))
    for name, value in read_flat(folders("rl")).items():
        tolerance = 2**-8 * np.abs(value.astype(np.float32)).max()
        np.testing.assert_allclose(released[name].astype(np.float32), value.astype(np.float32), 0, tolerance, name)


def test_a_fresh_bridge_starts_as_stage_1_does(folders: Callable[[str], Path], read_flat: Callable[..., Flat]) -> None:
    arrays = read_flat(folders("none"))
    for name in ("projector_pooled", "projector_sequence"):
        assert not arrays[f"bridge/{name}/kernel"].any()
        assert not arrays[f"bridge/{name}/bias"].any()
    assert (arrays["bridge/layers/norm1/scale"] == 1).all()
    np.testing.assert_allclose(arrays["bridge/meta_queries"].std(), 32**-0.5, rtol=0.05)
    kernel = arrays["bridge/projector_in/kernel"]
    assert 0.9 * 192**-0.5 < np.abs(kernel).max() <= 192**-0.5
    assert {"layout": "fresh initialisation", "seed": 0} in read_manifest(folders("none")).provenance["sources"]


def test_the_seed_decides_a_fresh_bridge(bases: dict[str, Path], tmp_path: Path) -> None:
    queries = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(out=tmp_path / name, seed=seed, **bases)
        queries.append(np.asarray(load_params(tmp_path / name, ("bridge",))["bridge"]["meta_queries"]))
    assert (queries[0] == queries[1]).all()
    assert (queries[0] != queries[2]).any()


def test_adapters_can_be_kept(
    data_dir: Path, folders: Callable[[str], Path], read_flat: Callable[..., Flat]
) -> None:
    folder = folders("sft_adapters")
    assert read_manifest(folder).config.lora == LoRAConfig(rank=4, alpha=8.0)
    params, adapters, merged = read_flat(folder), read_flat(folder, "lora"), read_flat(folders("sft"))
    assert len(adapters) == 2 * (1 + 7 + 7 + 7 + 1 + 5 + 2)  # embedding, three places of layers, lm_head, ViT, merger
    stage = torch.load(data_dir / "deepgen_sft.pth", weights_only=True)["state_dict"]
    prefix = "lmm.model.language_model.layers.9.mlp.down_proj.lora_"
    a = adapters["text/layer_groups/down_proj/a"][0, 4].astype(np.float32)
    np.testing.assert_array_equal(a.T, _f32(stage[f"{prefix}A.default.weight"]))
    for name, value in merged.items():
        parent, _, leaf = name.rpartition("/")
        expected = params[name].astype(np.float32)
        if leaf in ("kernel", "embedding") and f"{parent}/a" in adapters:
            factors = (adapters[f"{parent}/{k}"].astype(np.float32) for k in "ab")
            expected = expected + 2.0 * np.matmul(*factors)
        np.testing.assert_allclose(value.astype(np.float32), expected, 0, 1e-6, name)


def test_the_scale_of_adapters_can_be_chosen(
    data_dir: Path, bases: dict[str, Path], folders: Callable[[str], Path], tmp_path: Path,
    read_flat: Callable[..., Flat],
) -> None:  # fmt: skip
    convert(out=tmp_path / "m", checkpoint=data_dir / "deepgen_sft.pth", lora_alpha=2, **bases)
    base, merged, half = (read_flat(f)["text/first_layers/q_proj/kernel"] for f in
                          (folders("sft_adapters"), folders("sft"), tmp_path / "m"))  # fmt: skip
    np.testing.assert_allclose(half - base.astype(np.float32), (merged - base.astype(np.float32)) / 4, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_everything_can_be_stored_in_one_dtype(
    dtype: str, data_dir: Path, bases: dict[str, Path], folders: Callable[[str], Path], tmp_path: Path,
    read_flat: Callable[..., Flat],
) -> None:  # fmt: skip
    convert(out=tmp_path / "m", checkpoint=data_dir / "deepgen_sft.pth", dtype=dtype, **bases)
    arrays = read_flat(tmp_path / "m")
    for name, value in read_flat(folders("sft")).items():
        assert arrays[name].dtype == dtype
        np.testing.assert_array_equal(arrays[name], value.astype(dtype), name)
    assert {d for p in read_manifest(tmp_path / "m").parameters.values() for d in p.dtypes} == {dtype}


def test_either_hierarchy_and_all_prefixes_give_the_same(
    data_dir: Path, bases: dict[str, Path], folders: Callable[[str], Path], tmp_path: Path,
    read_flat: Callable[..., Flat], assert_same: Callable[[Flat, Flat], None],
) -> None:  # fmt: skip
    qwen = tmp_path / "qwen"
    shutil.copytree(data_dir / "qwen2_5_vl", qwen)
    tensors = load_file(qwen / "model.safetensors")
    newer = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}": value
        for name, value in tensors.items()
    }
    save_file(newer, qwen / "model.safetensors")
    stage = torch.load(data_dir / "deepgen_pretrain.pth", weights_only=True)["state_dict"]
    torch.save({f"module.model.{name}": value for name, value in stage.items()}, tmp_path / "stage.pth")
    convert(out=tmp_path / "m", checkpoint=tmp_path / "stage.pth", **{**bases, "qwen": qwen})
    assert_same(read_flat(tmp_path / "m"), read_flat(folders("pretrain")))


def test_a_base_model_in_shards(
    data_dir: Path, bases: dict[str, Path], folders: Callable[[str], Path], tmp_path: Path,
    read_flat: Callable[..., Flat], assert_same: Callable[[Flat, Flat], None],
) -> None:  # fmt: skip
    qwen = tmp_path / "qwen"
    shutil.copytree(data_dir / "qwen2_5_vl", qwen)
    tensors = load_file(qwen / "model.safetensors")
    (qwen / "model.safetensors").unlink()
    weight_map = {name: f"model-{1 + i % 3:05d}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: value for name, value in tensors.items() if weight_map[name] == file}, qwen / file)
    (qwen / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(out=tmp_path / "m", **{**bases, "qwen": qwen})
    assert_same(read_flat(tmp_path / "m"), read_flat(folders("none")))


def test_a_checkpoint_may_hold_what_is_not_needed(
    data_dir: Path, bases: dict[str, Path], folders: Callable[[str], Path], tmp_path: Path,
    read_flat: Callable[..., Flat], assert_same: Callable[[Flat, Flat], None],
) -> None:  # fmt: skip
    stage = torch.load(data_dir / "deepgen_pretrain.pth", weights_only=True)["state_dict"]
    extra = {"ema.meta_queries": torch.zeros(1), "lmm.model.visual.rotary_pos_emb.inv_freq": torch.ones(4), "step": 3}
    torch.save({"state_dict": {**stage, **extra}, "optimizer": {"lr": 1e-4}}, tmp_path / "stage.pth")
    report = convert(out=tmp_path / "m", checkpoint=tmp_path / "stage.pth", **bases)
    assert_same(read_flat(tmp_path / "m"), read_flat(folders("pretrain")))
    names = " ".join(report.unused)
    assert all(name in names for name in (*extra, "optimizer"))
    assert "moving average" in str(report)


def test_another_name_of_the_adapter_is_understood(
    data_dir: Path, bases: dict[str, Path], folders: Callable[[str], Path], tmp_path: Path,
    read_flat: Callable[..., Flat], assert_same: Callable[[Flat, Flat], None],
) -> None:  # fmt: skip
    stage = torch.load(data_dir / "deepgen_sft.pth", weights_only=True)["state_dict"]
    torch.save({name.replace(".default", ".sft"): value for name, value in stage.items()}, tmp_path / "stage.pth")
    convert(out=tmp_path / "m", checkpoint=tmp_path / "stage.pth", **bases)
    assert_same(read_flat(tmp_path / "m"), read_flat(folders("sft")))


def test_adapters_on_some_layers_only(
    data_dir: Path, bases: dict[str, Path], folders: Callable[[str], Path], tmp_path: Path,
    read_flat: Callable[..., Flat],
) -> None:  # fmt: skip
    stage = torch.load(data_dir / "deepgen_sft.pth", weights_only=True)["state_dict"]
    dropped = "lmm.model.language_model.layers.2.self_attn.q_proj.lora_"
    torch.save({k: v for k, v in stage.items() if not k.startswith(dropped)}, tmp_path / "stage.pth")
    convert(out=tmp_path / "merged", checkpoint=tmp_path / "stage.pth", **bases)
    convert(out=tmp_path / "kept", checkpoint=tmp_path / "stage.pth", keep_lora=True, **bases)
    name = "text/first_layers/q_proj/kernel"
    merged, full, base = (read_flat(f)[name] for f in (tmp_path / "merged", folders("sft"), folders("sft_adapters")))
    np.testing.assert_array_equal(merged[[0, 1, 3, 4]], full[[0, 1, 3, 4]])
    np.testing.assert_array_equal(merged[2], base[2].astype(np.float32))
    assert not read_flat(tmp_path / "kept", "lora")["text/first_layers/q_proj/a"][2].any()


def test_a_release_without_connector_config_has_the_released_values(
    release: Path, tmp_path: Path, bases: dict[str, Path]
) -> None:
    (release / "connector" / "config.json").unlink()
    convert(out=tmp_path / "m", diffusers=release, hparams=bases["hparams"])
    assert read_manifest(tmp_path / "m").config.bridge.num_heads == 4
    convert(out=tmp_path / "n", diffusers=release)
    assert read_manifest(tmp_path / "n").config.bridge.num_heads == 32


def test_large_tensors_are_converted_in_blocks(
    monkeypatch: pytest.MonkeyPatch, data_dir: Path, bases: dict[str, Path], folders: Callable[[str], Path],
    tmp_path: Path, read_flat: Callable[..., Flat],
) -> None:  # fmt: skip
    monkeypatch.setattr("deepgen_jax.convert.lazy_params.BLOCK_BYTES", 1000)
    convert(out=tmp_path / "m", checkpoint=data_dir / "deepgen_sft.pth", **bases)
    expected = read_flat(folders("sft"))
    ours = read_flat(tmp_path / "m")
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name].astype(np.float32), value.astype(np.float32), 0, 1e-6, name)
