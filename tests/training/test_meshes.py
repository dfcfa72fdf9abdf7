"""The same losses from the same samples on any mesh, and in two processes."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import runs

# The runs share their reference and compiled programs.
pytestmark = pytest.mark.xdist_group("meshes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, folders):
    folder = tmp_path_factory.mktemp("meshes")
    runs.write_data(folder)
    runs.write_config(folder, folders("sft"))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    runs.finish(runs.start(folder, "mesh=data=1", f"out={folder}/alone"))
    return folder / "alone"


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("data=8", marks=pytest.mark.slow),
        pytest.param("fsdp=8", marks=pytest.mark.slow),
        "data=2,fsdp=2,tensor=2",
    ],
)
def test_first_losses_on_a_mesh(mesh, folder, alone):
    out = folder / mesh
    runs.finish(runs.start(folder, f"mesh={mesh}", f"out={out}", devices=8))
    assert len(runs.losses(out)) == 5
    np.testing.assert_allclose(runs.losses(out), runs.losses(alone), rtol=1e-5)
    assert runs.sample_ids(out) == runs.sample_ids(alone)


def test_first_losses_in_two_processes(folder, alone):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    out = folder / "two"
    words = ("mesh=data=1,fsdp=2", f"out={out}", "--coordinator", address, "--num-processes", "2", "--process-id")
    processes = [runs.start(folder, *words, str(i), devices=1) for i in range(2)]
    for process in processes:
        runs.finish(process)
    np.testing.assert_allclose(runs.losses(out), runs.losses(alone), rtol=1e-5)
    assert runs.sample_ids(out, hosts=2) == runs.sample_ids(alone)
