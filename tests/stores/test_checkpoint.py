"""Checkpoints on full and damaged disks: one clear line, and what was saved before stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.checkpoint import Checkpoints, set_aside
from deepgen_jax.stores.run_folder import pin, saved_steps


class State(NamedTuple):
    step: jax.Array
    values: dict[str, jax.Array]


def state(step: int, size: int = 1000) -> State:
    return State(jnp.int32(step), {"x": jax.random.normal(jax.random.key(step), (size,))})


def save(run, *steps, size=1000):
    with Checkpoints(run, keep_last=10) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step, size), {"at": step})


def restore(run, step, size=1000):
    with Checkpoints(run, keep_last=10) as checkpoints:
        return checkpoints.restore(step, state(0, size))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("when", ["next step", "next save", "end"])
def test_a_full_disk_is_one_line(small_disk, when, caplog):
    run, size = small_disk / "run", 250_000  # a megabyte
    save(run, 1, 2, size=size)
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))

    def work():
        with Checkpoints(run, keep_last=10) as checkpoints:
            checkpoints.save(3, state(3, size), {"at": 3})
            deadline = time.monotonic() + 30
            while when == "next step" and time.monotonic() < deadline:
                checkpoints.check()
            if when == "next save":
                checkpoints.save(4, state(4, size), {"at": 4})

    with pytest.raises(DeepGenError) as caught:
        work()
    message = str(caught.value)
    assert message.startswith(f"{run}/checkpoints: the checkpoint of step 3 cannot be written: it takes 1.0 MB, and")
    assert "are lacking; the checkpoint of step 2 is kept: free some space" in message
    assert not any(word in message + caplog.text for word in ("OCDBT", "tensorstore", "RESOURCE", "\n"))
    assert saved_steps(run) == [1, 2]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2"]
    # The same command again, with room.
    (small_disk / "filler").unlink()
    save(run, 3, size=size)
    for step in (1, 2, 3):
        restored, position = restore(run, step, size)
        np.testing.assert_array_equal(restored.values["x"], state(step, size).values["x"])
        assert position == {"at": step}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_or_missing_files_are_damage(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("damaged")
    save(run, 1, 2)
    files = sorted(path for path in (run / "checkpoints" / "2" / "state").rglob("*") if path.is_file())
    # Orbax names and counts its files anew each time, so that draws must not depend on them.
    path = files[data.draw(st.integers(0, 10**6)) % len(files)]
    if data.draw(st.booleans()):
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size * data.draw(st.integers(0, 99)) // 100)
    message = ""
    try:
        restored, _ = restore(run, 2)
        np.testing.assert_array_equal(restored.values["x"], state(2).values["x"])  # the file is not needed
    except DeepGenError as error:
        message = str(error)
    if message:
        assert "/2 cannot be used (" in message
        assert "--resume-from previous continues from step 1" in message
        assert "\n" not in message
    restore(run, 1)


def test_going_back_keeps_checkpoints_put_aside(tmp_path):
    save(tmp_path, 1, 2, 3)
    assert set_aside(tmp_path, 3) is None
    assert set_aside(tmp_path, 1) == tmp_path / "set-aside"
    assert saved_steps(tmp_path) == [1]
    save(tmp_path, 2)
    set_aside(tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "set-aside").iterdir()) == ["2", "3"]
    with pytest.raises(DeepGenError, match="no checkpoint of step 7; it has 1"):
        set_aside(tmp_path, 7)


def test_checkpoints_that_runs_start_from_are_not_put_aside(tmp_path):
    save(tmp_path, 1, 2, 3)
    pin(tmp_path, 2)
    with pytest.raises(DeepGenError, match="other runs started from its checkpoint of step 2"):
        set_aside(tmp_path, 1)
    assert saved_steps(tmp_path) == [1, 2, 3]
