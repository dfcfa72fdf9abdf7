"""Benchmarks during training: scores of both kinds of weights in the metrics, folders that reports read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import benchmark_data as data
from support import runs
from support.fake_pipeline import FakePipeline
from support.judge_server import JudgeServer, Reply

from deepgen_jax.cli.main import main
from deepgen_jax.config import DeepGenConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.in_training import FOLDER, InTraining
from deepgen_jax.evaluation.report import collect
from deepgen_jax.nano.benchmark import held_out_samples
from deepgen_jax.nano.reward import WorldReward
from deepgen_jax.nano.samples import render
from deepgen_jax.training.run_config import EvalConfig

CONFIG = dataclasses.replace(DeepGenConfig(), image_size=96, num_inference_steps=2, guidance_scale=1.0)


class Painter:
    """A pipeline that draws what the held-out prompts ask for, or grey."""

    def __init__(self, *, right: bool) -> None:
        self.config, self.right = CONFIG, right
        self.scenes = {sample.text: sample.scene for sample in held_out_samples(1, 0)}

    def __call__(self, prompts, image, height, width, **settings):
        scenes = [self.scenes[text] for text in prompts]
        if self.right:
            return SimpleNamespace(images=[render(scene, height) for scene in scenes])
        return FakePipeline()(prompts, image, height=height, width=width, **settings)


def test_both_kinds_of_weights_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Words take seconds to read; without, those of two skills are missed.
    monkeypatch.setattr(WorldReward, "read", lambda self, sign: [])
    evaluator = InTraining(EvalConfig(every=5, benchmarks=("nano",), limit=13), tmp_path / "run", average=True)
    asked: list[bool] = []

    def pipeline(average: bool) -> Painter:
        asked.append(average)
        return Painter(right=average)

    metrics = evaluator(5, pipeline)  # type: ignore[arg-type]
    assert asked == [False, True]
    assert metrics["eval/nano/all skills@ema"] == pytest.approx(11 / 13)
    assert metrics["eval/nano/all skills"] < 0.3
    assert metrics["eval/nano/scored"] == metrics["eval/nano/scored@ema"] == 1.0
    folders = sorted(path.name for path in (tmp_path / "run" / FOLDER).iterdir())
    assert folders == ["nano-0000005", "nano-0000005-ema"]
    # Evenly spaced prompts see all skills.
    assert len([name for name in metrics if name.endswith("@ema") and "," not in name]) == 13 + 4
    (section,) = collect([tmp_path / "run" / FOLDER / name for name in folders])
    assert [run.label for run in section.runs] == ["run at step 5", "run at step 5, average"]
    assert section.comparisons[0].better > section.comparisons[0].worse


def test_a_judge_in_training(tmp_path: Path):
    given = data.wise(tmp_path)
    fake = FakePipeline()
    fake.config = CONFIG  # type: ignore[attr-defined]
    with JudgeServer(lambda number, body: Reply("<answer>2, 1, 0</answer>")) as server:
        config = EvalConfig(every=1, benchmarks=("wise",), data=(str(given),), judge=server.url, judge_model="j")
        metrics = InTraining(config, tmp_path / "run", average=False)(1, lambda average: fake)  # type: ignore
    assert metrics["eval/wise/overall"] == pytest.approx(0.8)
    assert fake.calls[0]["width"] == 96
    assert fake.calls[0]["steps"] == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EvalConfig(every=1, benchmarks=("wise",)), "wise needs eval.judge=URL and eval.judge_model=NAME"),
        (EvalConfig(every=1, benchmarks=("geneval",)), "geneval is scored by its own code"),
        (EvalConfig(every=1, benchmarks=("cvtg",)), "eval.data lacks the inputs of cvtg"),
        (EvalConfig(every=1, benchmarks=("nan",)), "did you mean nano"),
        (EvalConfig(every=1, benchmarks=("nano",), data=("x",)), "no benchmark takes x"),
    ],
)
def test_invalid_evaluations_are_refused_before_training(config: EvalConfig, message: str, tmp_path: Path):
    with pytest.raises(DeepGenError, match=message):
        InTraining(config, tmp_path, average=False)


def test_settings_that_do_not_fit():
    for values, message in (
        ({"every": 1}, "eval.benchmarks is empty"),
        ({"limit": 0}, "eval.limit is 0"),
        ({"benchmarks": ("nano",), "data": ("a", "b")}, "2 data for 1 benchmarks"),
    ):
        with pytest.raises(DeepGenError, match=message):
            EvalConfig(**values)


@pytest.mark.slow
def test_a_run_logs_its_scores_and_is_not_changed_by_them(tmp_path: Path):
    model = runs.write_model(tmp_path)
    runs.write_data(tmp_path)
    runs.write_config(tmp_path, model, trains=("bridge",))
    words = ["steps=4", "ema_decay=0.9"]
    runs.finish(runs.start(tmp_path, *words, f"out={tmp_path}/plain"))
    evaluated = ["eval.every=2", "eval.benchmarks=nano", "eval.limit=13", "eval.size=64", "eval.num_inference_steps=1"]
    runs.finish(runs.start(tmp_path, *words, *evaluated, f"out={tmp_path}/evaluated"))
    assert runs.losses(tmp_path / "plain") == runs.losses(tmp_path / "evaluated")
    lines = runs.metrics(tmp_path / "evaluated")
    scored = [line["step"] for line in lines if "eval/nano/all skills" in line]
    assert scored == [2, 4]
    assert all(0 <= lines[1][f"eval/nano/all skills{ending}"] <= 1 for ending in ("", "@ema"))
    folders = sorted(str(path) for path in (tmp_path / "evaluated" / FOLDER).iterdir())
    assert len(folders) == 4
    assert main(["report", *folders, "--out", str(tmp_path / "r.html")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["benchmarks"][0]["benchmark"] == "nano"
