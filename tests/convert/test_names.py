"""The name tables cover the model, and their layout changes are bijections."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.convert.keys import Key, Role, parse_key, unused_reason
from deepgen_jax.convert.names import weights
from deepgen_jax.convert.random_release import tiny_config
from deepgen_jax.convert.stored_params import flatten
from deepgen_jax.convert.transforms import Transform, target_shape, to_source, to_target
from deepgen_jax.models.deepgen import abstract_params


def _with(config: DeepGenConfig, part: str, **changes: object) -> DeepGenConfig:
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changes)})


CONFIGS = {
    "released": DeepGenConfig(),
    "tiny": tiny_config(),
    "one group of layers": _with(tiny_config(), "text", num_layers=6),
    "untied": _with(tiny_config(), "text", tie_word_embeddings=False),
    "no dual layers": _with(tiny_config(), "mmdit", dual_attention_layers=()),
    "scattered dual layers": _with(tiny_config(), "mmdit", num_layers=6, dual_attention_layers=(0, 2, 3, 5)),
    "deep autoencoder": _with(tiny_config(), "vae", block_out_channels=(8, 16, 16, 24, 32), layers_per_block=3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_fill_every_parameter_of_the_model_exactly_once(name: str) -> None:
    config = CONFIGS[name]
    filled: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    shapes: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for weight in weights(config).values():
        filled.setdefault(weight.path, []).append(weight.index)
        shapes.setdefault(weight.path, set()).add((*weight.stack, *weight.target_shape))
    model = {path: tuple(leaf.shape) for path, leaf in flatten(abstract_params(config)).items()}
    used = {path: found for path, found in shapes.items() if path[0] != "unused"}
    assert used == {path: {shape} for path, shape in model.items()}
    for path, indices in filled.items():
        stack = next(iter(shapes[path]))[: len(indices[0])]
        assert sorted(indices) == list(np.ndindex(*stack)), path


def test_released_model_has_416_adaptable_modules() -> None:
    table = weights(DeepGenConfig(), lm_head=True).values()
    assert sum(weight.adaptable for weight in table) == 416
    assert {weight.part for weight in table if weight.adaptable} == {"text", "vision", "unused"}


@settings(max_examples=60)
@given(st.sampled_from(list(Transform)), st.lists(st.integers(1, 4), min_size=5, max_size=5))
def test_layout_changes_are_inverted_exactly(transform: Transform, sizes: list[int]) -> None:
    rank = {Transform.CONV: 4, Transform.PATCH_CHANNELS_LAST: 4, Transform.LINEAR: 2, Transform.TABLE: 3}
    shape = tuple(sizes[: rank.get(transform, 5)])
    if transform is Transform.TABLE:
        shape = (1, *shape[1:])
    source = np.arange(math.prod(shape)).reshape(shape)
    target = to_target(transform, source)
    assert target.shape == target_shape(transform, shape)
    np.testing.assert_array_equal(to_source(transform, target, shape), source)


def test_linear_rows_are_columns_of_the_kernel() -> None:
    weight = np.arange(12).reshape(4, 3)
    axis = Transform.LINEAR.row_axis
    assert axis == 1
    np.testing.assert_array_equal(
        to_target(Transform.LINEAR, weight[1:3]), to_target(Transform.LINEAR, weight).take([1, 2], axis)
    )


def test_a_patch_kernel_sees_a_flattened_patch() -> None:
    rng = np.random.default_rng(0)
    image, weight = rng.standard_normal((3, 2, 2)), rng.standard_normal((5, 3, 2, 2))
    expected = np.einsum("ocpq,cpq->o", weight, image)
    last = to_target(Transform.PATCH_CHANNELS_LAST, weight)
    first = to_target(Transform.PATCH_CHANNELS_FIRST, weight)
    np.testing.assert_allclose(image.transpose(1, 2, 0).reshape(-1) @ last, expected)
    np.testing.assert_allclose(image.reshape(-1) @ first, expected)


@pytest.mark.parametrize(
    ("raw", "prefix", "key"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "lmm.", "lmm.model.language_model.layers.3.self_attn.q_proj.weight"),
        ("model.language_model.norm.weight", "lmm.", "lmm.model.language_model.norm.weight"),
        ("visual.blocks.0.norm1.weight", "lmm.", "lmm.model.visual.blocks.0.norm1.weight"),
        ("model.visual.merger.ln_q.weight", "lmm.", "lmm.model.visual.merger.ln_q.weight"),
        ("lm_head.weight", "lmm.", "lmm.lm_head.weight"),
        ("module.lmm.model.norm.weight", "", "lmm.model.language_model.norm.weight"),
        ("module.model.lmm.visual.blocks.0.norm1.weight", "", "lmm.model.visual.blocks.0.norm1.weight"),
        ("model.meta_queries", "", "meta_queries"),
        ("model.projector_1.bias", "", "projector_1.bias"),
        ("module.transformer.proj_out.weight", "", "transformer.proj_out.weight"),
        ("lmm.base_model.model.lm_head.weight", "", "lmm.lm_head.weight"),
        ("encoder.mid_block.attentions.0.proj_attn.bias", "vae.", "vae.encoder.mid_block.attentions.0.to_out.0.bias"),
        ("lmm.lm_head.base_layer.weight", "", "lmm.lm_head.weight"),
    ],
)
def test_spellings(raw: str, prefix: str, key: str) -> None:
    assert parse_key(raw, prefix) == Key(key)


def test_adapter_keys_of_any_name() -> None:
    assert parse_key("lmm.lm_head.lora_A.sft.weight") == Key("lmm.lm_head.weight", Role.LORA_A, "sft")
    table = parse_key("module.lmm.model.embed_tokens.lora_embedding_B.default")
    assert table == Key("lmm.model.language_model.embed_tokens.weight", Role.LORA_B, "default")


def test_optional_tensors_are_listed() -> None:
    assert unused_reason("ema.transformer.proj_out.weight")
    assert unused_reason("lmm.model.visual.rotary_pos_emb.inv_freq")
    assert unused_reason("transformer.proj_out.weight") is None
