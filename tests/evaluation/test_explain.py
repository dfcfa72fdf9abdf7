"""Explanations on nano: the pipeline's image, normalised maps, effective knock-outs."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from deepgen_jax import DeepGenPipeline
from deepgen_jax.cli.main import main
from deepgen_jax.data.tokens import format_prompt
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.explain.heat_maps import encode, observe
from deepgen_jax.evaluation.explain.knockouts import knock_out, without_layer
from deepgen_jax.evaluation.explain.lens import logit_lens
from deepgen_jax.evaluation.explain.page import coloured
from deepgen_jax.evaluation.explain.words import words_of
from deepgen_jax.models.mmdit import MMDiT, block_runs
from deepgen_jax.nano.explain_scores import iou, mask_of, samples, uniform_iou
from deepgen_jax.stores.model_folder import locate

PROMPT = "a large red circle left of a small blue square"
SETTINGS = {"width": 96, "height": 96, "steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def nano() -> DeepGenPipeline:
    return DeepGenPipeline.from_pretrained("nano")


@pytest.fixture(scope="module")
def trace(nano):
    return observe(nano, PROMPT, **SETTINGS)


def test_the_explained_image_is_the_sampled_one(nano, trace):
    settings = {"height": 96, "width": 96, "num_inference_steps": 2, "guidance_scale": 1.0, "padding": "masked"}
    out = nano([PROMPT], seed=[3], **settings)
    np.testing.assert_allclose(trace.latents, out.latents[0], atol=2e-4)
    assert np.abs(trace.pixels.astype(int) - np.asarray(out.images[0])).max() <= 1


def test_maps_are_shares_of_each_patch(nano, trace):
    assert trace.words.shape == (len(PROMPT.split()), 6, 6)
    assert trace.think.shape == (nano.config.bridge.num_queries, 6, 6)
    for maps in (trace.words, trace.think):
        assert (maps >= 0).all()
        np.testing.assert_allclose(maps.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('A sign "KEEP  OUT".', ["A", "sign", "KEEP", "OUT"]),
        ("don't re-use it", ["don't", "re-use", "it"]),
        ("红色的圆 x", ["红", "色", "的", "圆", "x"]),
        ("user Generate an image: user", ["user", "Generate", "an", "image", "user"]),
    ],
)
@pytest.mark.parametrize("images", [None, (4,)])
def test_words_have_the_positions_of_their_tokens(nano, prompt, words, images):
    found, length = words_of(nano.tokenizer, prompt, images)
    assert [word.text for word in found] == words
    ids = nano.tokenizer.encode(format_prompt(prompt, images))
    assert length == len(ids)
    for word in found:
        text = nano.tokenizer.decode([ids[i] for i in word.tokens])
        assert word.text in text or "\ufffd" in text


def test_a_layer_without_outputs_does_not_change_its_streams(nano):
    config, params = nano.config.mmdit, nano.params["mmdit"]
    for i, run in enumerate(block_runs(config)):
        for index in range(run.length):
            params = without_layer(params, f"blocks_{i}", index)
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((1, 4, config.in_channels * 4), np.float32)
    pooled = rng.standard_normal((1, config.pooled_projection_dim), np.float32)
    contexts = rng.standard_normal((2, 1, 3, config.joint_attention_dim), np.float32)
    velocity = jax.jit(
        lambda params, context: MMDiT(config).apply(
            {"params": params}, patches, jnp.arange(4)[None], jnp.array([500.0]), pooled, context
        )
    )
    # With no layer left, nothing of the context reaches the image.
    np.testing.assert_array_equal(velocity(params, contexts[0]), velocity(params, contexts[1]))
    whole = nano.params["mmdit"]
    assert np.abs(velocity(whole, contexts[0]) - velocity(whole, contexts[1])).max() > 1e-3


def test_knock_outs_are_complete_and_relative(nano):
    effects = knock_out(nano, PROMPT, **SETTINGS)
    kinds = [effect.kind for effect in effects]
    assert kinds.count("vlm layer") == 6
    assert kinds.count("think tokens") == 8
    assert kinds.count("mmdit layer") == nano.config.mmdit.num_layers
    assert all(np.isfinite(effect.effect) and effect.effect > 0 for effect in effects)
    assert max(effect.effect for effect in effects if effect.kind == "mmdit layer") > 0.1


def test_the_lens_reads_every_think_token_at_every_selected_layer(nano):
    readings = logit_lens(nano, locate(None), PROMPT, top=2)
    assert {(r.layer, r.token) for r in readings} == {(layer, token) for layer in range(1, 7) for token in range(16)}
    for reading in readings:
        assert len(reading.words) == 2
        assert 1 >= reading.probabilities[0] >= reading.probabilities[1] > 0


def test_iou_of_right_wrong_and_uniform_maps():
    sample = samples(3, seed=0)[2]
    for thing in sample.scene.things:
        mask = mask_of(sample.scene, thing, 96)
        coarse = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((12, 12), Image.Resampling.BOX))
        assert iou(mask.astype(np.float32), mask) == 1
        assert iou(coarse, mask) > 0.5
        assert iou(-coarse, mask) < 0.1
        rng = np.random.default_rng(0)
        chance = np.mean([iou(rng.random(mask.shape), mask) for _ in range(20)])
        assert chance == pytest.approx(uniform_iou(mask), abs=0.02)


def test_colours_follow_the_map():
    pixels = np.zeros((8, 8, 3), np.uint8)
    bright = coloured(pixels, np.array([[0.0, 0.2], [0.1, 0.4]]))
    assert bright[-1, -1].sum() > bright[0, 0].sum()
    assert coloured(pixels, np.zeros((2, 2))).shape == pixels.shape


def test_the_command_writes_a_page_and_json(tmp_path, capsys):
    reference = tmp_path / "reference.png"
    Image.new("RGB", (96, 96), "red").save(reference)
    out = tmp_path / "page.html"
    words = ["explain", "nano", "make it <blue>", "--image", str(reference), "--steps", "1", "--no-knockouts"]
    assert main([*words, "--out", str(out), "--world", "2"]) == 0
    assert "The heat maps are" in capsys.readouterr().out
    page, values = out.read_text(encoding="utf-8"), json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert "make it &lt;blue&gt;" in page
    assert "<script" not in page
    assert "http" not in page
    assert [entry["word"] for entry in values["words"]] == ["make", "it", "blue"]
    assert [row["maps"] for row in values["world_scores"]["rows"]] == ["heat maps", "other thing's map", "uniform"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no prompt is given"),
        (["a circle", "--out", "page.txt"], "--out page.txt is no page"),
        (["a circle", "--size", "50"], "--size is 50; use a multiple of 32"),
        (["a circle", "--top", "0"], "--top is 0"),
        (["..."], "has no words to explain"),
        (["nano", "x", "--image", "absent.png"], "absent.png"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["explain", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("deepgen: error:") == 1
    assert not list(tmp_path.iterdir())


def test_a_prompt_without_words_is_refused(nano):
    with pytest.raises(DeepGenError, match="no words"):
        encode(nano, "!!!")
