"""Export is the inverse of conversion, to the bit, and other libraries load what it writes."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deepgen_jax.convert import convert, export
from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.model_folder import load_lora, read_manifest, read_scheduler

Flat = dict[str, np.ndarray]


@pytest.mark.parametrize("layout", ["sft", "pretrain", "rl", "ds", "none", "diffusers"])
@pytest.mark.parametrize("format", ["diffusers", "pth"])
def test_round_trip(
    layout: str, format: str, data_dir: Path, folders: Callable[[str], Path], tmp_path: Path,
    read_flat: Callable[..., Flat], assert_same: Callable[[Flat, Flat], None],
) -> None:  # fmt: skip
    folder, out = folders(layout), tmp_path / "exported"
    export(folder, format, out)
    if format == "diffusers":
        convert(out=tmp_path / "m", diffusers=out)
    else:
        bases = {"qwen": data_dir / "qwen2_5_vl", "sd3": data_dir / "sd3_5_kontext"}
        convert(out=tmp_path / "m", checkpoint=out, **bases)
    assert_same(read_flat(tmp_path / "m"), read_flat(folder))
    ours, again = read_manifest(folder), read_manifest(tmp_path / "m")
    assert again.config == ours.config
    assert again.parameters == ours.parameters
    assert read_scheduler(tmp_path / "m") == read_scheduler(folder)
    for file in (folder / "tokenizer").iterdir():
        assert (tmp_path / "m" / "tokenizer" / file.name).read_bytes() == file.read_bytes()


def test_round_trip_of_kept_adapters(
    data_dir: Path, folders: Callable[[str], Path], tmp_path: Path, read_flat: Callable[..., Flat],
    assert_same: Callable[[Flat, Flat], None],
) -> None:  # fmt: skip
    folder, out = folders("sft_adapters"), tmp_path / "all.pth"
    export(folder, "pth", out)
    bases = {"qwen": data_dir / "qwen2_5_vl", "sd3": data_dir / "sd3_5_kontext"}
    convert(out=tmp_path / "m", checkpoint=out, keep_lora=True, **bases)
    assert read_manifest(tmp_path / "m").config == read_manifest(folder).config
    assert_same(read_flat(tmp_path / "m"), read_flat(folder))
    assert_same(read_flat(tmp_path / "m", "lora"), read_flat(folder, "lora"))


def test_export_to_diffusers_merges_kept_adapters(
    folders: Callable[[str], Path], tmp_path: Path, read_flat: Callable[..., Flat],
    assert_same: Callable[[Flat, Flat], None],
) -> None:  # fmt: skip
    export(folders("sft_adapters"), "diffusers", tmp_path / "release")
    convert(out=tmp_path / "m", diffusers=tmp_path / "release")
    assert load_lora(tmp_path / "m") is None
    assert_same(read_flat(tmp_path / "m"), read_flat(folders("sft")))


def test_a_pth_has_the_names_and_values_of_the_checkpoint(
    data_dir: Path, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    export(folders("sft_adapters"), "pth", tmp_path / "all.pth")
    state = torch.load(tmp_path / "all.pth", weights_only=True, mmap=True)["state_dict"]
    for name, tensor in torch.load(data_dir / "deepgen_sft.pth", weights_only=True)["state_dict"].items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    model = torch.load(data_dir / "model.pt", weights_only=True)
    assert state.keys() == model.keys()
    assert {name: tensor.shape for name, tensor in state.items()} == {name: t.shape for name, t in model.items()}
    with zipfile.ZipFile(tmp_path / "all.pth") as archive:
        assert archive.testzip() is None


def test_a_release_equals_the_one_it_was_converted_from(
    data_dir: Path, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    export(folders("diffusers"), "diffusers", tmp_path / "release", max_shard_size="300KB")
    assert len(list((tmp_path / "release" / "vlm").glob("model-0*-of-0*.safetensors"))) > 1
    assert (tmp_path / "release" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    for part in ("transformer", "vae", "vlm", "connector"):
        ours, theirs = (
            {k: v for file in (root / part).glob("*.safetensors") for k, v in load_file(file).items()}
            for root in (tmp_path / "release", data_dir / "deepgen_diffusers")
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("layout", ["sft", "pretrain"])
def test_other_libraries_load_a_release(
    layout: str, folders: Callable[[str], Path], tmp_path: Path, read_flat: Callable[..., Flat]
) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    release = export(folders(layout), "diffusers", tmp_path / "release", max_shard_size="300KB")
    arrays = read_flat(folders(layout))
    complete: dict[str, object] = {}
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        release / "vlm", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    layer = model.model.language_model.layers[9].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(layer.T, arrays["text/layer_groups/up_proj/kernel"][0, 4].astype(np.float32))
    for kind, part in ((SD3Transformer2DModel, "transformer"), (AutoencoderKL, "vae")):
        model, info = kind.from_pretrained(release / part, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        complete[part] = model
    table = complete["transformer"].pos_embed.pos_embed[0].float().numpy()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(table, arrays["mmdit/pos_embed"].astype(np.float32))
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(release / "scheduler").config.shift == 3.0
    assert AutoTokenizer.from_pretrained(release / "tokenizer")("<|im_start|>").input_ids == [1097]


def test_errors_leave_nothing(folders: Callable[[str], Path], data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "place" / "x"
    for folder, arguments, reason in (
        (data_dir / "qwen2_5_vl", {}, "is not a model folder: it is a Qwen2.5-VL folder"),
        (tmp_path / "nowhere", {}, "is not a folder"),
        (folders("none"), {"format": "onnx"}, "--format onnx is unknown"),
        (folders("none"), {"max_shard_size": "5 apples"}, "--max-shard-size 5 apples is not a size"),
    ):
        with pytest.raises(DeepGenError, match=reason):
            export(folder, **{"format": "diffusers", "out": out, **arguments})  # type: ignore[arg-type]
    assert not out.parent.exists()
    export(folders("none"), "pth", out)
    with pytest.raises(DeepGenError, match="exists; choose another --out or pass --overwrite"):
        export(folders("none"), "pth", out)
    export(folders("none"), "pth", out, overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["x"]


def test_damaged_folders(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(folders("none"), folder)
    manifest = folder / "config.json"
    manifest.write_text(manifest.read_text().replace('"num_queries": 128', '"num_queries": 64'))
    with pytest.raises(DeepGenError, match=r"params/ does not fit config\.json at bridge/meta_queries"):
        export(folder, "pth", tmp_path / "x.pth")
    shutil.rmtree(folder / "params")
    with pytest.raises(DeepGenError, match="params is missing; convert the model again"):
        export(folder, "pth", tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
