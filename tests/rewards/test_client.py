"""The HTTP client: retries, limits, time-outs, the cache, counts."""

from __future__ import annotations

import asyncio
import time

import pytest
from support.judge_server import JudgeServer, Reply

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.client import Client, ClientConfig, RequestFailed, _retry_after
from deepgen_jax.user_warnings import DeepGenWarning

FAST = {"backoff_seconds": 0.01, "max_backoff_seconds": 0.02, "read_seconds": 0.3, "concurrency": 4}


def ask(client, server, *payloads, parse=lambda answer: answer["choices"][0]["message"]["content"]):
    async def run():
        try:
            posts = (client.post(server.url, payload, parse) for payload in payloads)
            return await asyncio.gather(*posts, return_exceptions=True)
        finally:
            await client.close()

    return asyncio.run(run())


def replies(*given):
    """One after another, then the default."""
    return lambda number, body: given[number] if number < len(given) else Reply("fine")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Reply(status=500), "HTTP 500"),
        (Reply(status=503), "HTTP 503"),
        (Reply(status=429), "HTTP 429"),
        (Reply("no JSON", raw=True), "unreadable answer"),
        (Reply('{"choices": []}', raw=True), "unreadable answer"),
        (Reply(hang=True), "timeout"),
    ],
)
def test_fault_is_retried_and_counted(fault, reason):
    with JudgeServer(replies(fault, fault)) as server:
        client = Client({**FAST, "tries": 3})
        assert ask(client, server, {"a": 1}) == ["fine"]
    assert client.counts == {"requests": 1, "tries": 3, "retries": 2, f"try failed: {reason}": 2}


def test_tries_are_bounded():
    with JudgeServer(lambda number, body: Reply(status=502)) as server:
        client = Client({**FAST, "tries": 3})
        [error] = ask(client, server, {})
    assert isinstance(error, RequestFailed)
    assert str(error) == "HTTP 502"
    assert client.counts["tries"] == len(server.requests) == 3
    assert client.counts["failed"] == 1


@pytest.mark.parametrize("status", [400, 401, 404])
def test_refusal_is_final(status):
    with JudgeServer(lambda number, body: Reply(status=status)) as server:
        client = Client(FAST)
        [error] = ask(client, server, {})
    assert str(error) == f"HTTP {status}"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply('"' + "x" * 100_000 + '"', raw=True), "answer too large"),
        (Reply("x" * 100_000), "answer too large"),
        (Reply("{}", raw=True, headers=(("Content-Encoding", "gzip"),)), "compressed answer"),
    ],
)
def test_answers_are_read_up_to_a_limit(reply, reason):
    with JudgeServer(lambda number, body: reply) as server:
        client = Client({**FAST, "max_answer_mb": 0.1})
        [error] = ask(client, server, {})
    assert str(error) == reason
    assert client.counts["tries"] == 1
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


def test_server_that_is_down():
    server = JudgeServer(replies())
    server.stop()
    client = Client({**FAST, "tries": 2})
    [error] = ask(client, server, {})
    assert str(error) == "connection error"
    assert client.counts["retries"] == 1


def test_retry_after_is_honoured():
    with JudgeServer(replies(Reply(status=429, headers=(("Retry-After", "1"),)))) as server:
        start = time.monotonic()
        assert ask(Client(FAST), server, {}) == ["fine"]
    assert 1.0 <= time.monotonic() - start < 3


def test_retry_after_forms():
    assert _retry_after("3") == 3
    assert _retry_after(None) is None
    assert _retry_after("soon") is None
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_total_time_bounds_waits_for_the_server():
    with JudgeServer(lambda n, body: Reply(status=503, headers=(("Retry-After", "60"),))) as server:
        start = time.monotonic()
        [error] = ask(Client({**FAST, "total_seconds": 0.3}), server, {})
    assert str(error) == "no answer in time"
    assert time.monotonic() - start < 3


def test_concurrency_is_limited():
    def slow(number, body):
        time.sleep(0.01)
        return Reply("fine")

    with JudgeServer(slow) as server:
        assert ask(Client({**FAST, "concurrency": 3}), server, *({"n": n} for n in range(20))) == ["fine"] * 20
        connections = {headers["X-Port"] for _, headers, _ in server.requests}
    assert 2 <= len(connections) <= 3


def test_same_question_is_asked_once(tmp_path):
    options = {**FAST, "cache": str(tmp_path / "deep" / "answers.jsonl")}
    with JudgeServer(lambda number, body: Reply(f"answer {number}")) as server:
        client = Client(options)
        assert ask(client, server, {"q": 1}) == ["answer 0"]
        assert ask(client, server, {"q": 1}, {"q": 2}) == ["answer 0", "answer 1"]
        assert client.counts["cached"] == 1
        # A run that is resumed gets the same answers, also from a server elsewhere.
        with JudgeServer(replies(Reply(status=500))) as other:
            assert ask(Client(options), other, {"q": 1}) == ["answer 0"]
            assert not other.requests


def test_failure_is_not_cached():
    with JudgeServer(replies(Reply(status=500))) as server:
        client = Client({**FAST, "tries": 1})
        assert isinstance(ask(client, server, {})[0], RequestFailed)
        assert ask(client, server, {}) == ["fine"]


def test_cut_off_line_of_the_cache_is_dropped(tmp_path):
    path = tmp_path / "answers.jsonl"
    with JudgeServer(lambda number, body: Reply(f"answer {number}")) as server:
        ask(Client({**FAST, "cache": str(path)}), server, {"q": 1}, {"q": 2})
        path.write_text(path.read_text()[:-7])
        with pytest.warns(DeepGenWarning, match="1 unreadable"):
            client = Client({**FAST, "cache": str(path)})
        ask(client, server, {"q": 1}, {"q": 2}, {"q": 3})
        assert client.counts["cached"] == 1
        with pytest.warns(DeepGenWarning, match="1 unreadable"):
            again = Client({**FAST, "cache": str(path)})
        ask(again, server, {"q": 1}, {"q": 2}, {"q": 3})
        assert again.counts["cached"] == 3


def test_cache_keeps_the_answers_used_last():
    with JudgeServer(lambda number, body: Reply(f"answer {number}")) as server:
        client = Client({**FAST, "cache_entries": 1})
        assert ask(client, server, {"q": 1}) == ["answer 0"]
        assert ask(client, server, {"q": 2}) == ["answer 1"]
        assert ask(client, server, {"q": 1}) == ["answer 2"]


def test_token_comes_from_the_environment(monkeypatch):
    with pytest.raises(DeepGenError, match="JUDGE_KEY is not set"):
        Client({"api_key_variable": "JUDGE_KEY"})
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with JudgeServer(replies()) as server:
        ask(Client({**FAST, "api_key_variable": "JUDGE_KEY"}), server, {})
    assert server.requests[0][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurency": 1}, "did you mean concurrency"),
        ({"tries": 0}, "at least 1"),
        ({"read_seconds": 0}, "above 0"),
        ({"max_answer_mb": 0}, "above 0"),
        ({"backoff_seconds": -1}, "negative"),
        ({"tries": "many"}, "wrong type"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(DeepGenError, match=message):
        Client(options)


def test_settings_as_a_dataclass():
    assert Client(ClientConfig(tries=2)).config.tries == 2
