"""The reward server and its client, over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards import Missing, Reward, RewardConfig, RewardSample, Scores, make
from deepgen_jax.rewards.image_codec import decode_png_base64, png_base64
from deepgen_jax.rewards.protocol import parse_request, read_answer, read_request, write_answer, write_request
from deepgen_jax.rewards.server import RewardServer
from deepgen_jax.rewards.server_limits import Budget, Busy, ServerLimits

LIMITS = ServerLimits(body_bytes=100_000, pixels=1000, samples=6, connections=4, request_seconds=2, score_seconds=2)
FIELDS = st.sampled_from(["reward", "samples", "image", "prompt", "group", "metadata", "scores", "failures", "reason"])
IMAGE = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)


class Echo(Reward):
    """Scores by metadata; the group's size if there is none."""

    needs_group = True

    async def score(self, samples):
        groups = [sample.group for sample in samples]
        scores = [sample.metadata.get("score", groups.count(sample.group)) for sample in samples]
        return Scores.of([Missing("bad luck", s == "never") if isinstance(s, str) else s for s in scores])


class Broken(Reward):
    async def score(self, samples):
        raise RuntimeError("the model is gone")


class Slow(Reward):
    async def score(self, samples):
        await asyncio.sleep(30)


@pytest.fixture(scope="module")
def server():
    rewards = {"jpeg": make(RewardConfig("jpeg")), "echo": Echo(), "broken": Broken(), "slow": Slow()}
    with RewardServer(rewards, limits=LIMITS) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        yield server
        server.stop()
        thread.join()


@pytest.fixture(scope="module")
def url(server):
    return "http://{}:{}".format(*server.address)


def score(samples, url, **options):
    reward = make(RewardConfig("http", options={"url": url, "client": {"tries": 1}, **options}))

    async def run():
        try:
            return await reward.score(samples), await reward.score(samples), reward.counts()
        finally:
            await reward.close()

    return asyncio.run(run())


def test_remote_rewards_equal_local_ones(url):
    samples = [RewardSample(np.roll(IMAGE, k, 0), f"prompt {k}", k) for k in range(5)]
    remote, again, counts = score(samples, url, reward="jpeg", batch_size=2)
    local = asyncio.run(make(RewardConfig("jpeg")).score(samples))
    np.testing.assert_array_equal(remote.values, local.values)
    np.testing.assert_array_equal(again.values, local.values)
    assert counts == {"requests": 6, "tries": 3, "retries": 0, "cached": 3}


def test_groups_and_reasons_travel(url):
    metadata = [{}, {"score": "later"}, {"score": 0.5}, {"score": "never"}, {}]
    samples = [RewardSample(IMAGE, "é", group, fields) for group, fields in zip([1, 1, 2, 2, 1], metadata, strict=True)]
    scores, _, counts = score(samples, url, reward="echo", batch_size=2, needs_group=True)
    np.testing.assert_array_equal(scores.values, np.array([3, np.nan, 0.5, np.nan, 3], np.float32))
    assert scores.missing == {1: Missing("bad luck"), 3: Missing("bad luck", permanent=True)}
    # A score that may still come is asked for again, the others are not.
    assert (counts["tries"], counts["cached"]) == (3, 1)


def test_server_that_fails_gives_missing_scores(url):
    scores, _, _ = score([RewardSample(IMAGE, "a")], url, reward="broken")
    assert scores.failures == {"HTTP 500": 1}
    scores, _, _ = score([RewardSample(IMAGE, "a")], url, reward="unknown")
    assert scores.failures == {"HTTP 404": 1}


def test_health(url):
    answer = httpx.get(f"{url}/health").json()
    assert answer["status"] == "ok"
    assert answer["rewards"]["echo"] == {"needs_group": True}


def png(width, height):
    """The head of a PNG file of any size, which is all that is looked at before the limits."""
    head = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", width, height) + bytes([8, 2, 0, 0, 0])
    return base64.b64encode(head + struct.pack(">I", zlib.crc32(head[12:]))).decode()


def sample(**changes):
    return {"image": png_base64(IMAGE), "prompt": "a", **changes}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("GET", "/", None, 404, "unknown path"),
        ("GET", "/score", None, 405, "POST /score"),
        ("POST", "/health", b"{}", 405, "GET /health"),
        ("PUT", "/score", b"{}", 501, "PUT"),
        ("POST", "/score", b"{", 400, "no JSON"),
        ("POST", "/score", b"\xff", 400, "no JSON"),
        ("POST", "/score", b"[" * 50000, 400, "no JSON"),
        ("POST", "/score", b"[]", 400, "no JSON object"),
        ("POST", "/score", b"x" * 100_001, 413, "at most 100000"),
        ("POST", "/score", {"reward": "jpg", "samples": [sample()]}, 404, "did you mean jpeg"),
        ("POST", "/score", {"reward": 1, "samples": [sample()]}, 400, "'reward' must be"),
        ("POST", "/score", {"reward": "jpeg", "samples": []}, 400, "at least one"),
        ("POST", "/score", {"reward": "jpeg", "samples": [sample()], "x": 1}, 400, "unknown field 'x'"),
        ("POST", "/score", {"reward": "jpeg", "samples": ["a"]}, 400, r"samples\[0\] is no JSON object"),
        ("POST", "/score", {"reward": "jpeg", "samples": [sample(), sample(prompt=1)]}, 400, r"\[1\].prompt must"),
        ("POST", "/score", {"reward": "jpeg", "samples": [sample(group=True)]}, 400, "group must be int"),
        ("POST", "/score", {"reward": "jpeg", "samples": [sample(metadata=[])]}, 400, "metadata must be dict"),
        ("POST", "/score", {"reward": "jpeg", "samples": [sample(image="*")]}, 400, "not base64"),
        ("POST", "/score", {"reward": "jpeg", "samples": [sample(image="aGVsbG8=")]}, 400, "not a PNG"),
        ("POST", "/score", {"reward": "jpeg", "samples": [sample(image=png(40, 40))]}, 413, "send at most 1000"),
        ("POST", "/score", {"reward": "jpeg", "samples": [sample()] * 7}, 413, "7 samples; send at most 6"),
        ("POST", "/score", {"reward": "jpeg", "samples": [sample(image=png(2**20, 2**20))]}, 400, "1048576x1048576"),
        ("POST", "/score", {"reward": "jpeg", "samples": [sample(image=png(0, 5))]}, 400, "0x5 pixels"),
        ("POST", "/score", {"reward": "jpeg", "samples": [sample(image=png(9, 9))]}, 400, "can be read"),
        ("POST", "/score", {"reward": "slow", "samples": [sample()]}, 504, "more than 2 s"),
        ("POST", "/score", {"reward": "broken", "samples": [sample()]}, 500, "the model is gone"),
    ],
)
def test_errors_are_json(url, method, path, body, status, message):
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    answer = httpx.request(method, url + path, content=content)
    assert answer.status_code == status
    assert re.search(message, answer.json()["error"])


def test_memory_is_bounded_whatever_the_images_hold(tmp_path):
    """A request of 3 MB whose images would take 2.3 GB is refused before any of them is decoded."""
    side = 5700
    with RewardServer({"jpeg": make(RewardConfig("jpeg"))}) as server:
        threading.Thread(target=server.serve, daemon=True).start()
        body = {"reward": "jpeg", "samples": [sample(image=png(side, side))] * 24}
        answer = httpx.post("http://{}:{}/score".format(*server.address), json=body)
        server.stop()
    assert (answer.status_code, f"{24 * side * side} pixels" in answer.json()["error"]) == (413, True)


def test_many_values_are_refused_before_they_are_parsed():
    with RewardServer({"jpeg": make(RewardConfig("jpeg"))}) as server:
        threading.Thread(target=server.serve, daemon=True).start()
        answer = httpx.post("http://{}:{}/score".format(*server.address), content=b"[" + b"{}," * 10**6)
        server.stop()
    assert (answer.status_code, "values" in answer.json()["error"]) == (413, True)


def test_connections_are_bounded():
    limits = ServerLimits(connections=4)
    with RewardServer({"jpeg": make(RewardConfig("jpeg"))}, limits=limits) as server:
        threading.Thread(target=server.serve, daemon=True).start()
        url = "http://{}:{}".format(*server.address)
        idle = [socket.create_connection(server.address) for _ in range(limits.connections)]
        try:
            wait_for(lambda: status_of(url) == 503)
            before = threading.active_count()
            assert {status_of(url) for _ in range(10)} == {503}
            assert threading.active_count() <= before
        finally:
            for connection in idle:
                connection.close()
        wait_for(lambda: status_of(url) == 200)
        server.stop()


def test_slow_requests_are_ended(server, url):
    with socket.create_connection(server.address) as connection:
        start = time.monotonic()
        connection.settimeout(10)
        connection.sendall(b"POST /score HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
        while data := connection.recv(4096):
            assert b"200 OK" not in data
        assert time.monotonic() - start < 9.5
    wait_for(lambda: status_of(url) == 200)


def status_of(url):
    try:
        return httpx.get(f"{url}/health").status_code
    except httpx.TransportError:
        # The refusal may be lost where the connection is reset.
        return 503


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_waiting_for_memory_ends_with_busy():
    budget = Budget(10)
    with budget.take(6, 0.1), pytest.raises(Busy), budget.take(5, 0.1):
        pass
    with budget.take(10, 0.1):
        pass


def test_body_needs_its_length(url):
    answer = httpx.post(f"{url}/score", content=(part for part in [b"{", b"}"]))
    assert (answer.status_code, "Content-Length" in answer.json()["error"]) == (411, True)


def test_address_in_use_is_an_error(server):
    with pytest.raises(DeepGenError, match="cannot listen"):
        RewardServer({}, *server.address)


def test_protocol_round_trip():
    samples = [RewardSample(IMAGE, 'a "b"\n', 3, {"k": [1, None]}), RewardSample(IMAGE[:1], "")]
    name, got = read_request(json.loads(json.dumps(write_request("r", samples))))
    assert name == "r"
    for one, other in zip(samples, got, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        assert (one.prompt, one.group, one.metadata) == (other.prompt, other.group, other.metadata)
    results = [0.5, Missing("a", True), -2.0]
    assert read_answer(json.loads(json.dumps(write_answer(Scores.of(results)))), 3) == results


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        {"scores": [1]},
        {"scores": [1, "2"]},
        {"scores": [1, True]},
        {"scores": [1, float("inf")]},
        {"scores": [1, 10**400]},
    ],
)
def test_answer_of_another_form_is_unreadable(answer):
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_answer(answer, 2)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(png_base64(IMAGE)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(json_values)
def test_any_request_is_read_or_refused(value):
    for request in (value, {"reward": "jpeg", "samples": value}, {"reward": "jpeg", "samples": [value]}):
        with contextlib.suppress(DeepGenError):
            assert parse_request(request, 1000, 6).pixels <= 1000


@given(json_values)
def test_any_answer_is_read_or_unreadable(value):
    for answer in (value, {"scores": value}, {"scores": [value]}, {"scores": [None], "failures": {"0": value}}):
        with contextlib.suppress(ValueError):
            assert len(read_answer(answer, 1)) == 1


def test_reasons_may_be_left_out():
    assert read_answer({"scores": [None, 1]}, 2) == [Missing("the server gave no reason"), 1.0]


def test_only_whole_png_files_are_images():
    text = png_base64(IMAGE)
    np.testing.assert_array_equal(decode_png_base64(text), IMAGE)
    with pytest.raises(DeepGenError, match="not a PNG"):
        decode_png_base64(text[: len(text) // 8 * 4])


def test_command_serves_until_sigterm(tmp_path):
    options = tmp_path / "options.json"
    options.write_text(json.dumps({"small": {"kind": "jpeg", "quality": 50}}))
    command = [sys.executable, "-m", "deepgen_jax.cli.main", "reward-server", "--rewards", "small,color_target"]
    process = subprocess.Popen(
        [*command, "--options", str(options), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        said = process.stdout.readline()
        url = re.search(r"serving small, color_target on (http://\S+)", said)[1]
        with httpx.Client() as client:
            answer = client.post(f"{url}/score", json={"reward": "small", "samples": [sample()]})
            assert answer.json()["scores"][0] < 0
            # An open connection does not hold up the end.
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        assert process.stdout.read() == "stopping after the answers in progress\n"
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rewards", "jpg"], "did you mean jpeg"),
        (["--rewards", ","], "name at least one"),
        (["--rewards", "jpeg", "--options", '{"ocr": {}}'], "not served"),
        (["--rewards", "jpeg", "--options", "{"], "no JSON"),
        (["--rewards", "jpeg", "--options", "nowhere.json"], "No such file"),
        (["--rewards", "jpeg", "--options", '{"jpeg": 1}'], "object of objects"),
        (["--rewards", "jpeg", "--port", "70000"], "cannot listen"),
        (["--rewards", "jpeg", "--max-connections", "0"], "connections is 0; it must be above 0"),
        (["--rewards", "jpeg", "--options", "[" * 100_000], "JSON"),
    ],
)
def test_command_refuses_bad_words(capsys, words, message):
    from deepgen_jax.cli.main import main

    assert main(["reward-server", *words]) == 2
    assert re.search(message, capsys.readouterr().err)
