"""Configurations of releases: every option is read, required to be what is supported, or knowingly ignored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from deepgen_jax.config import BridgeConfig, DeepGenConfig, MMDiTConfig, SchedulerConfig, TextConfig, VAEConfig
from deepgen_jax.convert import configs, release
from deepgen_jax.errors import DeepGenError

Parser = Callable[[Mapping[str, Any], str], Any]

DEFAULTS = DeepGenConfig()
#: parser, a file's content, what it means
FILES: dict[str, tuple[Parser, dict[str, Any], Any]] = {
    "qwen": (
        configs.qwen_configs,
        release.qwen_json(DEFAULTS.text, DEFAULTS.vision, "bfloat16"),
        (DEFAULTS.text, DEFAULTS.vision),
    ),
    "mmdit": (configs.mmdit_config, release.mmdit_json(DEFAULTS.mmdit), DEFAULTS.mmdit),
    "vae": (configs.vae_config, release.vae_json(DEFAULTS.vae), DEFAULTS.vae),
    "scheduler": (configs.scheduler_config, release.scheduler_json(SchedulerConfig()), SchedulerConfig()),
}


@pytest.mark.parametrize("name", FILES)
def test_written_configurations_are_read_back(name: str) -> None:
    parse, values, expected = FILES[name]
    assert parse(json.loads(json.dumps(values)), "x.json") == expected


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("qwen", "hidden_act", "gelu"),
        ("qwen", "use_sliding_window", True),
        ("qwen", "model_type", "qwen3_vl"),
        ("qwen", "attention_bias", False),
        ("mmdit", "qk_norm", "layer_norm"),
        ("mmdit", "qk_norm", None),
        ("vae", "use_quant_conv", True),
        ("vae", "use_post_quant_conv", None),
        ("vae", "act_fn", "relu"),
        ("vae", "mid_block_add_attention", False),
        ("vae", "latents_mean", [0.0]),
        ("vae", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("scheduler", "use_karras_sigmas", True),
        ("scheduler", "use_exponential_sigmas", True),
        ("scheduler", "use_beta_sigmas", True),
        ("scheduler", "invert_sigmas", True),
        ("scheduler", "stochastic_sampling", True),
        ("scheduler", "shift_terminal", 0.02),
        ("scheduler", "time_shift_type", "linear"),
        ("scheduler", "_class_name", "DDIMScheduler"),
    ],
)
def test_options_that_change_results_are_refused_by_name(name: str, option: str, value: object) -> None:
    parse, values, _ = FILES[name]
    with pytest.raises(DeepGenError, match=r"not supported|expected FlowMatch") as caught:
        parse({**values, option: value}, "x.json")
    assert str(caught.value).startswith("x.json")
    assert option in str(caught.value) or option == "_class_name"


@pytest.mark.parametrize("name", FILES)
def test_unknown_options_are_refused(name: str) -> None:
    parse, values, _ = FILES[name]
    with pytest.raises(DeepGenError, match=r"x.json: the option gadget=3 is unknown \(and 1 more: widget\)"):
        parse({**values, "gadget": 3, "widget": 4}, "x.json")


@pytest.mark.parametrize(
    ("name", "option"), [("mmdit", "num_layers"), ("vae", "block_out_channels"), ("qwen", "vision_config")]
)
def test_missing_options_are_named(name: str, option: str) -> None:
    parse, values, _ = FILES[name]
    with pytest.raises(DeepGenError, match=f"x.json lacks '{option}'"):
        parse({k: v for k, v in values.items() if k != option}, "x.json")


@pytest.mark.parametrize(("option", "value"), [("num_layers", "24"), ("num_layers", 1.5), ("num_layers", True)])
def test_values_of_the_wrong_type_are_named(option: str, value: object) -> None:
    parse, values, _ = FILES["mmdit"]
    with pytest.raises(DeepGenError, match=f"{option} is {value!r}, expected int"):
        parse({**values, option: value}, "x.json")


def test_harmless_scheduler_options_of_newer_versions_are_accepted() -> None:
    parse, values, expected = FILES["scheduler"]
    harmless = {
        "invert_sigmas": False, "shift_terminal": None, "use_karras_sigmas": False, "use_beta_sigmas": False,
        "use_exponential_sigmas": False, "time_shift_type": "exponential", "stochastic_sampling": False,
    }  # fmt: skip
    assert parse({**values, **harmless}, "x.json") == expected


@pytest.mark.parametrize("values", [{}, {"shift": None}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}])
def test_entries_that_a_scheduler_file_lacks_are_those_of_diffusers(values: dict[str, Any]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    usual = FlowMatchEulerDiscreteScheduler.from_config({k: v for k, v in values.items() if v is not None}).config
    config = configs.scheduler_config(values, "x.json")
    assert {name: getattr(config, name) for name in vars(config)} == {name: usual[name] for name in vars(config)}


@pytest.mark.parametrize("nested", [False, True])
def test_configurations_that_transformers_saves(nested: bool, data_dir: Path, tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLConfig

    published = json.loads((data_dir / "qwen2_5_vl" / "config.json").read_text())
    expected = configs.qwen_configs(published, "published")
    if nested:
        Qwen2_5_VLConfig.from_pretrained(data_dir / "qwen2_5_vl").save_pretrained(tmp_path)
        published = json.loads((tmp_path / "config.json").read_text())
        assert "text_config" in published
    text, vision = configs.qwen_configs(published, "x.json")
    assert vision == expected[1]
    fields = [name for name in TextConfig.__dataclass_fields__ if name != "pad_token_id"]  # read from the tokenizer
    assert {name: getattr(text, name) for name in fields} == {name: getattr(expected[0], name) for name in fields}


def test_a_rope_that_does_not_fit_the_heads() -> None:
    parse, values, _ = FILES["qwen"]
    rope = {"type": "mrope", "mrope_section": [16, 24, 25]}
    with pytest.raises(DeepGenError, match="must add up to half the head dimension 128"):
        parse({**values, "rope_scaling": rope}, "x.json")
    with pytest.raises(DeepGenError, match="type='yarn' is not supported"):
        parse({**values, "rope_scaling": {**rope, "type": "yarn"}}, "x.json")


def test_bridge_sizes_come_from_the_shapes() -> None:
    shapes = {
        "meta_queries": (7, 48),
        "projector_1.weight": (64, 288),
        "connector.layers.0.mlp.fc1.bias": (96,),
        "connector.layers.2.layer_norm1.bias": (64,),
    }
    config = configs.bridge_config(shapes, {}, "the defaults", 48)
    assert config == BridgeConfig(num_queries=7, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=32)
    config = configs.bridge_config(shapes, {"num_attention_heads": 2, "layer_norm_eps": 1e-5}, "h.json", 48)
    assert (config.num_heads, config.layer_norm_eps) == (2, 1e-5)


def test_bridge_sizes_without_a_checkpoint_come_from_the_file() -> None:
    sizes = {"num_queries": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = configs.bridge_config({}, {**sizes, "num_attention_heads": 4}, "h.json", 32)
    assert config == BridgeConfig(8, 32, 48, 1, 4)
    assert configs.bridge_config({}, {}, "the defaults", 2048) == BridgeConfig()


def test_defaults_of_optional_entries() -> None:
    parse, values, _ = FILES["mmdit"]
    values = {k: v for k, v in values.items() if k not in ("out_channels", "dual_attention_layers")}
    config = parse(values, "x.json")
    assert (config.out_channels, config.dual_attention_layers) == (MMDiTConfig().in_channels, ())
    parse, values, _ = FILES["vae"]
    assert parse({**values, "shift_factor": None}, "x.json").shift_factor == 0
    assert VAEConfig().shift_factor != 0
