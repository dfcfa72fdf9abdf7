"""The same losses from the same samples on any mesh, and in two processes."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import runs

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


@pytest.mark.parametrize("stage", [STAGE_1, pytest.param(STAGE_2, marks=pytest.mark.slow)])
def test_first_losses_in_two_processes(stage, folder, alone):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    out = folder / f"two-{stage}".replace(",", "-")
    words = (stage, "mesh=data=1,fsdp=2", f"out={out}", "--coordinator", address, "--num-processes", "2")
    processes = [runs.start(folder, *words, "--process-id", str(i), devices=1) for i in range(2)]
    for process in processes:
        runs.finish(process)
    assert_same_start(out, alone(stage), hosts=2)
