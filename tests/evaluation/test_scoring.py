"""Judge benchmarks: questions, strict parsing, aggregation by hand, judges with faults; results of official code."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support import benchmark_data as data
from support.benchmark_data import make, tree
from support.judge_server import JudgeServer, Reply

from deepgen_jax.cli.main import main
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation import scoring
from deepgen_jax.evaluation.benchmark import Item, Question
from deepgen_jax.evaluation.benchmark_kinds import open_benchmark
from deepgen_jax.evaluation.benchmarks.rise import rise_score
from deepgen_jax.evaluation.benchmarks.unigenbench import dimension
from deepgen_jax.evaluation.figures import Table
from deepgen_jax.evaluation.judging import instruction, read_answer
from deepgen_jax.evaluation.run import RECORDS, RunFolder
from deepgen_jax.rewards.base import Missing, RewardSample
from deepgen_jax.rewards.base import Scores as RewardScores
from deepgen_jax.rewards.client import ClientConfig
from deepgen_jax.rewards.judge import Judge

JUDGED = ["unigenbench", "wise", "wise_verified", "corebench", "imgedit", "gedit", "rise", "uniredit"]


def figures(name: str, answers: list[tuple[Item, Mapping[str, list[int]]]]) -> dict[str, float]:
    """Figures of a benchmark from answers, one image an item."""
    benchmark, table = open_benchmark(name), Table()
    for item, given in answers:
        if (score := benchmark.score(item, 0, given)) is not None:
            table.add(item.key, score.cells)
    return {figure.name: figure.value for figure in table.figures(benchmark.measures(table.groups), resamples=10)}


def item(key: str, category: str, **facts: Any) -> Item:
    return Item(key, "p", (f"{key}.png",), "f", 1, category, facts=facts)


def test_wise_by_hand():
    found = figures("wise", [
        (item("1", "cultural"), {"grades": [2, 1, 1]}),  # (1.4 + 0.2 + 0.1) / 2 = 0.85
        (item("2", "cultural"), {"grades": [0, 2, 2]}),  # (0 + 0.4 + 0.2) / 2 = 0.3
        (item("3", "time"), {"grades": [1, 1, 1]}),  # 0.5
        (item("4", "chemistry"), {"grades": [2, 2, 2]}),  # 1
        (item("5", "chemistry"), {}),
    ])  # fmt: skip
    assert found["cultural"] == pytest.approx(0.575)
    assert found["overall"] == pytest.approx((0.4 * 0.575 + 0.167 * 0.5 + 0.1 * 1) / 0.667)


def test_wise_verified_by_hand():
    categories = ("cultural", "time", "space", "biology", "physics", "chemistry")
    found = figures("wise_verified", [(item(c, c), {"right": [int(c in ("cultural", "space"))]}) for c in categories])
    assert found["overall"] == pytest.approx(0.52)


def test_corebench_by_hand():
    found = figures("corebench", [
        (item("R-LR-001", "R-LR"), {"point 1": [1], "point 2": [0]}),  # 0.5
        (item("R-LR-002", "R-LR"), {"point 2": [1]}),  # point 1 without an answer: 1 of 1
        (item("R-BR-001", "R-BR"), {"point 1": [0]}),
        (item("C-MI-001", "C-MI"), {"point 1": [1], "point 2": [1], "point 3": [0], "point 4": [1]}),
        (item("C-MA-001", "C-MA"), {}),
    ])  # fmt: skip
    assert found["R-LR"] == pytest.approx(75)
    assert found["reasoning"] == pytest.approx(37.5)
    assert found["composition"] == found["C-MI"] == pytest.approx(75)


def test_unigenbench_by_hand():
    one = [("Attribute - Color", "red"), ("Attribute - Size", "big"), ("Style", "ink")]
    two = [("Attribute - Color", "blue")]
    found = figures("unigenbench", [
        (item("a", "en", split="en", points=one), {"points": [1, 0, 1]}),
        (item("b", "en", split="en", points=two), {"points": [0]}),
        (item("c", "zh", split="zh", points=[("属性-数量", "两")]), {"points": [1]}),
    ])  # fmt: skip
    assert found["en"] == pytest.approx(50)  # 2 of 4 points, not the mean of images
    assert found["en: Attribute"] == pytest.approx(100 / 3)
    assert found["en, Attribute - Color"] == pytest.approx(50)
    assert found["en: Style"] == found["zh"] == found["zh: 属性"] == pytest.approx(100)


def test_dimensions_of_test_points():
    points = {
        "Action - Full-body (Character/Anthropomorphic)": "Action", "World Knowledge": "World Knowledge",
        "Entity Layout - Two-Dimensional Space": "Entity Layout", "动作-人物/拟人手部动作": "动作", "风格": "风格",
        "Text Generation (Case-insensitive)": "Text Generation (Case-insensitive)",
    }  # fmt: skip
    assert {point: dimension(point) for point in points} == points


def test_imgedit_by_hand():
    found = figures("imgedit", [
        (item("1", "add"), {"grades": [5, 4, 3]}), (item("2", "add"), {"grades": [2, 2, 2]}),
        (item("3", "style"), {"grades": [5, 5, 5]}), (item("4", "style"), {}),
    ])  # fmt: skip
    assert found["add"] == pytest.approx(3)
    assert found["overall"] == pytest.approx(4)  # the mean over types, not over images


def test_gedit_by_hand():
    def both(semantic: list[int], perceptual: list[int]) -> dict[str, list[int]]:
        return {"semantic": semantic, "perceptual": perceptual}

    en, cn = {"language": "en", "both": True}, {"language": "cn", "both": False}
    found = figures("gedit", [
        (item("1", "color_alter", **en), both([9, 8], [8, 10])),  # sqrt(8 * 8) = 8
        (item("2", "color_alter", **{**en, "both": False}), both([0, 10], [10, 10])),  # 0
        (item("3", "tone_transfer", **en), both([5, 9], [9, 5])),  # 5
        (item("4", "tone_transfer", **cn), both([10, 10], [10, 10])),
        (item("5", "tone_transfer", **en), {"semantic": [1, 1]}),
    ])  # fmt: skip
    assert found["en"] == pytest.approx((4 + 5) / 2)
    assert found["en, SC"] == pytest.approx(((8 + 0) / 2 + 5) / 2)
    assert found["en, PQ"] == pytest.approx(((8 + 10) / 2 + 5) / 2)
    assert found["en, both languages' subset"] == pytest.approx((8 + 5) / 2)
    assert found["cn"] == pytest.approx(10)


def test_rise_by_hand():
    def answers(*grades: int) -> dict[str, list[int]]:
        names = ("consistency", "reasoning", "plausibility")
        return {name: [grade] for name, grade in zip(names, grades, strict=False)}

    temporal, logical = "temporal_reasoning", "logical_reasoning"
    found = figures("rise", [
        (item("1", temporal, free=False), answers(5, 5, 5)),  # accurate, 5
        (item("2", temporal, free=False), answers(4, 3, 5)),  # 1.2 + 1.5 + 1 = 3.7
        (item("3", logical, free=False), answers(1, 1)),  # right: 5
        (item("4", logical, free=False), answers(1, 0)),  # (1.5 + 0.7) / 2 = 1.1
        (item("5", temporal, free=True), {"reasoning": [5], "plausibility": [4]}),  # 4 + 0.8 = 4.8
        (item("6", temporal, free=False), answers(5, 5)),  # without plausibility: no score
    ])  # fmt: skip
    assert found["accuracy"] == pytest.approx(40)
    assert found["temporal accuracy"] == pytest.approx(100 / 3)
    assert found["logical accuracy"] == pytest.approx(50)
    assert found["score"] == pytest.approx(25 * ((5 + 3.7 + 5 + 1.1 + 4.8) / 5 - 1))
    # Reasoning at 1 halves the score, which stays at least 1.
    assert rise_score({"consistency": 5, "reasoning": 1, "plausibility": 5}, logical=False) == pytest.approx(1.5)
    assert rise_score({"consistency": 1, "reasoning": 1, "plausibility": 1}, logical=False) == 1


def test_uniredit_by_hand():
    def answers(*grades: int) -> dict[str, list[int]]:
        return {n: [g] for n, g in zip(("consistency", "reasoning", "plausibility"), grades, strict=True)}

    found = figures("uniredit", [
        (item("a/1", "a", world="real"), answers(5, 5, 5)),  # 5
        (item("a/2", "a", world="real"), answers(3, 1, 5)),  # 0.9 + 0.5 + 1 = 2.4
        (item("b/1", "b", world="game"), answers(1, 1, 1)),  # 1
    ])  # fmt: skip
    assert found["real world"] == pytest.approx(25 * (3.7 - 1))
    assert found["game world"] == pytest.approx(0)
    assert found["overall"] == pytest.approx(25 * ((5 + 2.4 + 1) / 3 - 1))


NUMBERS = Question("q", "?", (Path("x.png"),), count=3, low=1, high=5)
YES = Question("q", "?", (Path("x.png"),), yes_no=True)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<answer>5, 4,3</answer>", [5, 4, 3]),
        ("Fine picture.\n<answer>[5, 4, 3]</answer>", [5, 4, 3]),
        ("5, 4, 3", [5, 4, 3]),
        ("<think>maybe <answer>1, 1, 1</answer></think><answer>5, 4, 3</answer>", [5, 4, 3]),
        ("<answer>5, 4</answer>", "wrong number of values"),
        ("<answer>5, 4, 6</answer>", "value out of range"),
        ("<answer>5, 4, 0</answer>", "value out of range"),
        ("<answer>5, 4, 3</answer><answer>1, 1, 1</answer>", "several answers"),
        ("<answer>5, 4, 3.5</answer>", "not in the form asked for"),
        ("<answer>5, 4, -3</answer>", "not in the form asked for"),
        ("<answer>compliance 5, quality 4, preservation 3</answer>", "not in the form asked for"),
        ("I would say 5, 4 and 3.", "no answer"),
        ("", "no answer"),
        ("<answer>5, 4, 3", "no answer"),
        ("<answer>" + "5," * 5000 + "5</answer>", "not in the form asked for"),
    ],
)
def test_numbers_are_read_strictly(reply: str, expected: list[int] | str):
    found = read_answer(reply, NUMBERS)
    assert (found.reason if isinstance(found, Missing) else found) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("<answer>Yes</answer>", [1]), ("no", [0]), ('"yes".', [1]), ("<answer>not sure</answer>", None),
     ("Yes, there is a cup, but no plate.", None), ("1", None)],
)  # fmt: skip
def test_yes_and_no_are_read_strictly(reply: str, expected: list[int] | None):
    found = read_answer(reply, YES)
    assert (None if isinstance(found, Missing) else found) == expected


def form(text: str) -> tuple[int, int, int] | None:
    """Count, low and high that a question asks for; None for yes or no."""
    match = re.search(r"(?:the (\d+) whole numbers, .*|whole number) from (\d+) to (\d+) inside", text)
    return (int(match[1] or 1), int(match[2]), int(match[3])) if match else None


def fair(body: Any) -> str:
    """A judge's reply that depends only on the question's text and pictures."""
    content = body["messages"][0]["content"]
    text = content[-1]["text"].split("\nAn earlier reply")[0]
    digest = hashlib.sha256(json.dumps([text, content[:-1]]).encode()).digest()
    if (asked := form(text)) is None:
        return f"<answer>{'yes' if digest[0] % 2 else 'no'}</answer>"
    count, low, high = asked
    return f"<answer>{', '.join(str(low + byte % (high - low + 1)) for byte in digest[:count])}</answer>"


def score(name: str, out: Path, decide: Callable[[int, Any], Reply], tries: int = 3, **client: Any) -> scoring.Scores:
    """Scores a tree with a judge behind a server."""
    settings = ClientConfig(**{"concurrency": 4, "backoff_seconds": 0.0, **client})
    with JudgeServer(decide) as server:
        judge = Judge(server.url, "fair-1", client=settings)
        return scoring.score_by_judge(open_benchmark(name), RunFolder(out).items(), out, judge, tries)


@pytest.mark.parametrize("name", JUDGED)
def test_a_judge_that_fails_changes_counts_and_no_score(name: str, tmp_path: Path, pipe: Any):
    out = make(name, tmp_path)
    asked: list[int] = []

    def good(number: int, body: Any) -> Reply:
        asked.append(number)
        return Reply(fair(body))

    def faulty(number: int, body: Any) -> Reply:
        # Three in ten: a fault of the server, a reply without an answer, one out of range.
        fault = {1: Reply("busy", status=503), 4: Reply("I cannot tell."), 7: Reply("<answer>99</answer>")}
        return fault.get(number % 10, Reply(fair(body)))

    clean = score(name, out, good)
    assert clean.made == len(clean.images) == clean.wanted
    assert not clean.missing
    log = out / RECORDS / "answers.jsonl"
    assert len(log.read_text().splitlines()) == len(asked)
    log.unlink()
    troubled = score(name, out, faulty, tries=6)
    assert troubled.figures == clean.figures
    assert troubled.images == clean.images
    assert not troubled.missing
    if len(asked) > 7:
        assert sum(troubled.unreadable.values()) > 0
    # Asked again, everything comes from the log, whose last line a kill may have cut off.
    log.write_bytes(log.read_bytes()[:-9])
    asked.clear()
    resumed = score(name, out, good)
    assert len(asked) == 1
    assert resumed.figures == clean.figures


def test_unreadable_answers_are_missing_and_never_zero(tmp_path: Path, pipe: Any):
    out = make("wise", tmp_path)

    def decide(number: int, body: Any) -> Reply:
        text = body["messages"][0]["content"][-1]["text"]
        return Reply("a fine picture" if "something 401" in text else "<answer>2, 2, 2</answer>")

    found = score("wise", out, decide)
    assert found.images == pytest.approx({"1.png": 1.0, "901.png": 1.0})
    assert found.missing == {"no answer": 1}
    assert found.unreadable == {"no answer": 3}
    assert found.figures[0].value == pytest.approx(1)
    assert [figure.name for figure in found.figures] == ["overall", "cultural", "chemistry"]
    assert "judge: fair-1, protocol: wise/dg-1" in "\n".join(scoring.lines("WISE", found))
    # A log of another protocol or judge is not used, and an image made again is judged again.
    data.picture(out / "1.png", 77)
    count: list[int] = []
    score("wise", out, lambda number, body: count.append(number) or Reply("<answer>0, 0, 0</answer>"))
    assert len(count) == 2


def test_an_unreachable_judge_ends_the_command(tmp_path: Path, pipe: Any, capsys: pytest.CaptureFixture):
    out = make("wise", tmp_path)
    with JudgeServer(lambda number, body: Reply("no such model", status=404)) as server:
        words = ["eval", "score", str(out), "--judge", server.url, "--judge-model", "x"]
        assert main(words) == 2
        assert len(server.requests) == 1
    error = capsys.readouterr().err
    assert "gives no answer (HTTP 404); check --judge" in error
    assert main(["eval", "score", str(out)]) == 2
    assert "is scored by a judge: give its server with --judge URL" in capsys.readouterr().err


def test_the_command_scores_and_writes(tmp_path: Path, pipe: Any, capsys: pytest.CaptureFixture):
    out = make("rise", tmp_path)
    with JudgeServer(lambda number, body: Reply(fair(body))) as server:
        assert main(["eval", "score", str(out), "--judge", server.url, "--judge-model", "fair-1"]) == 0
    printed = capsys.readouterr().out
    assert "RISEBench (judge: fair-1, protocol: rise-2026-04/dg-1)" in printed
    assert "images: 3 wanted, 3 made, 3 scored" in printed
    read = scoring.read_scores(RunFolder(out))
    assert read is not None
    assert len(read.images) == 3
    assert read.by == "judge: fair-1, protocol: rise-2026-04/dg-1"
    assert tree(out) == data.TREES["rise"]


@pytest.mark.parametrize("name", JUDGED)
def test_questions_carry_the_prompt_and_say_how_to_answer(name: str, tmp_path: Path, pipe: Any):
    out = make(name, tmp_path)
    benchmark = open_benchmark(name)
    for one in RunFolder(out).items():
        questions = benchmark.questions(one, 0, out)
        assert questions
        assert any(one.prompt in question.text for question in questions)
        for question in questions:
            # Nothing but a prompt's own braces is left of a template.
            assert not re.search(r"\{\w+\}", question.text)
            assert all(path.is_file() for path in question.images)
            assert question.images[-1] == out / one.files[0]
            assert "<answer></answer>" in instruction(question)


def test_results_of_geneval_and_dpg(tmp_path: Path, pipe: Any, capsys: pytest.CaptureFixture):
    (tmp_path / "g").mkdir()
    out = make("geneval", tmp_path / "g")
    assert main(["eval", "score", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"python evaluation/evaluate_images.py {out} --outfile" in printed
    lines = [
        json.dumps({"filename": str(out / f"{i:05d}/samples/{k:04d}.png"), "tag": tag, "correct": right, "prompt": "p"})
        for i, (tag, rights) in enumerate((("single_object", "1111"), ("counting", "1000"), ("colors", "0011")))
        for k, right in enumerate(map(bool, map(int, rights)))
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    assert main(["eval", "score", str(out), "--results", str(tmp_path / "results.jsonl")]) == 0
    scores = scoring.read_scores(RunFolder(out))
    assert scores is not None
    assert {f.name: f.value for f in scores.figures} == pytest.approx(
        {"overall": (1 + 0.25 + 0.5) / 3, "single_object": 1, "counting": 0.25, "colors": 0.5}
    )
    assert "judge: official scorer, protocol: geneval/official" in capsys.readouterr().out

    (tmp_path / "d").mkdir()
    out = make("dpg", tmp_path / "d")
    capsys.readouterr()
    assert main(["eval", "score", str(out)]) == 0
    assert f"PROCESSES=8 bash dpg_bench/dist_eval.sh {out} 512" in capsys.readouterr().out
    text = f"{out}/0.png, 1.0, 0.5, 0.5, 1.0, 0.75\n{out}/whoops31.png, 0.0, 0.0, 0.5, 0.5, 0.25\nDPG-Bench score: 50\n"
    (tmp_path / "dpg.txt").write_text(text)
    assert main(["eval", "score", str(out), "--results", str(tmp_path / "dpg.txt")]) == 1
    scores = scoring.read_scores(RunFolder(out))
    assert scores is not None
    assert scores.figures[0].value == pytest.approx(50)
    assert (scores.wanted, len(scores.images)) == (12, 8)
    with pytest.raises(DeepGenError, match="holds no scores of these prompts"):
        open_benchmark("dpg").read_official(tmp_path / "results.jsonl", RunFolder(out).items(), out)


def test_cvtg_with_another_reader(tmp_path: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch):
    out = make("cvtg", tmp_path)
    monkeypatch.setattr(
        "deepgen_jax.rewards.ocr.OCRReward.recognise", lambda self, image: [("Blue", 0.9), ("dor 2", 0.8)]
    )
    monkeypatch.setattr(scoring, "_clip_scores", lambda there, out, clip: [0.8, 0.6, 0.7])
    found = scoring.score_by_ocr(open_benchmark("cvtg"), RunFolder(out).items(), out, "clip")
    values = {figure.name: figure.value for figure in found.figures}
    # Two prompts say 'Blue Door 2', one 'Blue Door 5'.
    door = 1 - 1 / 4.00001
    assert values["word accuracy"] == pytest.approx((2 + 2 + 1) / 9)
    assert values["NED"] == pytest.approx((3 + 3 * door + 2 + (1 - 1 / 1.00001)) / 9)
    assert values["CLIPScore"] == pytest.approx(0.7)
    assert values["CVTG-Style: CLIPScore"] == pytest.approx(0.7)
    assert values["CVTG: word accuracy"] == pytest.approx(4 / 6)
    assert found.judge.startswith("rapidocr ")
    assert math.isfinite(found.figures[0].low)


def test_clip_score_by_its_formula(tmp_path: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch):
    out = make("cvtg", tmp_path)
    seen: list[str] = []

    class Cosines:
        """A CLIP whose cosine is the place of a sample, the first negative."""

        batch_size = 2

        def __init__(self, folder: str) -> None:
            assert folder == "clip"

        async def score(self, samples: list[RewardSample]) -> RewardScores:
            cosines = [(len(seen) + i) / 10 - 0.1 for i in range(len(samples))]
            seen.extend(sample.prompt for sample in samples)
            return RewardScores.of(cosines)

    monkeypatch.setattr("deepgen_jax.rewards.clip_score.CLIPReward", Cosines)
    monkeypatch.setattr("deepgen_jax.rewards.ocr.OCRReward.recognise", lambda self, image: [])
    found = scoring.score_by_ocr(open_benchmark("cvtg"), RunFolder(out).items(), out, "clip")
    assert seen == [f"A photo depicts {item.prompt}" for item in RunFolder(out).items()]
    # Cosines -0.1, 0 and 0.1.
    values = {figure.name: figure.value for figure in found.figures}
    assert values["CLIPScore"] == pytest.approx(0.25 / 3, abs=1e-6)
    assert values["CVTG-Style: CLIPScore"] == pytest.approx(0.25, abs=1e-6)
    assert not found.notes
