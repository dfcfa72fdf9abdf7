"""Releases of random weights are real releases."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deepgen_jax.config import SchedulerConfig, TextConfig
from deepgen_jax.convert import convert, export
from deepgen_jax.convert.random_release import tiny_config, write_release, write_tokenizer
from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.model_folder import read_manifest, read_scheduler

Flat = dict[str, np.ndarray]


def ends_a_branch(name: str) -> bool:
    """Whether a weight is the last of a residual branch, outside the VLM."""
    ends = {"bridge": ("out_proj", "fc2"), "mmdit": ("to_out", "add_out", "fc2"), "vae": ("conv2", "to_out")}
    part, *_, layer, _ = name.split("/")
    return layer in ends.get(part, ())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_release_converts(dtype: str, tmp_path: Path, read_flat: Callable[..., Flat]) -> None:
    scheduler = SchedulerConfig(use_dynamic_shifting=True)
    write_release(tmp_path / "r", tiny_config(), dtype=dtype, scheduler=scheduler, max_shard_size="200KB")
    convert(out=tmp_path / "m", diffusers=tmp_path / "r")
    assert read_manifest(tmp_path / "m").config == tiny_config()
    assert read_scheduler(tmp_path / "m") == scheduler
    for name, value in read_flat(tmp_path / "m").items():
        assert value.dtype.name == dtype
        if name.endswith("kernel") and value.shape[-2] > 16:
            inputs = np.prod(value.shape[-4:-1] if "vae" in name and value.ndim == 4 else value.shape[-2:-1])
            gain = 0.25 if name == "vae/decoder/conv_out/kernel" else 0.1 if ends_a_branch(name) else 1
            np.testing.assert_allclose(value.astype(np.float32).std() * inputs**0.5, gain, rtol=0.15, err_msg=name)


@pytest.mark.parametrize(("hidden", "heads", "stride"), [(48, 3, 6), (24, 4, 2), (80, 2, 11)])
def test_the_width_of_the_bridge_is_independent(
    hidden: int, heads: int, stride: int, tmp_path: Path, read_flat: Callable[..., Flat],
    assert_same: Callable[[Flat, Flat], None],
) -> None:  # fmt: skip
    bridge = dataclasses.replace(
        tiny_config().bridge, hidden_size=hidden, num_heads=heads, selection_stride=stride
    )
    config = dataclasses.replace(tiny_config(), bridge=bridge)
    write_release(tmp_path / "r", config)
    # The width comes from projector_1 where no file states it; tensors cannot tell heads and stride.
    (tmp_path / "r" / "connector" / "config.json").unlink()
    hparams = tmp_path / "r" / "deepgen_config.json"
    hparams.write_text(json.dumps({"connector": {"num_attention_heads": heads, "selection_stride": stride}}))
    convert(out=tmp_path / "m", diffusers=tmp_path / "r")
    assert read_manifest(tmp_path / "m").config == config
    arrays = read_flat(tmp_path / "m")
    assert arrays["bridge/meta_queries"].shape == (16, 32)
    states = len(range(config.text.num_layers - 1, 0, -stride))
    assert arrays["bridge/projector_in/kernel"].shape == (states * 32, hidden)
    export(tmp_path / "m", "diffusers", tmp_path / "again")
    convert(out=tmp_path / "n", diffusers=tmp_path / "again")
    assert read_manifest(tmp_path / "n").config == config
    assert_same(read_flat(tmp_path / "n"), arrays)


def test_the_seed_decides(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_release(tmp_path / name, tiny_config(), seed=seed)
        files.append((tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_untied_embeddings(tmp_path: Path, read_flat: Callable[..., Flat]) -> None:
    config = tiny_config()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, tie_word_embeddings=False))
    write_release(tmp_path / "r", config)
    convert(out=tmp_path / "m", diffusers=tmp_path / "r")
    assert read_flat(tmp_path / "m")["unused/text/lm_head/kernel"].shape == (32, 264)


@pytest.mark.parametrize("config", [tiny_config().text, TextConfig()])
def test_the_tokenizer_is_a_byte_tokenizer(config: TextConfig, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nZwei Füchse, 狐狸<|im_end|><|vision_start|><|image_pad|><|vision_end|>"
    ids = tokenizer(text).input_ids
    assert len(ids) == 1 + len("user\nZwei Füchse, 狐狸".encode()) + 4
    assert ids[0] == config.pad_token_id + 1
    assert ids[-4:] == [config.eos_token_id, config.vision_start_token_id, config.image_token_id,
                        config.vision_end_token_id]  # fmt: skip
    assert tokenizer.decode(ids) == text


def test_special_tokens_must_fit(tmp_path: Path) -> None:
    text = dataclasses.replace(tiny_config().text, image_token_id=300)
    with pytest.raises(DeepGenError, match="special tokens' ids"):
        write_release(tmp_path / "place" / "r", dataclasses.replace(tiny_config(), text=text))
    assert not (tmp_path / "place").exists()
