"""The training loop that all stages share: resume, step, log, checkpoint, stop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from deepgen_jax import files, locks, settings
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.grids import tiled
from deepgen_jax.parallel.chips import peak_flops, peak_memory
from deepgen_jax.parallel.hosts import Agreement
from deepgen_jax.stores.checkpoint import Checkpoints, set_aside
from deepgen_jax.stores.lineage import MODEL_CHANGES, newest_starting_point, starting_point_of
from deepgen_jax.stores.run_folder import (
    RUN_FILE,
    RUN_FORMAT,
    RUN_VERSION,
    pin,
    read_run,
    recorded_choice,
    saved_steps,
)
from deepgen_jax.training.auto_settings import Choice
from deepgen_jax.training.progress import Progress
from deepgen_jax.training.run_config import RunConfig
from deepgen_jax.training.samples import check_images, make_samples
from deepgen_jax.training.stage import Stage, StepReport, kind_of, make_stage, settings_on
from deepgen_jax.training.tracking import Tracker

if TYPE_CHECKING:
    from deepgen_jax.inference.pipeline import DeepGenPipeline

# What a run cannot change once it has a checkpoint, and what of it matters: checkpoints would not be those of one run,
# or hold other arrays (there is a moving average or not, and so on).
_FIXED: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("model", "start", "trains", "seed", "lora", "optimizer.name"), lambda value: value),
    **dict.fromkeys(("evaluations", "estimates"), lambda value: value),
    "ema_decay": lambda value: value is not None,
    "decoder_only": bool,
    "policy.algorithm": lambda value: value == "nft",
}


class StopSignal(Protocol):
    """Whether the run was asked to stop."""

    signum: int | None


class Evaluator(Protocol):
    """Scores a run's weights on benchmarks; called on all processes between steps."""

    def __call__(self, step: int, pipeline: Callable[[bool], DeepGenPipeline]) -> dict[str, float]:
        """Metrics by name; ``pipeline(True)`` has the moving average if there is one."""
        ...


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run.

    Attributes:
      step: optimiser steps taken and saved.
      finished: all steps of the config were taken; else it was asked to stop.
      skipped: steps without a finite loss and gradient, in the whole run.
    """

    step: int
    finished: bool
    skipped: int


def train(
    config: RunConfig,
    mesh: Mesh,
    stop: StopSignal,
    say: Callable[[str], None],
    resume_from: str = "",
    evaluator: Evaluator | None = None,
    choice: Choice | None = None,
) -> Outcome:
    """Runs a stage to its last step, from the newest checkpoint in ``config.out`` if there is one.

    The first process holds the run's folder for all until the run ends.

    Args:
      config: of the run.
      mesh: of all hosts' devices.
      stop: checked between steps; when it is set, the run saves and returns.
      say: prints a line.
      resume_from: the step of the checkpoint to continue from, or "previous" for the one before the newest; later ones
        are put aside. "" for the newest.
      evaluator: called every ``config.eval.every`` steps.
      choice: of the settings that are left to "auto"; by default made here.

    Raises:
      DeepGenError: something in the config cannot be used, another process trains in ``config.out``, a checkpoint
        cannot be written, or too many steps in a row were not finite. Complete checkpoints stay.
    """
    check_images(config.samples)
    run = Path(config.out)
    with ExitStack() as stack:
        if jax.process_index() == 0:
            # Where this fails, the other processes learn it from their connection to this one.
            stack.enter_context(locks.locked(run, "wait until it ends, stop it, or give another out"))
            files.remove_partials(run)
            if resume_from and (folder := set_aside(run, _step_to_resume(run, resume_from))):
                say(f"later checkpoints were moved to {folder}; remove it when it is not needed")
        choice = choice or settings_on(config, mesh, recorded_choice(run))
        describe(run, config, choice)
        stage = make_stage(choice.applied(config), mesh)
        stack.callback(stage.close)
        kept = config.checkpoints
        checkpoints = stack.enter_context(Checkpoints(run, kept.keep_last, kept.keep_every))
        start, skipped = 0, 0
        if (latest := checkpoints.latest()) is not None:
            state, position = checkpoints.restore(latest, stage.state)
            stage.resume(state, position["stage"])
            start, skipped = latest, position["skipped"]
            say(f"continues from step {start} of {run}")
        for line in stage.summary():
            say(line)
        if start >= config.steps:
            say(f"all {config.steps} steps are done; raise steps to train on")
            return Outcome(start, True, skipped)
        host = jax.process_index()
        tracker = stack.enter_context(Tracker(run, config.log, settings.to_json(config), start, process_index=host))
        bar = stack.enter_context(Progress(config.steps, start)) if host == 0 else None
        return _Loop(config, stage, checkpoints, tracker, bar, mesh, skipped, evaluator).run(start, stop)


def _step_to_resume(run: Path, asked: str) -> int:
    """The step that ``--resume-from`` names."""
    steps = saved_steps(run)
    if asked.isdecimal():
        return int(asked)
    if asked != "previous":
        raise DeepGenError(f"--resume-from is {asked!r}; give the step of a checkpoint, or previous")
    if len(steps) < 2:
        raise DeepGenError(f"{run} has {len(steps)} checkpoint{'s'[:len(steps) != 1]}, so none before the newest")
    return steps[-2]


def describe(run: Path, config: RunConfig, choice: Choice | None = None) -> None:
    """Writes the run's description, unless the folder holds another run. It pins what the run starts from.

    Where no checkpoint was saved yet, nothing was trained: the settings may be others, and are pinned anew.

    Args:
      run: its folder.
      config: of the run.
      choice: devices that it runs on from now on, and settings for them; all devices that it has run on are kept.

    Raises:
      DeepGenError: it does, or something else; or ``config.start`` cannot be started from.
    """
    values: dict[str, Any] = {"format": RUN_FORMAT, "version": RUN_VERSION, "kind": kind_of(config)}
    values["config"] = settings.to_json(config)
    if changes := config.model_changes:
        values[MODEL_CHANGES] = changes
    path, saved = run / RUN_FILE, saved_steps(run)
    used: list[str] = []
    if path.is_file():
        earlier = read_run(run)
        used = earlier.get("devices", [])
        if earlier["kind"] != values["kind"]:
            raise DeepGenError(f"{run} holds a run of kind {earlier['kind']}, not {values['kind']}; give another out")
        for name, of in _FIXED.items() if saved else ():
            before, now = _setting(earlier["config"], name), _setting(values["config"], name)
            if of(before) != of(now):
                raise DeepGenError(f"{run} was begun with {name}={before}, not {now}; restore it, or give another out")
    elif run.is_dir() and not all(files.is_own(path) for path in run.iterdir()):
        raise DeepGenError(f"{run} holds something else than a training run; give another out")
    origin = starting_point_of(config) if saved else newest_starting_point(config)
    values["origin"] = origin.to_json()
    values["devices"] = list(dict.fromkeys([*used, *([choice.devices] if choice else [])]))
    if choice is not None:
        values["chosen"] = choice.to_json()
    if jax.process_count() > 1:  # all have looked before process 0 writes
        multihost_utils.sync_global_devices("run looked at")
    if jax.process_index() == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.write_error(run, error) from error
        files.write_text(path, json.dumps(values, indent=2))
        for at in set(origin.inherited.values()):
            pin(at.run, at.step)
    if jax.process_count() > 1:  # all read what process 0 has pinned
        multihost_utils.sync_global_devices("run described")


def _setting(config: Mapping[str, Any], name: str) -> Any:
    """A setting by its dotted name; None if a configuration has none."""
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


class _Loop:
    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        checkpoints: Checkpoints,
        tracker: Tracker,
        bar: Progress | None,
        mesh: Mesh,
        skipped: int,
        evaluator: Evaluator | None,
    ) -> None:
        self._config, self._stage, self._checkpoints = config, stage, checkpoints
        self._tracker, self._bar, self._mesh = tracker, bar, mesh
        self._skipped, self._evaluator = skipped, evaluator
        peak = config.log.peak_flops or peak_flops(mesh.devices.flat[0])
        self._peak = peak * mesh.size if peak else None

    def run(self, step: int, stop: StopSignal) -> Outcome:
        """Takes steps. The metrics of one are read while the next one runs."""
        agreement = Agreement(self._mesh)
        pending: tuple[int, StepReport, float] | None = None
        asked = saved = False
        while step < self._config.steps and not asked:
            begun = time.perf_counter()
            report = self._stage.step()
            step += 1
            asked = agreement.any(stop.signum is not None)
            self._checkpoints.check()
            if pending:
                self._finish(*pending, begun)
            pending = step, report, begun
            saved = self._is_due(step, self._config.checkpoints.every)
            sampled = self._is_due(step, self._config.samples.every)
            if saved or sampled or self._is_evaluated(step):
                self._finish(*pending)
                pending = None
            if saved:
                self._save(step)
            if sampled:
                self._sample(step)
        if pending:
            self._finish(*pending)
        if not saved:
            self._save(step)
        return Outcome(step, step >= self._config.steps, self._skipped)

    @staticmethod
    def _is_due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _is_evaluated(self, step: int) -> bool:
        return self._evaluator is not None and self._is_due(step, self._config.eval.every)

    def _save(self, step: int) -> None:
        self._checkpoints.save(step, self._stage.state, {"stage": self._stage.position(), "skipped": self._skipped})

    def _sample(self, step: int) -> None:
        pictures = make_samples(self._stage.pipeline(), self._config.samples)
        self._tracker.picture(step, "samples", tiled(pictures, columns=4))

    def _finish(self, step: int, report: StepReport, begun: float, ended: float | None = None) -> None:
        """Waits for a step, logs it, and stops the run where too many were not finite.

        ``ended`` is when the next one began: each waits for devices alike, so that the difference is a step's time.
        """
        metrics = {name: _plain(value) for name, value in report.metrics.items()}
        seconds = (ended or time.perf_counter()) - begun
        skipped = bool(metrics.pop("skipped", 0.0))
        in_a_row = metrics.pop("skipped_in_a_row", 0.0)
        self._skipped += skipped
        metrics |= self._speed(report, seconds) | {"skipped_steps": float(self._skipped)}
        evaluated = self._is_evaluated(step)
        if evaluated and self._evaluator is not None:
            metrics |= self._evaluator(step, self._stage.pipeline)
        if self._config.log.sample_ids:
            self._tracker.sample_ids(step, report.sample_ids)
        if self._is_due(step, self._config.log.every) or skipped or evaluated or step == self._config.steps:
            self._tracker.log(step, metrics)
        for name, picture in report.pictures.items():
            self._tracker.picture(step, name, picture)
        if self._bar is not None:
            self._bar.show(step, metrics)
        if isinstance(in_a_row, float) and in_a_row >= self._config.max_bad_steps:
            last = self._checkpoints.latest()
            kept = "no checkpoint was written yet" if last is None else f"the checkpoint of step {last} is kept"
            raise DeepGenError(
                f"loss or gradient was not finite in {in_a_row:.0f} steps in a row, up to step {step}; {kept}; lower "
                "optimizer.learning_rate or look at the samples of these steps (log.sample_ids=true)"
            )

    def _speed(self, report: StepReport, seconds: float) -> dict[str, Any]:
        speed = {
            "samples_per_second": report.samples / seconds,
            "tokens_per_second": report.tokens / seconds,
            "seconds/step": seconds,
            **{f"seconds/{phase}": value for phase, value in report.seconds.items()},
        }
        if self._peak:
            speed["mfu"] = report.flops / seconds / self._peak
        if (memory := peak_memory()) is not None:
            speed["device_memory_gib"] = memory / 2**30
        return speed


def _plain(value: Any) -> float | list[float]:
    array = np.asarray(value, np.float64)
    return float(array) if array.ndim == 0 else array.tolist()
