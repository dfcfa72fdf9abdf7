"""A conversion that is stopped in the middle leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deepgen_jax.convert import convert
from deepgen_jax.files import PARTIAL_PREFIX


def test_an_error_while_writing_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, release: Path, tmp_path: Path
) -> None:
    from deepgen_jax.convert import plan

    reads = iter(range(400))

    def fail(tensor: np.ndarray) -> bool:
        if next(reads, None) is None:
            raise MemoryError("too much")
        return True

    monkeypatch.setattr(plan, "all_finite", fail)
    (tmp_path / "place").mkdir()
    with pytest.raises(MemoryError, match="too much"):
        convert(out=tmp_path / "place" / "m", diffusers=release)
    assert not caplog.records
    assert list((tmp_path / "place").iterdir()) == []


@pytest.fixture
def slow_conversion(data_dir: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process in the middle of a conversion, and its temporary output folder."""
    place = tmp_path / "place"
    place.mkdir()
    program = f"""
import signal
import time
from deepgen_jax.convert import convert, plan
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with SIGINT ignored
real = plan.all_finite
def slow(tensor):
    print("reading", flush=True)
    time.sleep(0.05)
    return real(tensor)
plan.all_finite = slow
convert(out={str(place / "m")!r}, diffusers={str(data_dir / "deepgen_diffusers")!r})
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    yield process, place
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_conversion_leaves_nothing(
    number: signal.Signals, slow_conversion: tuple[subprocess.Popen[str], Path]
) -> None:
    process, place = slow_conversion
    assert any(path.name.startswith(PARTIAL_PREFIX) for path in place.iterdir())
    time.sleep(0.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "ERROR:absl" not in errors
    assert list(place.iterdir()) == []
