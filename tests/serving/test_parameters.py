"""Fields of requests: JSON values and form strings are read alike; every value is accepted or refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_engine import FakeEngine

from deepgen_jax.serving.errors import APIError
from deepgen_jax.serving.jobs import Job
from deepgen_jax.serving.parameters import FIELDS, Parameters, parse
from deepgen_jax.serving.settings import ServeConfig

INFO = FakeEngine().info


def read(fields, kind="generation", **config) -> Parameters:
    return parse(kind, fields, INFO, ServeConfig(**config), ("fake", "deepgen"))


def test_defaults_come_from_the_model():
    p = read({"prompt": "a fox"})
    assert (p.n, p.size, p.steps, p.guidance, p.sampler) == (1, None, 4, 1.0, "euler")
    assert (p.format, p.compression, p.stream, p.partial_images, p.as_url) == ("png", None, False, 0, False)
    assert read({"prompt": "a fox"}).seed != read({"prompt": "a fox"}).seed


VALID = {
    "prompt": st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip),
    "n": st.integers(1, 10),
    "size": st.sampled_from(["auto", "64x64", "128x64", "64X96"]),
    "num_inference_steps": st.integers(1, 200),
    "guidance_scale": st.floats(0, 100),
    "seed": st.integers(0, 2**32 - 11),
    "stream": st.booleans(),
    "negative_prompt": st.text(st.characters(exclude_categories=("Cs", "Cc"))),
    "sampler": st.sampled_from(["euler", "heun"]),
    "strength": st.floats(0.01, 1),
}


@given(st.fixed_dictionaries({"prompt": VALID["prompt"]}, optional={k: v for k, v in VALID.items() if k != "prompt"}))
def test_form_strings_mean_what_json_values_mean(fields):
    fields.setdefault("seed", 0)
    strings = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    assert read(fields, "edit") == read(strings, "edit")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=2)
)


@given(st.dictionaries(st.sampled_from(FIELDS["edit"]) | st.text(max_size=8), json_values, max_size=5))
def test_any_json_is_read_or_refused_by_name(fields):
    fields.setdefault("prompt", "a fox")
    refused = None
    try:
        p = read(fields, "edit")
    except APIError as error:
        refused = error
    if refused is None:
        assert 1 <= p.n <= 10
        assert math.isfinite(p.guidance)
        assert p.prompt.strip()
    else:
        assert 400 <= refused.status < 500
        assert refused.param in fields
        assert json.dumps(refused.envelope)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({}, 400, "'prompt' is missing or empty"),
        ({"prompt": " "}, 400, "'prompt' is missing or empty"),
        ({"prompt": "x", "num_steps": 4}, 400, "Unknown parameter: 'num_steps'"),
        ({"prompt": "x", "guidance_scal": 4}, 400, "did you mean guidance_scale? known: "),
        ({"prompt": "x", "model": "dall-e-9"}, 404, "this server has fake, deepgen"),
        ({"prompt": "x", "n": 11}, 400, "expected 1 to 10"),
        ({"prompt": "x", "n": True}, 400, "expected a whole number"),
        ({"prompt": "x", "size": "70x64"}, 400, "the nearest is 64x64"),
        ({"prompt": "x", "size": "4096x4096"}, 400, "at most 16384 pixels"),
        ({"prompt": "x", "size": "large"}, 400, "write WIDTHxHEIGHT"),
        ({"prompt": "x", "seed": 2**32}, 400, "expected 0 to"),
        ({"prompt": "x", "seed": 2**32 - 1, "n": 2}, 400, "expected 0 to"),
        ({"prompt": "x", "guidance_scale": math.nan}, 400, "from 0 to 100"),
        ({"prompt": "x", "partial_images": 2}, 400, "needs 'stream': true"),
        ({"prompt": "x", "background": "transparent"}, 400, "not supported"),
        ({"prompt": "x", "output_compression": 50}, 400, "applies to jpeg and webp"),
        ({"prompt": "x", "sampler": "ddim"}, 400, "choose one of euler, heun"),
        ({"prompt": "a\ud800"}, 400, "half a surrogate pair"),
        ({"prompt": "x", "strength": 0.5}, 400, "Unknown parameter: 'strength'"),
        ({"prompt": "x", "num_inference_steps": 51}, 400, "expected 1 to 50"),
    ],
)
def test_refusals(fields, status, message):
    with pytest.raises(APIError) as caught:
        read(fields, max_steps=50)
    assert caught.value.status == status
    assert message in caught.value.message


def job(steps: int, strength: float, previews: int) -> Job:
    return Job("edit", "x", "", 0, 64, 64, steps, 1.0, "euler", strength=strength, previews=previews)


@given(st.integers(1, 200), st.floats(0.001, 1), st.integers(0, 3))
def test_previews_fall_between_the_first_and_the_last_step(steps, strength, previews):
    due = job(steps, strength, previews).preview_steps()
    first = job(steps, strength, previews).first_step
    assert 0 <= first < steps
    assert all(first < step < steps for step in due)
    assert list(due) == sorted(due)
    assert len(due) == min(previews, steps - first - 1) or len(due) <= previews
    if steps - first > previews:
        assert list(due.values()) == list(range(previews))


def test_a_model_of_few_steps_takes_its_settings_alone():
    info = replace(INFO, steps=2, guidance=1.0, samplers=("pi_flow",), few_step=True)

    def read_few(**fields):
        return parse("generation", {"prompt": "a fox", **fields}, info, ServeConfig(), ("fake",))

    p = read_few(num_inference_steps=2, guidance_scale=1, sampler="pi_flow")
    assert (p.steps, p.guidance, p.sampler) == (2, 1.0, "pi_flow")
    for field, value in (("num_inference_steps", 4), ("guidance_scale", 4.0), ("sampler", "euler")):
        with pytest.raises(APIError, match=field):
            read_few(**{field: value})
