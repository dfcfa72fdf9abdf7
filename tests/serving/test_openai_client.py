"""The official client against the service: sync, async and streaming, generation and edits."""

from __future__ import annotations

import asyncio
import base64
import io
from dataclasses import replace

import numpy as np
import openai
import pytest
from PIL import Image
from support.fake_engine import FakeEngine, image_of
from support.services import noise, pixels, png

from deepgen_jax.serving.jobs import Job

FOX = Job("generation", "a fox", "", 7, 64, 64, 4, 1.0, "euler")


@pytest.fixture
def service(start):
    return start(FakeEngine())


@pytest.fixture
def client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def upload(name: str, array: np.ndarray):
    return (name, png(array), "image/png")


def test_generation(client):
    answer = client.images.generate(prompt="a fox", n=3, size="64x64", extra_body={"seed": 7})
    assert (answer.size, answer.output_format, answer.background) == ("64x64", "png", "opaque")
    assert answer.usage.output_tokens == 48
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert len(answer.data) == 3
    for k, image in enumerate(answer.data):
        np.testing.assert_array_equal(pixels(image.b64_json), image_of(replace(FOX, seed=7 + k)))


def test_further_fields_reach_the_model(service, client):
    extra = {"negative_prompt": "snow", "num_inference_steps": 9, "guidance_scale": 3.5, "seed": 1, "sampler": "heun"}
    client.images.generate(prompt="a fox", size="96x64", extra_body=extra)
    job = service.service._engine.batches[-1][0]
    assert job == replace(
        FOX, negative_prompt="snow", steps=9, guidance=3.5, seed=1, sampler="heun", width=96, height=64
    )


@pytest.mark.parametrize(("format", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client, format, name):
    answer = client.images.generate(prompt="a fox", output_format=format, response_format="url")
    head, _, data = answer.data[0].url.partition(",")
    assert head == f"data:image/{format};base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).format == name


def test_compression_makes_files_smaller(start):
    class Noisy(FakeEngine):
        def run(self, jobs, *args):
            return [noise(job.width, job.height) for job in jobs]

    service = start(Noisy())
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    sizes = [
        len(client.images.generate(prompt="x", output_format="jpeg", output_compression=q).data[0].b64_json)
        for q in (90, 10)
    ]
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("several", [False, True])
def test_edit(service, client, several):
    first, second = noise(64, 96), noise(32, 32)
    image = [upload("a.png", first), upload("b.png", second)] if several else upload("a.png", first)
    answer = client.images.edit(image=image, prompt="make it blue", extra_body={"seed": 7, "strength": 0.5})
    assert answer.size == "64x96"
    job = service.service._engine.batches[-1][0]
    assert [picture.size for picture in job.images] == ([(64, 96), (32, 32)] if several else [(64, 96)])
    np.testing.assert_array_equal(np.asarray(job.images[0]), first)
    assert (job.kind, job.strength, job.mask) == ("edit", 0.5, None)
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), image_of(job))


def test_mask(service, client):
    picture, mask = noise(64, 64), np.full((64, 64, 4), 255, np.uint8)
    mask[10:20, 30:50, 3] = 0
    client.images.edit(image=upload("a.png", picture), mask=upload("m.png", mask), prompt="a fox")
    job = service.service._engine.batches[-1][0]
    np.testing.assert_array_equal(job.mask, mask[..., 3] == 0)
    np.testing.assert_array_equal(np.asarray(job.source), picture)


def test_streaming(client):
    stream = client.images.generate(prompt="a fox", stream=True, partial_images=3, n=2, extra_body={"seed": 7})
    events = list(stream)
    assert [event.type for event in events].count("image_generation.partial_image") == 6
    done = [event for event in events if event.type == "image_generation.completed"]
    assert len(done) == 2
    for event in events:
        want = image_of(replace(FOX, seed=7 + event.image_index, previews=0))
        half = event.type == "image_generation.partial_image"
        np.testing.assert_array_equal(pixels(event.b64_json), want // 2 if half else want)
    partial = [event.partial_image_index for event in events if event.type.endswith("partial_image")]
    assert sorted(partial) == [0, 0, 1, 1, 2, 2]
    assert done[0].usage.output_tokens == 16


def test_streamed_edit(client):
    stream = client.images.edit(image=upload("a.png", noise(64, 64)), prompt="a fox", stream=True, partial_images=1)
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_an_error_in_a_stream(client):
    with pytest.raises(openai.APIError, match="this prompt is refused"):
        list(client.images.generate(prompt="refused", stream=True))


def test_async(service):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
            asks = [client.images.generate(prompt="a fox", extra_body={"seed": seed}) for seed in range(12)]
            answers = await asyncio.gather(*asks)
            stream = await client.images.generate(prompt="a fox", stream=True, partial_images=1)
            return answers, [event.type async for event in stream]

    answers, events = asyncio.run(run())
    for seed, answer in enumerate(answers):
        np.testing.assert_array_equal(pixels(answer.data[0].b64_json), image_of(replace(FOX, seed=seed)))
    assert events == ["image_generation.partial_image", "image_generation.completed"]


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "fake"
    assert client.models.retrieve("fake").deepgen["default_size"] == "64x64"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_errors_have_the_types_of_the_client(client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt="a fox", size="63x64")
    assert (bad.value.param, bad.value.code, bad.value.type) == ("size", "invalid_value", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="31 tokens long"):
        client.images.generate(prompt="fox " * 31)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.images.generate(prompt="a fox", model="dall-e-9")
    with pytest.raises(openai.InternalServerError, match="log has the reason"):
        client.images.generate(prompt="broken")
