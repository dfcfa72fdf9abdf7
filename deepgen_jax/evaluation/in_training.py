"""Benchmarks during training: limited runs from the weights of the moment, whose scores go into the run's metrics."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from PIL import Image

import deepgen_jax
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Benchmark, Item, Reading
from deepgen_jax.evaluation.benchmark_kinds import open_benchmark
from deepgen_jax.evaluation.live import make_images
from deepgen_jax.evaluation.run import RunFolder, chosen, fewer_images, run_settings
from deepgen_jax.evaluation.scoring import Scores, score_by_judge, score_by_ocr, score_exactly, write_scores
from deepgen_jax.inference.batch import Settings
from deepgen_jax.inference.outputs import save_image
from deepgen_jax.rewards.judge import Judge

if TYPE_CHECKING:
    from deepgen_jax.inference.pipeline import DeepGenPipeline
    from deepgen_jax.training.run_config import EvalConfig

#: Folder of a training run that holds its evaluations, one folder for each benchmark, step and kind of weights.
FOLDER = "eval"


@dataclass(frozen=True)
class _Task:
    name: str
    benchmark: Benchmark
    reading: Reading
    items: list[Item]


class InTraining:
    """Evaluates the weights of a run; called by the training loop on all processes."""

    def __init__(self, config: EvalConfig, run: Path, average: bool) -> None:
        """Reads the benchmarks' data, so that what cannot be used ends the run before it starts.

        Args:
          config: what to evaluate, and how.
          run: folder of the training run.
          average: the run keeps a moving average, which is evaluated beside the weights themselves.

        Raises:
          DeepGenError: a benchmark is unknown, its data cannot be read, or nothing here can score it.
        """
        self._config, self._run, self._average = config, run, average
        data = list(config.data)
        self._tasks = [self._task(name, data) for name in config.benchmarks]
        if data:
            raise DeepGenError(f"eval.data: no benchmark takes {data[0]}; give the inputs of those that need any")

    def __call__(self, step: int, pipeline: Callable[[bool], DeepGenPipeline]) -> dict[str, float]:
        """The scores, "eval/BENCHMARK/FIGURE" and, of the average, "eval/BENCHMARK/FIGURE@ema"; none in followers.

        Args:
          step: of the run.
          pipeline: the weights themselves, or with True their moving average.

        Raises:
          DeepGenError: an image cannot be made or scored.
        """
        metrics: dict[str, float] = {}
        for average in (False, True) if self._average else (False,):
            pipe = pipeline(average)
            for task in self._tasks:
                ending = "@ema" if average else ""
                scores = self._evaluate(step, task, pipe, ending)
                if scores is not None:
                    found = {figure.name: figure.value for figure in scores.figures}
                    metrics |= {f"eval/{task.name}/{name}{ending}": value for name, value in found.items()}
                    metrics[f"eval/{task.name}/scored{ending}"] = len(scores.images) / max(scores.made, 1)
        return metrics

    def _task(self, name: str, data: list[str]) -> _Task:
        """The benchmark of a name; its inputs, if it needs any, are taken from the front of ``data``."""
        benchmark = open_benchmark(name)
        if benchmark.scorer == "official":
            raise DeepGenError(f"eval.benchmarks: {name} is scored by its own code; choose one that is scored here")
        if benchmark.scorer == "judge" and not (self._config.judge and self._config.judge_model):
            raise DeepGenError(f"eval.benchmarks: {name} needs eval.judge=URL and eval.judge_model=NAME")
        if benchmark.inputs and not data:
            raise DeepGenError(f"eval.data lacks the inputs of {name}: {benchmark.inputs}")
        reading = Reading(Path(data.pop(0) if benchmark.inputs else ""), "model")
        items = fewer_images(
            chosen(benchmark.read(reading), self._config.limit, spread=True), self._config.images_per_prompt
        )
        return _Task(name, benchmark, reading, items)

    def _evaluate(self, step: int, task: _Task, pipe: DeepGenPipeline, ending: str) -> Scores | None:
        config = self._config
        settings = run_settings(
            task.benchmark, pipe.config, seed=config.seed, steps=config.num_inference_steps, side=config.size
        )
        out = self._run / FOLDER / f"{task.name}-{step:07d}{ending.replace('@', '-')}"
        first = jax.process_index() == 0
        with tempfile.TemporaryDirectory() as folder:
            # Hosts need not share a disk: each draws the pictures to edit where it needs them.
            references = out if first else Path(folder)
            if first:
                RunFolder(out).write(self._description(step, task, settings, ending), task.items)
            task.benchmark.prepare(task.items, task.reading, references)
            made = make_images(task.benchmark, task.items, pipe, settings, config.batch_size, references)
            for file, pixels in made:
                if first:
                    (out / file).parent.mkdir(parents=True, exist_ok=True)
                    save_image(Image.fromarray(pixels), out / file, {"file": file, "step": step})
        return self._score(task, out) if first else None

    def _score(self, task: _Task, out: Path) -> Scores:
        if task.benchmark.scorer == "judge":
            judge = Judge(self._config.judge, self._config.judge_model)
            scores = score_by_judge(task.benchmark, task.items, out, judge)
        elif task.benchmark.scorer == "ocr":
            scores = score_by_ocr(task.benchmark, task.items, out)
        else:
            scores = score_exactly(task.benchmark, task.items, out)
        write_scores(RunFolder(out), scores)
        return scores

    def _description(self, step: int, task: _Task, settings: Settings, ending: str) -> Mapping[str, Any]:
        return {
            "benchmark": task.name,
            "title": task.benchmark.title,
            "protocol": task.benchmark.protocol,
            "model": f"{self._run.name} at step {step}{', average' if ending else ''}",
            "model_folder": str(self._run.absolute()),
            "model_fingerprint": "weights of a run",
            "settings": {
                "size": settings.width, "steps": settings.steps, "guidance": settings.guidance, "seed": settings.seed,
                "sampler": settings.sampler, "negative_prompt": settings.negative_prompt, "dtype": "the run's",
                "padding": settings.padding, "images a prompt": len(task.items[0].files),
                "seeds": "one an image, from the seed and its file",
            },
            "published_settings": {
                "size": task.benchmark.side, "steps": task.benchmark.steps, "guidance": task.benchmark.guidance,
                "images a prompt": task.benchmark.images,
            },
            "data": sorted({item.file for item in task.items}),
            "prompts": len(task.items),
            "limited": True,
            "command": f"deepgen train ... {_overrides(self._config)}",
            "deepgen_jax": deepgen_jax.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip


def _overrides(config: EvalConfig) -> str:
    """The settings that are not defaults, as on the command line."""
    plain = type(config)()
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(plain, field.name)
    }
    return " ".join(
        f"eval.{name}={','.join(value) if isinstance(value, tuple) else value}" for name, value in changed.items()
    )
