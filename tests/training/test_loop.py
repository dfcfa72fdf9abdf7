"""The loop that all stages share, driven with a stage that costs nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax import files
from deepgen_jax.cli.main import main
from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel.mesh import make_mesh
from deepgen_jax.stores.run_folder import read_run
from deepgen_jax.training import loop
from deepgen_jax.training.auto_settings import Choice
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import (
    AutoencoderConfig,
    CheckpointConfig,
    LogConfig,
    SampleConfig,
    SupervisedConfig,
)
from deepgen_jax.training.stage import StepReport
from deepgen_jax.training.state import TrainState


class Counting:
    """Adds one to its only parameter a step; ``bad`` steps are not finite, ``stop`` is pressed at a step."""

    def __init__(self, bad=(), stop=None, signal=None):
        self.state = TrainState(jnp.int32(0), {"params": {"x": jnp.zeros(3)}, "lora": {}}, (), None, jnp.int32(0))
        self._bad, self._stop, self._signal, self.closed = bad, stop, signal, False

    def step(self):
        count = int(self.state.step) + 1
        bad = count in self._bad
        row = int(self.state.skipped) + 1 if bad else 0
        x = self.state.trainable["params"]["x"] + (0 if bad else 1)
        self.state = TrainState(jnp.int32(count), {"params": {"x": x}, "lora": {}}, (), None, jnp.int32(row))
        if count == self._stop:
            self._signal.signum = 15
        loss = float("nan") if bad else 1.0 / count
        metrics = {"loss": jnp.float32(loss), "skipped": float(bad), "skipped_in_a_row": jnp.int32(row)}
        return StepReport(metrics, 2, 10, 0.0, [f"s/{count}@0"], {"data": 0.1})

    def position(self):
        return {"count": int(self.state.step)}

    def resume(self, state, position):
        assert position["count"] == int(state.step)
        self.state = state

    def summary(self):
        return ["counts"]

    def close(self):
        self.closed = True


@pytest.fixture
def config(folders, tmp_path):
    data = DataConfig((SourceConfig("s", "json", "none.json"),), 2, MixtureConfig(("t2i",)))
    return SupervisedConfig(
        model=str(folders("none")),
        out=str(tmp_path / "run"),
        steps=10,
        trains=("bridge",),
        data=data,
        max_bad_steps=3,
        checkpoints=CheckpointConfig(every=2, keep_last=2, keep_every=4),
        log=LogConfig(tensorboard=False, sample_ids=True),
    )


@pytest.fixture
def run(monkeypatch):
    """``run(config, bad=..., stop=...)`` -> (outcome, stage, lines that were said)."""

    def start(config, **options):
        signal, said = SimpleNamespace(signum=None), []
        stage = Counting(signal=signal, **options)
        monkeypatch.setattr(loop, "make_stage", lambda *_: stage)
        try:
            return loop.train(config, make_mesh(None), signal, said.append), stage, said
        finally:
            assert stage.closed

    return start


def logged(config, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(config.out) / name).read_text().splitlines()]


def checkpoints(config):
    return sorted(int(path.name) for path in (Path(config.out) / "checkpoints").iterdir() if path.name.isdecimal())


def test_settings_that_were_chosen_are_recorded_and_kept(config, run, capsys):
    run(config, stop=4)
    folder = Path(config.out)
    chosen = {"devices": "1 x cpu", "mesh": "data=1,fsdp=1,tensor=1", "remat": "full", "gather_frozen": False}
    assert read_run(folder)["chosen"] == chosen
    assert read_run(folder)["config"]["remat"] == "auto"
    # An earlier version may have chosen otherwise.
    values = read_run(folder) | {"chosen": chosen | {"remat": "dots"}}
    (folder / "config.json").write_text(json.dumps(values))
    run(config)
    assert read_run(folder)["chosen"]["remat"] == "dots"
    run(replace(config, steps=12, remat="flash"))
    assert read_run(folder)["chosen"]["remat"] == "flash"
    assert main(["info", str(folder)]) == 0
    assert "mesh data=1,fsdp=1,tensor=1, remat flash, gather_frozen false" in capsys.readouterr().out


def test_runs_from_before_the_choice_keep_their_settings(config, run):
    run(config, stop=4)
    folder = Path(config.out)
    values = read_run(folder)
    del values["chosen"]
    values["config"] |= {"mesh": "", "remat": "dots", "gather_frozen": True}
    (folder / "config.json").write_text(json.dumps(values))
    run(config)
    assert read_run(folder)["chosen"]["remat"] == "dots"
    assert read_run(folder)["chosen"]["gather_frozen"] is True


def test_every_step_is_logged_and_the_right_checkpoints_stay(config, run):
    outcome, stage, _ = run(config)
    assert (outcome.step, outcome.finished, outcome.skipped) == (10, True, 0)
    assert [line["step"] for line in logged(config)] == list(range(1, 11))
    assert [line["ids"] for line in logged(config, "samples-0.jsonl")] == [[f"s/{i}@0"] for i in range(1, 11)]
    assert all(line["samples_per_second"] > 0 and line["seconds/data"] == 0.1 for line in logged(config))
    assert checkpoints(config) == [4, 8, 10]
    np.testing.assert_array_equal(stage.state.trainable["params"]["x"], 10)


def test_resumes_where_it_was_stopped(config, run):
    outcome, _, _ = run(config, stop=5)
    assert (outcome.step, outcome.finished) == (5, False)
    assert checkpoints(config)[-1] == 5
    outcome, stage, said = run(config)
    assert any("continues from step 5" in line for line in said)
    assert outcome.finished
    np.testing.assert_array_equal(stage.state.trainable["params"]["x"], 10)
    assert [line["step"] for line in logged(config)] == list(range(1, 11))
    outcome, _, said = run(config)
    assert any("all 10 steps are done" in line for line in said)


def test_steps_that_are_not_finite_are_counted_over_interruptions(config, run):
    outcome, _, _ = run(config, bad=(2, 3), stop=4)
    assert outcome.skipped == 2
    outcome, stage, _ = run(config, bad=(6,))
    assert outcome.skipped == 3
    np.testing.assert_array_equal(stage.state.trainable["params"]["x"], 7)
    assert [line["skipped_steps"] for line in logged(config)] == [0, 1, 2, 2, 2, 3, 3, 3, 3, 3]
    assert logged(config)[1]["loss"] is None


def test_too_many_of_them_in_a_row_end_the_run(config, run):
    with pytest.raises(DeepGenError, match=r"not finite in 3 steps in a row, up to step 7; the checkpoint of step"):
        run(config, bad=(5, 6, 7))
    assert checkpoints(config) == [4, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "was begun with seed=0, not 1"),
        ({"trains": ("bridge", "mmdit")}, r"was begun with trains=\['bridge'\]"),
        # These decide which arrays a checkpoint holds.
        ({"ema_decay": 0.9}, r"was begun with ema_decay=None, not 0\.9"),
        ({"optimizer": OptimizerConfig(name="muon")}, r"was begun with optimizer\.name=adamw, not muon"),
    ],
)
def test_a_run_cannot_change_its_settings(config, run, changes, message):
    run(config, stop=1)
    with pytest.raises(DeepGenError, match=message):
        loop.describe(Path(config.out), replace(config, **changes))


def test_an_autoencoder_resumes_with_the_same_parts(config, run):
    whole = AutoencoderConfig(
        model=config.model,
        out=config.out,
        steps=10,
        data=config.data,
        checkpoints=config.checkpoints,
        log=config.log,
    )
    run(whole, stop=1)
    with pytest.raises(DeepGenError, match="was begun with decoder_only=False, not True"):
        loop.describe(Path(config.out), replace(whole, decoder_only=True))


def test_a_run_that_has_saved_nothing_takes_other_settings(config):
    folder = Path(config.out)
    loop.describe(folder, replace(config, model="deepgen-bse"))
    loop.describe(folder, replace(config, seed=1, ema_decay=0.9))
    description = read_run(folder)
    assert (description["config"]["model"], description["config"]["seed"]) == (config.model, 1)
    assert description["origin"]["model"] == str(Path(config.model).absolute())


def test_all_devices_that_a_run_has_used_are_recorded(config, run):
    run(config, stop=1)
    assert read_run(Path(config.out))["devices"] == ["1 x cpu"]
    for devices in ("8 x TPU v6e", "1 x cpu"):
        loop.describe(Path(config.out), config, Choice(devices, "fsdp=8", "full", False))
    loop.describe(Path(config.out), config)
    assert read_run(Path(config.out))["devices"] == ["1 x cpu", "8 x TPU v6e"]


def test_a_folder_with_something_else_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("dear")
    with pytest.raises(DeepGenError, match="holds something else than a training run"):
        loop.describe(Path(config.out), config)


def test_a_folder_that_a_killed_launch_left_is_empty(config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / files.LOCK_FILE).write_text("{}")
    (folder / f"{files.PARTIAL_PREFIX}1-ab").write_text("{")
    loop.describe(folder, config)
    assert read_run(folder)["kind"] == "supervised"


def test_samples_need_their_reference_images(config, run):
    samples = SampleConfig(every=1, prompts=("a",), images=("gone.png",))
    with pytest.raises(DeepGenError, match=r"samples\.images: gone\.png does not exist"):
        loop.train(replace(config, samples=samples), make_mesh(None), SimpleNamespace(signum=None), print)
