"""Attention: the implementations against each other, a plain formula, and the meaning of each mask."""

from __future__ import annotations

import importlib
import re
from functools import partial
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import Primitive
from support import runs

from deepgen_jax.models.attention import attention
from deepgen_jax.models.plan import Plan, fastest_kernel
from deepgen_jax.models.splash import block_and_length, splash_attention
from deepgen_jax.models.stack import FLASH, Remat, rematerialised

BATCH, QUERIES, KEYS, HEADS, GROUPS, DIM = 2, 7, 9, 6, 2, 8


def heads(seed, length, count):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, length, count, DIM)), jnp.float32)


QUERY, KEY, VALUE = heads(0, QUERIES, HEADS), heads(1, KEYS, GROUPS), heads(2, KEYS, GROUPS)
KEY_MASK = jnp.asarray([[True] * 4 + [False] * 5, [False, True] * 4 + [True]])
SEGMENTS = jnp.asarray([[0, 0, 1, 1, 1, 0, 2], [3, 3, 3, 3, 3, 3, 4]])

#: name -> (arguments of `attention`, length of keys, mask [B, Q, K] that they mean)
MASKS = {
    "everything": ({}, KEYS, np.ones((BATCH, QUERIES, KEYS), bool)),
    "key mask": ({"key_mask": KEY_MASK}, KEYS, np.repeat(KEY_MASK[:, None], QUERIES, axis=1)),
    "key lengths": (
        {"key_lengths": jnp.asarray([1, 6])}, KEYS, np.arange(KEYS) < np.asarray([[[1]] * QUERIES, [[6]] * QUERIES])
    ),
    "segments": ({"segment_ids": SEGMENTS}, QUERIES, np.asarray(SEGMENTS[:, :, None] == SEGMENTS[:, None])),
    "causal": ({"causal": True}, QUERIES, np.repeat(np.tril(np.ones((1, QUERIES, QUERIES), bool)), BATCH, axis=0)),
    "causal, padded on the left": (
        {"causal": True, "key_mask": jnp.arange(QUERIES) >= jnp.asarray([[0], [3]])},
        QUERIES,
        np.tril(np.ones((QUERIES, QUERIES), bool)) & (np.arange(QUERIES) >= np.asarray([[[0]], [[3]]])),
    ),
}  # fmt: skip


def plain(query, key, value, mask):
    """The formula in float64; zeros where a query has no key."""
    key, value = (np.repeat(np.asarray(x, np.float64), HEADS // GROUPS, axis=2) for x in (key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", np.asarray(query, np.float64), key) / np.sqrt(DIM)
    weights = np.exp(scores) * mask[:, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.parametrize("kernel", ["xla", "loop"])
@pytest.mark.parametrize(("masks", "length", "meaning"), MASKS.values(), ids=MASKS)
def test_masks_mean_what_they_say(masks, length, meaning, kernel):
    key, value = KEY[:, :length], VALUE[:, :length]
    actual = attention(QUERY, key, value, **masks, plan=Plan(kernel))
    np.testing.assert_allclose(actual, plain(QUERY, key, value, meaning), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.02)])
@pytest.mark.parametrize(("masks", "length"), [value[:2] for value in MASKS.values()], ids=MASKS)
def test_gradients_agree(masks, length, dtype, tolerance):
    operands = [x.astype(dtype) for x in (QUERY, KEY[:, :length], VALUE[:, :length])]

    def loss(query, key, value, kernel):
        out = attention(query, key, value, **masks, plan=Plan(kernel))
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    expected, found = (jax.grad(loss, argnums=(0, 1, 2))(*operands, kernel) for kernel in ("xla", "loop"))
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == dtype
        actual, wanted = (np.asarray(x, np.float32) for x in (actual, wanted))
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


class _Looped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return attention(x, x, jnp.sin(x), plan=Plan("loop"))


@pytest.mark.parametrize("remat", get_args(Remat))
def test_a_loop_never_holds_the_scores_of_two_pairs(remat: Remat):
    layer = rematerialised(_Looped, remat)
    text = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(layer().apply({}, x))))).lower(jnp.ones((2, 7, 3, 8))).as_text()
    assert set(re.findall(r"tensor<([\dx]*7x7)xf32>", text)) == {"1x7x7", "7x7"}


@pytest.mark.parametrize("name", ["everything", "key mask", "segments", "causal, padded on the left"])
def test_the_tpu_kernel_agrees(name):
    """Interpreted; longer than a block and not whole blocks, so that there is padding to hide."""
    masks, _, _ = MASKS[name]
    repeat = 40
    query = jnp.concatenate([QUERY] * repeat, axis=1)
    other = ("segment_ids" in masks or "causal" in masks) and QUERIES
    key, value = (jnp.concatenate([x[:, : other or KEYS]] * repeat, axis=1) for x in (KEY, VALUE))
    masks = {name: x if name == "causal" else jnp.concatenate([x] * repeat, axis=1) for name, x in masks.items()}

    def loss(run, *operands):
        out = run(*operands, **masks)
        return jnp.sum(jnp.sin(out)), out

    def both(run):
        return jax.value_and_grad(lambda *x: loss(run, *x), argnums=(0, 1, 2), has_aux=True)(query, key, value)

    (_, out), gradients = both(partial(splash_attention, interpret=True))
    (_, expected), wanted = both(partial(attention, plan=Plan("xla")))
    np.testing.assert_allclose(out, expected, rtol=0, atol=5e-6)
    for actual, like in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(actual, like, rtol=0, atol=5e-6 * np.abs(like).max())


@pytest.mark.parametrize(
    ("length", "expected"),
    [(7, (128, 128)), (192, (256, 256)), (512, (512, 512)), (1024, (1024, 1024)), (1216, (640, 1280)),
     (1280, (640, 1280)), (1408, (768, 1536)), (2048, (1024, 2048)), (2560, (640, 2560))],
)  # fmt: skip
def test_blocks_are_large_and_padding_small(length, expected):
    assert block_and_length(length) == expected


def test_gradient_of_a_query_without_keys_is_finite():
    mask = jnp.zeros((BATCH, KEYS), bool)
    for plan in (Plan("xla"), Plan("loop")):
        value, gradient = jax.value_and_grad(
            lambda q, plan=plan: jnp.sum(attention(q, KEY, VALUE, key_mask=mask, plan=plan))
        )(QUERY)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("other", [{"key_mask": KEY_MASK}, {"causal": True}])
def test_key_lengths_refuse_other_masks(other):
    with pytest.raises(ValueError, match="replaces all other masks"):
        attention(QUERY, KEY, VALUE, key_lengths=jnp.asarray([1, 6]), **other)


@pytest.mark.parametrize(("repeats", "dtype"), [(17, jnp.bfloat16), (1, jnp.float32)])
def test_what_flash_attention_does_not_take_runs_without_it(repeats, dtype):
    query, key, value = (jnp.concatenate([x.astype(dtype)] * repeats, axis=-1) for x in (QUERY, KEY, VALUE))
    np.testing.assert_array_equal(
        attention(query, key, value, plan=Plan("cudnn")), attention(query, key, value, plan=Plan("xla"))
    )


MESHES = """
import sys
sys.path[:0] = sys.argv[1:]
import jax, numpy as np
import test_attention as cases
from deepgen_jax.models.attention import attention
from deepgen_jax.models.plan import Plan
from deepgen_jax.parallel.mesh import make_mesh

for spec, count in (("data=2", 2), ("fsdp=2", 2), ("data=2,tensor=3", 6), ("fsdp=6", 6)):
    plan = Plan("xla", make_mesh(spec, jax.devices()[:count]))
    for name, (masks, length, meaning) in cases.MASKS.items():
        key, value = cases.KEY[:, :length], cases.VALUE[:, :length]
        arrays = {k: m for k, m in masks.items() if k != "causal"}

        def out(query, key, value, arrays, plan=plan, causal=masks.get("causal", False)):
            return attention(query, key, value, **arrays, causal=causal, plan=plan)

        def gradient(plan):
            total = lambda *x: jax.numpy.sum(jax.numpy.sin(out(*x, arrays, plan)))
            return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(cases.QUERY, key, value)

        wanted = cases.plain(cases.QUERY, key, value, meaning)
        np.testing.assert_allclose(jax.jit(out)(cases.QUERY, key, value, arrays), wanted, atol=2e-6, err_msg=name)
        for actual, expected in zip(gradient(plan), gradient(Plan()), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=2e-6, err_msg=name)
print("equal")
"""


def test_a_mesh_splits_samples_and_heads_and_changes_nothing():
    """Also where there are fewer samples than devices, and fewer groups of keys than parts of heads."""
    folder = Path(__file__).parent
    assert runs.printed(MESHES, str(folder), str(folder.parent), devices=6) == "equal"


def test_a_single_cpu_device_loops():
    devices = jax.devices("cpu")
    assert fastest_kernel(devices[:1], jnp.float32) == "loop"
    assert fastest_kernel(devices[:1] * 2, jnp.float32) == "xla"


def test_results_of_flash_attention_are_kept_by_the_name_that_they_have():
    """A renamed operation would be computed again in the backward pass, and no other test would detect it."""
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    assert FLASH in {thing.name for thing in vars(fused).values() if isinstance(thing, Primitive)}


class _Splash(nn.Module):
    @nn.compact
    def __call__(self, x):
        return splash_attention(x, x, jnp.sin(x), key_mask=jnp.ones(x.shape[:2], bool))


@pytest.mark.parametrize(("remat", "kernels"), [("full", 2), ("flash", 1), ("dots", 1)])
def test_splash_attention_is_computed_again_where_its_results_are_not_kept(remat: Remat, kernels: int):
    layer = rematerialised(_Splash, remat)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(layer().apply({}, x)))))
    traced = gradient.trace(jnp.ones((1, 128, 2, 128), jnp.bfloat16))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count('kernel_name = "splash_mha_fwd') == kernels
