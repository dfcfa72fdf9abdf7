"""The service beside the images: refusals in the envelope, limits, keys, probes, metrics, log, disconnects."""

from __future__ import annotations

import base64
import json
import socket
import threading

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.fake_engine import FakeEngine
from support.services import noise, png, wait_until

from deepgen_jax.errors import DeepGenError
from deepgen_jax.serving.app import create_app
from deepgen_jax.serving.middleware import Keys
from deepgen_jax.serving.server import BackgroundServer
from deepgen_jax.serving.settings import ServeConfig

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
FOX = {"prompt": "a fox", "size": "64x64"}


def data_url(array: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(array)).decode()


def refused(response: httpx.Response, status: int, message: str = "", code: str | None = None) -> None:
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert code is None or error["code"] == code
    assert response.headers["x-request-id"]


@pytest.fixture(scope="module")
def shared():
    """A service for requests that leave nothing behind."""
    app = create_app(lambda: FakeEngine(), ServeConfig(max_body=200_000, max_images=3, max_image_pixels=300_000))
    with BackgroundServer(app) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        wait_until(lambda: app.state.service.state == "ready")
        yield client


def test_json_edit(shared):
    mask = np.zeros((64, 64, 4), np.uint8)
    fields = {"prompt": "x", "images": [{"image_url": data_url(noise(64, 64))}], "mask": {"image_url": data_url(mask)}}
    assert shared.post(EDIT, json=fields).json()["size"] == "64x64"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "x"}, "'images' is missing"),
        ({"prompt": "x", "images": []}, "'image' is missing"),
        ({"prompt": "x", "images": [{"image_url": "http://169.254.169.254/x.png"}]}, "does not fetch URLs"),
        ({"prompt": "x", "images": [{"image_url": "file:///etc/passwd"}]}, "does not fetch URLs"),
        ({"prompt": "x", "images": [{"image_url": "data:image/png;base64,@@"}]}, "not valid base64"),
        ({"prompt": "x", "images": [{"file_id": "f"}]}, "'file_id' is not supported"),
        ({"prompt": "x", "images": ["x"]}, "has no 'image_url'"),
        ({"prompt": "x", "images": [{"image_url": data_url(noise(8, 8))}] * 4}, "send at most 3"),
    ],
)
def test_json_edits_that_are_refused(shared, fields, message):
    refused(shared.post(EDIT, json=fields), 400, message)


GIF = b"GIF89a\x01\x00\x01\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
OPAQUE, CLEAR = np.full((64, 64, 4), 255, np.uint8), np.zeros((64, 64, 4), np.uint8)


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (b"", None, "'image' is empty"),
        (b"hello", None, "not a PNG, JPEG or WebP"),
        (GIF, None, "not a PNG, JPEG or WebP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", None, "not a PNG, JPEG or WebP"),
        (png(noise(64, 64))[:200], None, "cannot be decoded"),
        (png(Image.new("1", (1000, 1000))), None, "at most 0.3 megapixels"),
        (png(noise(64, 64)), png(noise(64, 64)), "no alpha channel"),
        (png(noise(64, 64)), png(noise(32, 64, 4)), "send equal sizes"),
        (png(noise(64, 64)), png(OPAQUE), "opaque everywhere"),
        (png(noise(64, 64)), png(CLEAR)[:60], "cannot be decoded"),
    ],
)
def test_uploads_that_are_refused(shared, image, mask, message):
    files = {"image": ("a", image)} | ({"mask": ("m", mask)} if mask is not None else {})
    refused(shared.post(EDIT, data={"prompt": "x"}, files=files), 400, message)


def test_forms_that_are_refused(shared):
    picture = ("a.png", png(noise(32, 32)))
    refused(shared.post(EDIT, data={"prompt": "x"}, files={"imag": picture}), 400, "'imag' is a file")
    refused(shared.post(EDIT, data={"prompt": "x"}, files=[("image[]", picture)] * 4), 400, "send at most 3")
    refused(shared.post(EDIT, data={"prompt": "x", "image": "x"}, files={"mask": picture}), 400, "expected a file")
    refused(shared.post(EDIT, data={"prompt": ["x", "y"]}, files={"image": picture}), 400, "given twice")
    refused(shared.post(EDIT, data={"prompt": "x"}), 415)
    refused(shared.post(EDIT, content=b"abc", headers={"content-type": "multipart/form-data"}), 400, "malformed")
    broken = {"content-type": "multipart/form-data; boundary=b"}
    refused(shared.post(EDIT, content=b'--b\r\nContent-Disposition: form-data; name="x', headers=broken), 400)


def test_bodies_and_routes_that_are_refused(shared):
    json_type = {"content-type": "application/json"}
    refused(shared.post(GENERATE, content=b"{", headers=json_type), 400, "not JSON", "invalid_json")
    refused(shared.post(GENERATE, content=b"[" * 50_000, headers=json_type), 400, "not JSON")
    refused(shared.post(GENERATE, content=b"\xff\xfe{}", headers=json_type), 400, "not JSON")
    refused(shared.post(GENERATE, json=["a fox"]), 400, "not a JSON object")
    refused(shared.post(GENERATE, data={"prompt": "x"}), 415, code="unsupported_media_type")
    refused(shared.get(GENERATE), 405, "not allowed")
    refused(shared.post("/v1/chat/completions", json={}), 404, "Unknown route")
    refused(shared.get("/v1/models/other"), 404, "does not exist")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [200_001, 700_000, 3_000_000])
def test_bodies_that_are_too_large(shared, chunked, size):
    body = b'{"prompt": "' + b"x" * size
    content = (body[i : i + 65536] for i in range(0, len(body), 65536)) if chunked else body
    response = shared.post(GENERATE, content=content, headers={"content-type": "application/json"})
    refused(response, 413, "larger than 0.2 MB", "request_too_large")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.binary(max_size=300) | st.text(max_size=100).map(lambda text: json.dumps({"prompt": text}).encode()),
    st.sampled_from([GENERATE, EDIT]),
    st.sampled_from(["application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain", ""]),
)
def test_any_body_gets_an_answer_in_the_format(shared, body, route, kind):
    response = shared.post(route, content=body, headers={"content-type": kind} if kind else {})
    if response.status_code != 200:
        assert 400 <= response.status_code < 500
        refused(response, response.status_code)


def test_the_full_queue_answers_429_with_retry_after(start):
    engine = FakeEngine(open_gate=False)
    service = start(engine, max_batch=1, max_queue=2, batch_window=0.0)
    with service.client() as client:
        threads = [threading.Thread(target=client.post, args=(GENERATE,), kwargs={"json": FOX}) for _ in range(3)]
        threads[0].start()
        engine.begun.acquire()
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: service.metric('deepgen_queue_depth{kind="generation"}') == 2)
        response = client.post(GENERATE, json=FOX)
        refused(response, 429, "queue is full", "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        engine.gate.set()
        for thread in threads:
            thread.join()
    assert service.metric('deepgen_failures_total{code="queue_full"}') == 1
    assert sum(len(batch) for batch in engine.batches) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_what_has_not_begun(start, stream):
    engine = FakeEngine(open_gate=False)
    service = start(engine, max_batch=1, batch_window=0.0)
    with service.client() as client:
        first = threading.Thread(target=client.post, args=(GENERATE,), kwargs={"json": FOX})
        first.start()
        engine.begun.acquire()
        body = json.dumps({**FOX, "prompt": "left", "n": 3, "stream": stream}).encode()
        with socket.create_connection(tuple(httpx.URL(service.url).netloc.decode().split(":"))) as raw:
            head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: service.metric('deepgen_queue_depth{kind="generation"}') == 3)
        wait_until(lambda: service.metric('deepgen_queue_depth{kind="generation"}') == 0)
        engine.gate.set()
        first.join()
        assert client.post(GENERATE, json=FOX).status_code == 200
    assert [job.prompt for batch in engine.batches for job in batch] == ["a fox", "a fox"]
    assert service.metric('deepgen_failures_total{code="client_closed"}') == 1


def test_the_deadline_ends_what_has_not_begun(start):
    engine = FakeEngine(open_gate=False)
    service = start(engine, max_batch=1, deadline=0.2, batch_window=0.0)
    answers = []
    with service.client() as client:
        first = threading.Thread(target=lambda: answers.append(client.post(GENERATE, json=FOX)))
        first.start()
        engine.begun.acquire()
        refused(client.post(GENERATE, json=FOX), 504, "within the deadline", "deadline_exceeded")
        engine.gate.set()
        first.join()
    assert answers[0].status_code == 200, "what has begun is finished"
    assert len(engine.batches) == 1


def test_too_many_uploads_at_once(start):
    service = start(FakeEngine(), max_uploads=1)
    address = tuple(httpx.URL(service.url).netloc.decode().split(":"))
    with socket.create_connection(address) as raw, service.client() as client:
        raw.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        wait_until(lambda: service.service._uploads == 1)
        refused(client.post(GENERATE, json=FOX), 429, code="too_many_uploads")
        raw.close()
        wait_until(lambda: service.service._uploads == 0)
        assert client.post(GENERATE, json=FOX).status_code == 200


def test_a_body_that_does_not_arrive(start):
    service = start(FakeEngine(), upload_seconds=0.3)
    address = tuple(httpx.URL(service.url).netloc.decode().split(":"))
    with socket.create_connection(address) as raw:
        raw.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert raw.recv(100).startswith(b"HTTP/1.1 408")
    assert service.service._uploads == 0
    assert service.metric('deepgen_failures_total{code="upload_timeout"}') == 1


def test_keys(start, tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("# team one\nsecret-1\n\nsecret-2\n")
    service = start(FakeEngine(), api_keys=path)
    with service.client() as client:
        for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "secret-1"}):
            refused(client.post(GENERATE, json=FOX, headers=headers), 401, code="invalid_api_key")
        assert client.post(GENERATE, json=FOX, headers={"authorization": "Bearer secret-2"}).status_code == 200
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200


@pytest.mark.parametrize("content", [None, b"", b"# nothing\n", b"\xff\xfe"])
def test_key_files_that_cannot_be_used(tmp_path, content):
    path = tmp_path / "keys.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DeepGenError, match="write one"):
        Keys.read(path)


def test_not_ready_while_the_model_loads():
    gate = threading.Event()

    def load():
        gate.wait()
        return FakeEngine()

    app = create_app(load, ServeConfig(warm=True))
    with BackgroundServer(app) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        response = client.post(GENERATE, json=FOX)
        refused(response, 503, "loading", "not_ready")
        assert response.headers["retry-after"]
        gate.set()
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert [len(batch) for batch in app.state.service._engine.batches] == [1, 1, 1, 1], "warm runs each batch size"


def test_a_model_that_cannot_be_loaded_is_told():
    failures = []

    def load():
        raise DeepGenError("no such model")

    app = create_app(load, on_failure=failures.append)
    with BackgroundServer(app) as server, httpx.Client(base_url=server.url) as client:
        wait_until(lambda: bool(failures))
        refused(client.post(GENERATE, json=FOX), 503, "cannot be loaded")


def test_metrics_and_log(start):
    engine = FakeEngine()
    service = start(engine)
    with service.client() as client:
        client.post(GENERATE, json={**FOX, "n": 3}, headers={"x-request-id": "mine-1"})
        client.post(EDIT, data={"prompt": "secret words"}, files={"image": ("a.png", png(noise(64, 64)))})
        client.post(GENERATE, json={**FOX, "size": "1x1"})
    assert service.metric('deepgen_images_total{kind="generation"}') == 3
    assert service.metric('deepgen_images_total{kind="edit"}') == 1
    assert service.metric('deepgen_batch_size_count{kind="generation"}') >= 1
    assert service.metric('deepgen_batch_size_sum{kind="generation"}') == 3
    assert service.metric('deepgen_requests_total{route="/v1/images/generations",status="400"}') == 1
    assert service.metric('deepgen_failures_total{code="invalid_value"}') == 1
    for phase in ("queue", "read", "encode", "denoise"):
        assert service.metric(f'deepgen_phase_seconds_count{{phase="{phase}"}}') >= 1
    wait_until(lambda: len([line for line in service.log if line["method"] == "POST"]) == 3)
    first, _, bad = [line for line in service.log if line["method"] == "POST"]
    assert (first["id"], first["status"], first["images"]) == ("mine-1", 200, 3)
    assert first["bytes"] > 100
    assert bad["status"] == 400
    assert "secret words" not in json.dumps(service.log)


def test_the_stop_finishes_what_was_accepted():
    engine = FakeEngine(open_gate=False)
    app = create_app(lambda: engine, ServeConfig(max_batch=1, batch_window=0.0))
    answers = []
    server = BackgroundServer(app)
    with server:
        wait_until(lambda: app.state.service.state == "ready")

        def ask():
            answers.append(httpx.post(server.url + GENERATE, json=FOX, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: app.state.service._batcher.depth == 3)
        threading.Timer(0.3, engine.gate.set).start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")
