"""`deepgen train` as a user meets it: errors on bad input, before anything is loaded or written."""

from __future__ import annotations

import json
import os
import signal

import pytest
from support import runs

from deepgen_jax.cli.main import main
from deepgen_jax.training import loop


@pytest.fixture
def config(tmp_path, folders):
    runs.write_data(tmp_path)
    return str(runs.write_config(tmp_path, folders("none"), trains=("bridge",)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stepz=3"], "did you mean steps"),
        (["steps=many"], "steps=many"),
        (["steps=0"], "steps is 0; it must be at least 1"),
        (["optimizer.learning_rat=1"], "did you mean learning_rate"),
        (["trains=bridge,dit"], "dit"),
        (["data.sources.picture.path=x"], "pictures"),
        (["out="], "out is not set; give out=FOLDER"),
        (["model=nowhere"], "nowhere is not a folder"),
        (["start=nowhere"], "nowhere"),
        (["mesh=data=3"], "needs 3 devices"),
        (["--process-id", "1"], "need --coordinator"),
        (["data.micro_batch=8", "data.sources.pictures.path=gone.json"], "gone.json"),
        (["--resume-from", "last"], "--resume-from is 'last'; give the step of a checkpoint, or previous"),
        (["--resume-from", "3"], "has no checkpoint of step 3; it has none"),
        (["--resume-from", "previous"], "has 0 checkpoints, so none before the newest"),
        (["--stopped-status", "-1"], "--stopped-status is -1; give one from 0 to 255"),
        (["optimizer.warmup=9"], "lower optimizer.warmup"),
    ],
)
def test_bad_input_is_one_line(words, message, config, capsys, tmp_path):
    assert main(["train", config, *words]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "run" / "checkpoints").is_dir() or not any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(("words", "status"), [((), 0), (("--stopped-status", "7"), 7)])
def test_status_after_sigterm(words, status, config, capsys, monkeypatch):
    def train(config, mesh, stop, say, resume_from, evaluator, choice):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        return loop.Outcome(step=3, finished=False, skipped=0)

    monkeypatch.setattr(loop, "train", train)
    assert main(["train", config, *words]) == status
    assert "stopped by SIGTERM after step 3, which is saved" in capsys.readouterr().err


def test_no_such_configuration(capsys):
    assert main(["train", "pretrian"]) == 2
    assert "pretrain" in capsys.readouterr().err


def test_show_prints_the_whole_configuration(config, capsys):
    assert main(["train", config, "steps=7", "--show"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["steps"] == 7
    assert shown["data"]["micro_batch"] == 8


@pytest.mark.parametrize(
    "name", ["pretrain", "sft", "grpo", "distill", "tiny_pretrain", "tiny_sft", "tiny_grpo", "tiny_distill"]
)
def test_packaged_configurations_load(name, capsys):
    assert main(["train", name, "--show"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] > 0


def test_published_batches():
    """Tables 9 and 10: samples a step."""
    from deepgen_jax.configs import distill, grpo, pretrain, sft

    for module, samples in ((pretrain, 512), (sft, 768)):
        config = module.get_config()
        assert config.accumulation * config.data.micro_batch == samples
    config = distill.get_config()
    assert config.accumulation * config.data.micro_batch == 256
    config = grpo.get_config()
    assert config.prompts_per_step * config.rollout.group_size == 256
