"""The same losses from the same samples on any mesh, and in two processes."""

from __future__ import annotations

import shutil
import signal
import socket
import time

import numpy as np
import pytest
from support import runs

# The runs share their reference and compiled programs.
pytestmark = pytest.mark.xdist_group("meshes")

STAGE_1, STAGE_2 = "trains=bridge", "trains=bridge,mmdit,lora"
MESHES = ("data=8", "fsdp=8", "data=2,fsdp=2,tensor=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    runs.write_data(folder)
    runs.write_config(folder, runs.write_model(folder))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """``alone(stage)`` -> a run on one device."""
    made = {}

    def run(stage):
        if stage not in made:
            made[stage] = folder / f"alone-{len(made)}"
            runs.finish(runs.start(folder, stage, "mesh=data=1", f"out={made[stage]}"))
        return made[stage]

    return run


def assert_same_start(out, alone, hosts=1):
    assert len(runs.losses(out)) == 5
    np.testing.assert_allclose(runs.losses(out), runs.losses(alone), rtol=1e-5)
    assert runs.sample_ids(out, hosts) == runs.sample_ids(alone)


@pytest.mark.parametrize(
    ("stage", "mesh"),
    [pytest.param(stage, mesh, marks=pytest.mark.slow) for stage in (STAGE_1, STAGE_2) for mesh in MESHES],
)
def test_first_losses_on_a_mesh(stage, mesh, folder, alone):
    out = folder / f"{stage}-{mesh}".replace(",", "-")
    runs.finish(runs.start(folder, stage, f"mesh={mesh}", f"out={out}", devices=8))
    assert_same_start(out, alone(stage))


@pytest.mark.slow
def test_first_losses_with_frozen_layers_whole(folder, alone):
    out = folder / "gathered"
    runs.finish(runs.start(folder, STAGE_2, "mesh=fsdp=8", "gather_frozen=true", f"out={out}", devices=8))
    assert_same_start(out, alone(STAGE_2))


def start_processes(folder, count, *words, local_devices=1):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    words = (*words, "--coordinator", address, "--num-processes", str(count))
    return [runs.start(folder, *words, "--process-id", str(i), devices=local_devices) for i in range(count)]


@pytest.mark.parametrize("stage", [STAGE_1, pytest.param(STAGE_2, marks=pytest.mark.slow)])
def test_first_losses_in_two_processes(stage, folder, alone):
    out = folder / f"two-{stage}".replace(",", "-")
    for process in start_processes(folder, 2, stage, "mesh=data=1,fsdp=2", f"out={out}"):
        runs.finish(process)
    assert_same_start(out, alone(stage), hosts=2)


@pytest.mark.slow
def test_four_processes_resume_in_one_and_in_two(folder, alone):
    out = folder / "four"
    words = (STAGE_1, f"out={out}")
    for process in start_processes(folder, 4, *words, "mesh=data=2,fsdp=2", "checkpoints.every=2"):
        runs.finish(process)
    np.testing.assert_allclose(runs.losses(out), runs.losses(alone(STAGE_1)), rtol=1e-5)
    for step in (4, 5):
        shutil.rmtree(out / "checkpoints" / str(step))
    shutil.copytree(out, folder / "four-in-two")
    assert "continues from step 2" in runs.finish(runs.start(folder, *words, "mesh=data=1"))
    for process in start_processes(folder, 2, STAGE_1, f"out={folder}/four-in-two", "mesh=data=1,fsdp=2"):
        runs.finish(process)
    for run in (out, folder / "four-in-two"):
        np.testing.assert_allclose(runs.losses(run), runs.losses(alone(STAGE_1)), rtol=1e-5)


@pytest.mark.slow
def test_processes_that_train_together_hold_their_folder(folder):
    out = folder / "held"
    words = (STAGE_1, "mesh=data=1,fsdp=2", f"out={out}", "steps=1000", "checkpoints.every=2")
    first = start_processes(folder, 2, *words)
    while not (out / "metrics.jsonl").is_file():
        time.sleep(0.1)
        assert all(process.poll() is None for process in first)
    message = f"{out} is in use by process {first[0].pid} on "
    for process in start_processes(folder, 2, *words):
        assert message in runs.finish(process, status=2)
    assert message in runs.finish(runs.start(folder, STAGE_1, f"out={out}"), status=2)
    for process in first:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    steps = len(runs.metrics(out)) + 1
    runs.finish(runs.start(folder, STAGE_1, f"out={out}", f"steps={steps}", "mesh=data=1"))
    assert len(runs.losses(out)) == steps


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_others_end_when_one_process_is_killed(victim, folder):
    out = folder / f"lost-{victim}"
    words = (STAGE_1, "mesh=data=1,fsdp=2", f"out={out}", "steps=1000")
    processes = start_processes(folder, 2, *words)
    while not (out / "metrics.jsonl").is_file():
        time.sleep(0.1)
        assert all(process.poll() is None for process in processes), runs.finish(processes[1 - victim])
    processes[victim].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    text, _ = processes[1 - victim].communicate(timeout=60)
    assert time.monotonic() - begun < 60
    assert processes[1 - victim].returncode not in (0, None)
    assert f"process {victim} was killed or its machine is gone; start all processes again" in text
    processes[victim].communicate()
