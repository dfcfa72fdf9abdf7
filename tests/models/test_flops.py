"""Analytic operation counts against the products in the traced programs, and against XLA's own count."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from deepgen_jax.config import BridgeConfig, DeepGenConfig, MMDiTConfig, TextConfig, VAEConfig, VisionConfig
from deepgen_jax.models import flops
from deepgen_jax.models.deepgen import DeepGen, abstract_params

CONFIG = DeepGenConfig(
    text=TextConfig(
        hidden_size=128, intermediate_size=336, num_layers=9, num_heads=2, num_kv_heads=1, vocab_size=60,
        mrope_sections=(8, 12, 12),
    ),
    vision=VisionConfig(
        depth=3, hidden_size=64, intermediate_size=100, num_heads=2, full_attention_blocks=(1,), out_hidden_size=128
    ),
    bridge=BridgeConfig(
        num_queries=5, hidden_size=96, intermediate_size=200, num_layers=2, num_heads=2, selection_stride=3
    ),
    mmdit=MMDiTConfig(
        num_layers=6, num_heads=2, joint_attention_dim=96, caption_projection_dim=128, pooled_projection_dim=80,
        dual_attention_layers=(0, 1), pos_embed_max_size=12, sample_size=8,
    ),
    vae=VAEConfig(block_out_channels=(8, 16, 24), layers_per_block=1, norm_num_groups=4),
)  # fmt: skip
LENGTH = 37


def products(jaxpr):
    """Operations of all matrix products and convolutions of a jaxpr; a scan's body counts once a turn."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
            total += 2 * equation.outvars[0].aval.size * contracted
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[features]
        inner = sum(products(sub) for sub in jaxprs_in_params(equation.params))
        total += inner * equation.params.get("length", 1)
    return total


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def method(name, config, **options):
    model = DeepGen(config)
    return lambda params, *args: model.apply({"params": params}, *args, method=name, **options)


def condition(batch):
    mask = array(batch, LENGTH, dtype=jnp.bool_)
    ids = array(batch, LENGTH - CONFIG.bridge.num_queries, dtype=jnp.int32)
    return method("condition", CONFIG), (ids, array(3, batch, LENGTH, dtype=jnp.int32), mask, mask)


def velocity(batch, references, config=CONFIG):
    sizes, tokens = config.mmdit, 20 + references
    inputs = (
        array(batch, tokens, sizes.patch_size**2 * sizes.in_channels),
        array(batch, tokens, dtype=jnp.int32),
        array(batch),
        array(batch, sizes.pooled_projection_dim),
        array(batch, LENGTH, sizes.joint_attention_dim),
    )
    return method("velocity", config, num_targets=20), inputs


def vision():
    cells = [array(1, 24, dtype=jnp.int32)] * 3
    return method("encode_images", CONFIG), (array(1, 24, CONFIG.vision.patch_dim), *cells)


CASES = {
    "condition": (*condition(1), flops.condition(CONFIG, LENGTH)),
    "condition of a batch": (*condition(3), 3 * flops.condition(CONFIG, LENGTH)),
    "velocity": (*velocity(1, 0), flops.mmdit(CONFIG.mmdit, 20, LENGTH)),
    "velocity with references": (*velocity(2, 16), 2 * flops.mmdit(CONFIG.mmdit, 20, LENGTH, 16)),
    "vision tower": (*vision(), flops.vision(CONFIG.vision, 24)),
    "decoder": (method("vae_decode", CONFIG), (array(1, 6, 4, 16),), flops.vae_decoder(CONFIG.vae, 24, 16)),
    "encoder": (method("vae_encode", CONFIG), (array(1, 24, 16, 3),), flops.vae_encoder(CONFIG.vae, 24, 16)),
}


@pytest.mark.parametrize(("function", "inputs", "expected"), CASES.values(), ids=CASES)
def test_counts_are_those_of_the_traced_products(function, inputs, expected):
    assert products(jax.make_jaxpr(function)(abstract_params(CONFIG), *inputs).jaxpr) == expected


def test_count_is_close_to_that_of_xla():
    """Runs of one layer each, so that XLA, which counts a loop's body once, sees every layer."""
    mmdit = MMDiTConfig(**{**vars(CONFIG.mmdit), "num_layers": 3, "dual_attention_layers": (0,)})
    config = DeepGenConfig(**{**vars(CONFIG), "mmdit": mmdit})
    function, inputs = velocity(2, 16, config)
    counted = jax.jit(function).lower(abstract_params(config), *inputs).cost_analysis()["flops"]
    assert counted == pytest.approx(2 * flops.mmdit(mmdit, 20, LENGTH, 16), rel=0.03)


def test_generation_counts_both_sides_of_guidance():
    plain = flops.text_to_image(CONFIG, 24, 16, 7, LENGTH, guided=False)
    guided = flops.text_to_image(CONFIG, 24, 16, 7, LENGTH, guided=True)
    assert plain.sampler == 7 * flops.mmdit(CONFIG.mmdit, 6, LENGTH)
    assert guided == (2 * plain.condition, 2 * plain.sampler, plain.decoder)
    assert guided.total == sum(guided)


@pytest.mark.parametrize("trains", [("bridge", "mmdit"), ("mmdit",)])
def test_training_counts_the_passes_of_its_gradients(trains):
    """A product's gradients take two more of its size; attention has a few more products than counted."""
    encode, inputs = condition(1)
    denoise, (tokens, positions, time, *_) = velocity(1, 0)
    params = abstract_params(CONFIG)

    def loss(trained, frozen):
        weights = frozen | trained
        pooled, sequence = encode(weights, *map(jnp.zeros_like, inputs))[:2]
        return jnp.sum(denoise(weights, *map(jnp.zeros_like, (tokens, positions, time)), pooled, sequence))

    trained = {name: params[name] for name in trains}
    traced = jax.make_jaxpr(jax.value_and_grad(loss))(trained, params)
    assert products(traced.jaxpr) == pytest.approx(flops.training(CONFIG, trains, 20, LENGTH), rel=0.1)
