"""First-block cache and guidance interval: exact where they skip nothing, close where they skip, and counted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax import DeepGenPipeline
from deepgen_jax.cli.main import main
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.acceleration import Acceleration, interval_of
from deepgen_jax.models.block_cache import empty_cache, run_cached

PROMPTS = ["a red circle", "a large blue square"]
CALL = {"height": 32, "width": 32, "num_inference_steps": 12, "seed": [1, 2], "output_type": "latent"}


@pytest.fixture(scope="module")
def nano() -> DeepGenPipeline:
    return DeepGenPipeline.from_pretrained("nano")


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_threshold_of_zero_changes_nothing(nano, guidance, sampler):
    settings = {**CALL, "guidance_scale": guidance, "sampler": sampler}
    plain, cached = nano(PROMPTS, **settings), nano(PROMPTS, cache=0.0, **settings)
    np.testing.assert_allclose(cached.latents, plain.latents, atol=1e-4)
    done, total = cached.evaluations
    evaluations = 12 * (2 if sampler == "heun" else 1)
    assert total == 2 * evaluations * nano.config.mmdit.num_layers * (2 if guidance > 1 else 1)
    # Heun's last step evaluates one point twice: the second time nothing has changed.
    repeated = 2 * (nano.config.mmdit.num_layers - 1) * (2 if guidance > 1 else 1) if sampler == "heun" else 0
    assert done == total - repeated
    assert plain.evaluations is None


def test_larger_thresholds_skip_more_and_stray_further(nano):
    plain = nano(PROMPTS, **CALL).latents
    saved, errors = [], []
    for threshold in (0.05, 0.2, 10.0):
        out = nano(PROMPTS, cache=threshold, **CALL)
        saved.append(1 - out.evaluations[0] / out.evaluations[1])
        errors.append(float(np.abs(out.latents - plain).mean()))
    assert saved == sorted(saved)
    assert errors == sorted(errors)
    # Only the first evaluation is full.
    layers = nano.config.mmdit.num_layers
    assert saved[-1] == pytest.approx(11 / 12 * (layers - 1) / layers)


def test_references_are_cached_too(nano):
    from PIL import Image

    references = [[Image.new("RGB", (64, 64), "red")], [Image.new("RGB", (64, 96), "blue")]]
    plain = nano(PROMPTS, references, **CALL).latents
    np.testing.assert_allclose(nano(PROMPTS, references, cache=0.0, **CALL).latents, plain, atol=1e-4)


@pytest.mark.parametrize("cache", [None, 0.0])
def test_guidance_in_an_interval_alone(nano, cache):
    settings = {**CALL, "guidance_scale": 1.7, "cache": cache}
    whole = nano(PROMPTS, **settings)
    everywhere = nano(PROMPTS, guidance_interval=(0, 1), **settings)
    np.testing.assert_allclose(everywhere.latents, whole.latents, atol=1e-4)
    half = nano(PROMPTS, guidance_interval=(0, 0.5), **settings)
    done, total = half.evaluations
    # Half the steps run one side of two.
    assert done / total == pytest.approx(0.75)
    unguided = nano(PROMPTS, **{**settings, "guidance_scale": 1.0})
    errors = [float(np.abs(half.latents - x.latents).mean()) for x in (whole, unguided)]
    assert min(errors) > 1e-3


def test_extrapolation_is_exact_where_updates_are_linear_in_sigma():
    """Later layers that add c + sigma d: repeating is off by d times the distance, extrapolating is exact."""
    constant, slope = jnp.full((1, 4, 3), 0.7), jnp.full((1, 4, 3), 2.0)

    def run(extrapolate: bool) -> np.ndarray:
        cache = empty_cache(1, 4, 3, jnp.float32, 0.5, extrapolate)
        for number, sigma in enumerate((1.0, 0.9, 0.5)):

            def layer(weight, streams, sigma=sigma):
                image, context = streams
                return image + weight[0] + weight[1] * (constant + sigma * slope), context

            # The first layer moves by much once, so that there are two full evaluations, then not at all.
            stack = jnp.array([[(1.0, 3.0, 3.0)[number], 0.0], [0.0, 1.0]])
            streams = (jnp.zeros((1, 4, 3)), jnp.zeros((1, 2, 3)))
            final, cache = run_cached([(layer, stack)], streams, cache, jnp.float32(sigma))
        assert (int(cache.full), int(cache.evaluations)) == (2, 3)
        return np.asarray(final)

    right = np.asarray(3.0 + constant + 0.5 * slope)
    np.testing.assert_allclose(run(True), right, rtol=1e-5)
    np.testing.assert_allclose(run(False), right + 0.4 * 2.0, rtol=1e-5)


def test_skipped_layers_are_not_computed(nano):
    """The program branches: a skipped evaluation costs a fraction of a full one."""
    cache = empty_cache(1, 64, 128, jnp.float32, 10.0, False)
    stack = jnp.stack([jnp.eye(128)] * 40)

    def layer(weight, streams):
        return streams[0] @ weight, streams[1]

    step = jax.jit(lambda x, cache: run_cached([(layer, stack)], (x, x[:, :1]), cache, jnp.float32(0.5)))
    text = step.lower(jnp.ones((1, 64, 128)), cache).as_text()
    assert "case" in text
    assert "while" in text


@given(st.one_of(st.text(max_size=12), st.lists(st.floats(), max_size=4)))
def test_intervals_are_two_numbers_or_refused(values):
    try:
        start, stop = map(float, values.split(",") if isinstance(values, str) else values)
        right = 0 <= start < stop <= 1
    except ValueError:
        right = False
    if right:
        assert Acceleration(guidance_interval=interval_of(values)).guidance_interval == (start, stop)
    else:
        with pytest.raises(DeepGenError, match="interval"):
            Acceleration(guidance_interval=interval_of(values))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cache", "-1"], "threshold is -1"),
        (["--cache", "nan"], "threshold is nan"),
        (["--taylor"], "set its threshold"),
        (["--guidance-interval", "0.5"], "not two numbers"),
        (["--guidance-interval", "0.6,0.2"], "0.6 to 0.2"),
    ],
)
def test_bad_settings_are_one_line(words, message, tmp_path, capsys):
    assert main(["generate", "nano", "a red circle", "--out", str(tmp_path / "x.png"), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_command_says_what_was_saved_and_the_metadata_how(tmp_path, capsys):
    out = tmp_path / "images"
    words = ["generate", "nano", "a red circle", "--steps", "8", "--size", "64", "--out", f"{out}/"]
    assert main([*words, "--cache", "0.3", "--taylor"]) == 0
    assert "evaluations of MMDiT layers were run" in capsys.readouterr().out
    assert '"cache": 0.3' in (out / "metadata.jsonl").read_text()
    assert main(words) == 2, "an accelerated image is no plain one"
    assert "another request" in capsys.readouterr().err
