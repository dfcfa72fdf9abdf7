"""Rewards by a judge: what is sent, and what the replies mean."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from support.judge_server import JudgeServer, Reply

from deepgen_jax.rewards import Missing, RewardConfig, RewardSample, make
from deepgen_jax.rewards.replies import single_answer
from deepgen_jax.user_warnings import DeepGenWarning

FAST = {"tries": 2, "backoff_seconds": 0.01, "read_seconds": 2.0}


def shade(level, prompt="a grey wall", group=0):
    return RewardSample(np.full((16, 16, 3), level, np.uint8), prompt, group)


def levels(body):
    """Mean brightness of the images of a request."""
    content = body["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))).mean() for url in urls]


def question(body):
    return [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"]


def brighter(number, body):
    first, second = levels(body)
    return Reply(f"<think>hm</think><answer>Image {1 if first > second else 2} is better</answer>")


def score(name, samples, url, **options):
    reward = make(RewardConfig(name, options={"url": url, "client": FAST} | options))

    async def run():
        try:
            return await reward.score(samples), reward.counts()
        finally:
            await reward.close()

    return asyncio.run(run())


def test_preference_compares_all_pairs_of_each_group():
    samples = [shade(level, f"wall {group}", group) for level, group in [(10, 0), (9, 1), (200, 0), (90, 0), (99, 1)]]
    with JudgeServer(brighter) as server:
        scores, counts = score("preference", samples, server.url, model="judge")
    np.testing.assert_allclose(scores.values, [0, 0, 1, 0.5, 1])
    assert counts["requests"] == len(server.requests) == 4
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Content-Type"] == "application/json"
    assert (body["model"], body["temperature"]) == ("judge", 0)
    texts = {question(body)[0] for _, _, body in server.requests}
    ask = "Compare these two images based on the prompt: {}\nWhich image is better?"
    assert texts == {ask.format("wall 0"), ask.format("wall 1")}


def test_both_orders_cancel_a_judge_that_favours_a_place():
    samples = [shade(10), shade(200), shade(90)]
    with JudgeServer(lambda number, body: Reply()) as server:
        once, _ = score("preference", samples, server.url)
        both, counts = score("preference", samples, server.url, both_orders=True)
    np.testing.assert_allclose(once.values, [1, 0.5, 0])
    np.testing.assert_allclose(both.values, [0.5, 0.5, 0.5])
    assert counts["requests"] == 6


def test_failed_comparisons_are_left_out_and_an_image_without_any_is_missing():
    def judge(number, body):
        return Reply(status=404) if min(levels(body)) < 20 else brighter(number, body)

    with JudgeServer(judge) as server:
        scores, _ = score("preference", [shade(10), shade(200), shade(90)], server.url)
    np.testing.assert_allclose(scores.values, [np.nan, 1, 0])
    assert scores.failures == {"HTTP 404": 1}
    assert scores.notes == {"HTTP 404": 2}


def test_reply_without_answer_counts_half_but_does_not_make_a_score():
    def judge(number, body):
        if min(levels(body)) < 20:
            return Reply("Both look nice")
        return Reply("image 1 image 2") if min(levels(body)) < 60 else brighter(number, body)

    with JudgeServer(judge) as server:
        scores, _ = score("preference", [shade(10), shade(50), shade(200), shade(90)], server.url)
    np.testing.assert_allclose(scores.values, [np.nan, np.nan, 0.667, 0.333])
    assert scores.failures == {"no verdict in the reply": 2}
    assert scores.notes == {"no verdict in the reply": 5}


@pytest.mark.parametrize("wording", ["**Image {}** is better", "{}", "Image {} wins", "图{}更好", "<answer>Image {}"])
def test_wording_of_the_judge_does_not_matter(wording):
    def judge(number, body):
        first, second = levels(body)
        return Reply(wording.format(1 if first > second else 2))

    with JudgeServer(judge) as server:
        scores, _ = score("preference", [shade(10), shade(200), shade(90)], server.url)
    np.testing.assert_allclose(scores.values, [0, 1, 0.5])
    assert not scores.notes


def test_reasons_of_unreadable_replies_are_counted_and_a_group_of_them_is_missing():
    replies = ["", "<think>hm", "Image 1 is better. Image 2 is better.", "hm"]
    with (
        JudgeServer(lambda number, body: Reply(replies[number % 4])) as server,
        pytest.warns(DeepGenWarning, match="UnifiedReward-Think: .*, first in '") as warned,
    ):
        scores, _ = score("preference", [shade(level) for level in (10, 50, 90, 130, 170)], server.url)
    assert len(warned) == 1
    assert np.isnan(scores.values).all()
    assert scores.notes.total() == 10
    assert set(scores.notes) == {
        "empty reply",
        "reply cut off while thinking",
        "contradictory verdicts in the reply",
        "no verdict in the reply",
    }


def test_unreadable_reply_that_is_cut_off_has_its_own_reason():
    def judge(number, body):
        choice = {"message": {"content": ["Let me think", "Image 1"][number]}, "finish_reason": "length"}
        return Reply(json.dumps({"choices": [choice]}), raw=True)

    with JudgeServer(judge) as server:
        options = {"both_orders": True, "client": {**FAST, "concurrency": 1}}
        scores, _ = score("preference", [shade(10), shade(200)], server.url, **options)
    assert scores.notes == {"reply cut off at max_tokens": 1}
    assert np.isfinite(scores.values).all()


def test_reply_in_parts():
    parts = [{"type": "reasoning", "data": 1}, {"type": "text", "text": "Image"}, {"type": "text", "text": " 2"}]
    body = json.dumps({"choices": [{"message": {"content": parts}}]})
    with JudgeServer(lambda number, _: Reply(body, raw=True)) as server:
        scores, _ = score("preference", [shade(10), shade(200)], server.url)
    np.testing.assert_allclose(scores.values, [0, 1])


def test_tie_is_an_answer():
    with JudgeServer(lambda number, body: Reply("<answer>Both images are equal</answer>")) as server:
        scores, _ = score("preference", [shade(10), shade(200)], server.url)
    np.testing.assert_allclose(scores.values, [0.5, 0.5])
    assert not scores.notes


def test_group_of_one_has_no_preference():
    with JudgeServer(brighter) as server:
        scores, _ = score("preference", [shade(10)], server.url)
    assert np.isnan(scores.values).all()
    assert scores.missing[0].permanent


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("7.5", 0.75),
        (" 10\n", 1),
        ("<think>3 or 4?</think> <answer> 0 </answer>", 0),
        ("<answer>11</answer>", "number out of range"),
        ("-1", "number out of range"),
        ("<answer>8/10</answer>", 0.8),
        ("<answer>4/5</answer>", "number on another scale"),
        ("about 8", "no number in the reply"),
        ("<answer>8</answer><answer>2</answer>", "no number in the reply"),
        ("<answer>nan</answer>", "no number in the reply"),
        ("<answer>8", "no number in the reply"),
        ("1e1", "no number in the reply"),
        ("", "no number in the reply"),
    ],
)
def test_judge_score_reads_numbers_that_are_scores(reply, value):
    reward = make(RewardConfig("judge_score", options={"url": "http://127.0.0.1:9", "model": "m"}))
    got = reward.parse(reply, shade(0))
    assert got == (Missing(value) if isinstance(value, str) else pytest.approx(value))


def test_judge_score_asks_with_its_template():
    with JudgeServer(lambda number, body: Reply(str(levels(body)[0] / 100))) as server:
        samples = [shade(100, "a {low} wall"), shade(200)]
        options = {"model": "m", "low": 1, "high": 3, "template": "{prompt}: {low} to {high}?"}
        scores, _ = score("judge_score", samples, server.url + "/v1", **options)
    np.testing.assert_allclose(scores.values, [0, 0.5], atol=1e-6)
    assert {question(body)[0] for _, _, body in server.requests} == {"a {low} wall: 1 to 3?", "a grey wall: 1 to 3?"}


def test_ocr_judge_reads_without_knowing_the_text():
    replies = {10: "<answer>OPEN late</answer>", 90: "<answer></answer>", 200: "It says Open Late"}

    def judge(number, body):
        assert "Open" not in question(body)[0]
        return Reply(replies[min(replies, key=lambda level: abs(level - levels(body)[0]))])

    samples = [shade(level, 'sign "Open Late"') for level in replies] + [shade(10)]
    with JudgeServer(judge) as server:
        scores, counts = score("ocr_judge", samples, server.url, model="m")
    np.testing.assert_array_equal(scores.values, np.array([1, 0, np.nan, np.nan], np.float32))
    assert scores.failures == {"no <answer> in the reply": 1, "the prompt quotes no text": 1}
    assert counts["requests"] == 3


def test_failed_request_is_missing():
    with JudgeServer(lambda number, body: Reply(status=500)) as server:
        scores, counts = score("judge_score", [shade(10), shade(20)], server.url, model="m")
    assert np.isnan(scores.values).all()
    assert scores.failures == {"HTTP 500": 2}
    assert counts["try failed: HTTP 500"] == 4


def test_single_answer():
    assert single_answer("<ANSWER>\n a \n</answer>") == "a"
    assert single_answer("<answer></answer>") == ""
    assert single_answer("a") is None
    assert single_answer(None) is None


@pytest.mark.parametrize(("kind", "fine"), [("preference", "<answer>Image 2 is better</answer>"), ("judge_score", "7")])
def test_reply_without_answer_is_not_cached(kind, fine, tmp_path):
    replies = ["who knows", fine]
    options = {"model": "m", "client": {**FAST, "cache": str(tmp_path / "answers.jsonl")}}
    samples = [shade(10), shade(200)][: 2 if kind == "preference" else 1]
    with JudgeServer(lambda number, body: Reply(replies[number])) as server:
        first, again, cached = (score(kind, samples, server.url, **options) for _ in range(3))
    assert np.isnan(first[0].values).all()
    assert np.isfinite(again[0].values).all()
    np.testing.assert_array_equal(cached[0].values, again[0].values)
    assert [counts["cached"] for _, counts in (first, again, cached)] == [0, 0, 1]


def test_only_answers_are_kept(tmp_path):
    path = tmp_path / "answers.jsonl"
    replies = ["<think>" + "hm " * 1000 + "</think><answer>Image 2 is better</answer>", "hm " * 1000]
    with JudgeServer(lambda number, body: Reply(replies[number])) as server:
        scores, _ = score("preference", [shade(10), shade(200)], server.url, client={**FAST, "cache": str(path)})
        again, counts = score("preference", [shade(10), shade(200)], server.url, client={**FAST, "cache": str(path)})
        score("preference", [shade(10), shade(90)], server.url, client={**FAST, "cache": str(path)})
    np.testing.assert_array_equal(scores.values, [0, 1])
    np.testing.assert_array_equal(again.values, scores.values)
    assert counts["cached"] == 1
    assert path.stat().st_size < 600
