"""Logs that are cut on resumption, the sinks, and what is shown on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import re
import struct
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.jsonl import LineWriter, read_lines, truncate
from deepgen_jax.training import progress as progress_module
from deepgen_jax.training import tracking
from deepgen_jax.training.progress import Progress
from deepgen_jax.training.run_config import LogConfig
from deepgen_jax.training.tracking import SINKS, Tracker
from deepgen_jax.user_warnings import DeepGenWarning

FILES_ONLY = LogConfig(tensorboard=False)


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]


@given(data=st.data())
def test_any_prefix_of_a_log_resumes_cleanly(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    """Killed after any byte, and resumed from any step: what is left are whole lines, each step once."""
    steps = sorted(data.draw(st.sets(st.integers(1, 30), max_size=8)))
    text = data.draw(st.text(max_size=5))
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    with LineWriter(path) as lines:
        for step in steps:
            lines.write({"step": step, "loss": step / 7, "text": text})
    written = path.read_bytes()
    cut = data.draw(st.integers(0, len(written)))
    path.write_bytes(written[:cut])
    start = data.draw(st.integers(0, 31))
    truncate(path, start)
    left = path.read_bytes()
    assert written.startswith(left)
    assert not left or left.endswith(b"\n")
    ends = np.cumsum([len(line) for line in written.splitlines(keepends=True)])
    # A line that lacks nothing but its line break is whole.
    assert steps_of(path) == [step for step, end in zip(steps, ends, strict=True) if end - 1 <= cut and step <= start]
    truncate(path, start)
    assert path.read_bytes() == left


@pytest.mark.parametrize("end", [b'{"step": 3, "lo', b"\0" * 50, b'{"step": "x"}\n', b"[1]\n", b"\xff\xfe\n", b"\n\n"])
def test_rubbish_at_the_end_goes(tmp_path: Path, end: bytes):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole + end)
    assert [entry["step"] for entry in read_lines(path)] == [1, 2]
    truncate(path, 5)
    assert path.read_bytes() == whole
    truncate(tmp_path / "nothing", 5)
    assert not (tmp_path / "nothing").exists()


def test_metrics_file(tmp_path: Path):
    with Tracker(tmp_path / "run", FILES_ONLY, {}) as tracker:
        tracker.log(1, {"loss": np.float32(0.5), "bad": float("nan"), "worse": float("inf"), "count": 3})
        # Flushed: a reader sees the line while the run continues.
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
        tracker.log(2, {"loss_by_sigma": np.array([1.0, np.nan]), "grad_norm": [1, None]})
    first, second = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first.pop("time") > 1e9
    assert first == {"step": 1, "loss": 0.5, "bad": None, "worse": None, "count": 3}
    assert second["loss_by_sigma"] == [1.0, None]
    assert second["grad_norm"] == [1, None]


def test_resumed_run_has_each_step_once(tmp_path: Path):
    for start in (0, 3, 2):
        with Tracker(tmp_path, FILES_ONLY, {}, start) as tracker:
            for step in range(start + 1, start + 5):
                tracker.log(step, {"loss": 1.0})
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]


def test_sample_ids_of_each_process(tmp_path: Path):
    """A resumed run may have fewer processes; the files of those that are gone are cut too."""
    log = LogConfig(tensorboard=False, sample_ids=True)
    for process in range(3):
        with Tracker(tmp_path, log, {}, process_index=process, process_count=3) as tracker:
            for step in (1, 2, 3):
                tracker.sample_ids(step, [f"pairs/{process}/{step}"])
                tracker.log(step, {"loss": 1.0})
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3]
    for process in range(2):
        with Tracker(tmp_path, log, {}, 1, process_index=process, process_count=2) as tracker:
            tracker.sample_ids(2, ["new"])
            tracker.picture(2, "step", Image.new("RGB", (8, 8)))
    assert [steps_of(tmp_path / f"samples-{process}.jsonl") for process in range(3)] == [[1, 2], [1, 2], [1]]
    last = (tmp_path / "samples-1.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) == {"step": 2, "ids": ["new"]}


def test_sample_ids_are_off_by_default(tmp_path: Path):
    with Tracker(tmp_path, FILES_ONLY, {}) as tracker:
        tracker.sample_ids(1, ["a"])
    assert not list(tmp_path.glob("samples-*"))


def test_tensorboard(tmp_path: Path):
    with Tracker(tmp_path, LogConfig(), {"steps": 9}, 4) as tracker:
        tracker.log(5, {"loss": 0.25, "nothing": float("nan"), "loss_by_sigma": [1.0, None]})
        tracker.picture(5, "step", Image.new("RGB", (8, 8), (255, 0, 0)))
    events = read_events(next((tmp_path / "tensorboard").iterdir()))
    # Readers forget what another file says of this step and later ones.
    assert [event.step for event in events if event.HasField("session_log")] == [5]
    values = {value.tag: (event.step, value) for event in events for value in event.summary.value}
    assert values["loss"][0] == 5
    assert values["loss"][1].simple_value == 0.25
    assert values["pictures/step"][1].image.width == 8
    assert "loss_by_sigma/00" in values
    assert not {"nothing", "loss_by_sigma/01"} & set(values)
    with Image.open(tmp_path / "pictures" / "step-000005.png") as picture:
        assert picture.getpixel((0, 0)) == (255, 0, 0)


def test_tensorboard_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.warns(DeepGenWarning, match=r"pip install 'deepgen-jax\[log\]'"):
        tracker = Tracker(tmp_path, LogConfig(), {})
    with tracker:
        tracker.log(1, {"loss": 1.0})
    assert steps_of(tmp_path / "metrics.jsonl") == [1]


class FakeWandB(types.ModuleType):
    """A stand-in for the package that keeps what it is given, run by run."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, types.SimpleNamespace] = {}
        self.axes: list[tuple[str, str | None]] = []

    def Image(self, path: str) -> str:
        return f"image {Path(path).name}"

    def init(self, **options: Any) -> types.SimpleNamespace:
        fresh = types.SimpleNamespace(summary={}, logged=[], ends=[], options=options)
        run = self.runs.setdefault(options["id"], fresh)

        def log(values: dict[str, Any]) -> None:
            run.logged.append(values)
            run.summary.update(values)

        run.log = log
        run.finish = lambda exit_code: run.ends.append(exit_code)
        run.define_metric = lambda name, step_metric=None, hidden=False: self.axes.append((name, step_metric))
        return run


def test_wandb_resumes_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = LogConfig(tensorboard=False, wandb="project")
    with Tracker(tmp_path / "run", log, {"steps": 9}) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": 1.0, "bad": float("nan")})
    tracker = Tracker(tmp_path / "run", log, {"steps": 9}, 1)
    for step in (2, 3, 4):
        tracker.log(step, {"loss": 1.0})
    tracker.picture(4, "step", Image.new("RGB", (8, 8)))
    tracker.close(failed=True)
    (run,) = wandb.runs.values()
    assert run.options | {"project": "project", "resume": "allow", "name": "run"} == run.options
    assert [values["step"] for values in run.logged] == [1, 2, 3, 4, 4]
    assert run.logged[0] == {"step": 1, "loss": 1.0}
    assert run.logged[-1]["pictures/step"] == "image step-000004.png"
    assert run.ends == [0, 1]
    assert ("*", "step") in wandb.axes


def test_wandb_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = LogConfig(tensorboard=False, wandb="project")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DeepGenError, match=r"wandb is missing; pip install 'deepgen-jax\[log\]'"):
        Tracker(tmp_path, log, {})
    wandb = FakeWandB()

    def refuse(**options: Any) -> None:
        raise RuntimeError("api_key not\nconfigured")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(DeepGenError, match=r"\(api_key not configured\); log in with `wandb login`, or"):
        Tracker(tmp_path, log, {})
    Tracker(tmp_path, log, {}, process_index=1, process_count=2).close()


def test_a_sink_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Memory:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        @classmethod
        def open(cls, run: tracking.RunInfo) -> Memory:
            made.append(cls())
            return made[-1]

        def log(self, step: int, metrics: Any) -> None:
            self.seen.append((step, metrics))

        def picture(self, step: int, name: str, image: Image.Image, path: Path) -> None:
            self.seen.append(path.name)

        def close(self, failed: bool) -> None:
            self.seen.append(failed)

    made: list[Memory] = []
    monkeypatch.setattr(tracking, "SINKS", (*SINKS, Memory))
    with Tracker(tmp_path, FILES_ONLY, {}) as tracker:
        tracker.log(1, {"loss": 2.0})
        tracker.picture(1, "grid", Image.new("RGB", (4, 4)))
    assert made[0].seen == [(1, {"loss": 2.0}), "grid-000001.png", False]


def test_folder_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DeepGenError, match=r"folder .*run cannot be made"):
        Tracker(tmp_path / "file" / "run", FILES_ONLY, {})


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_plain_progress_lines(capsys: pytest.CaptureFixture):
    metrics = {"loss": 0.5, "learning_rate": 1e-4, "samples_per_second": 12.34}
    metrics |= {"seconds/data": 0.1, "seconds/step": 0.4}
    with Progress(100, 40) as progress:
        for step in range(42, 101, 2):
            progress.show(step, metrics)
    captured = capsys.readouterr()
    first, *lines = captured.err.splitlines()
    assert not captured.out
    assert first == "deepgen: compiling (first step)"
    # Steps that are shown need not be multiples of the distance between lines.
    assert [int(line.split()[2].split("/")[0]) for line in lines] == [46, 50, 56, 60, 66, 70, 76, 80, 86, 90, 96, 100]
    assert "deepgen: step 46/100  loss 0.5000  lr 1.00e-04  12.3 samples/s  data wait 25%  (" in lines[0]
    with Progress(4) as progress:
        progress.show(1, {"reward/ocr/mean": 0.25, "reward/ocr@text/mean": 0.5, "reward/ocr/std": 1.0, "loss": None})
    assert "step 1/4  ocr 0.250  (00:00 elapsed)" in capsys.readouterr().err


@given(compiling=st.floats(0, 1e4), seconds=st.floats(0.01, 100), steps=st.integers(3, 60))
def test_compiling_is_left_out_of_the_time_left(compiling: float, seconds: float, steps: int):
    clock, stream = Clock(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stream):
        patch.setattr(progress_module, "time", clock)
        with Progress(steps) as progress:
            clock.now += compiling
            for step in range(1, steps):
                progress.show(step, {})
                clock.now += seconds
    lines = stream.getvalue().splitlines()[1:]
    assert ("left" in lines[0]) == (steps // 20 > 1)
    for line in lines[1:]:
        step = int(line.split()[2].split("/")[0])
        (left,) = re.findall(r", ([\d:]+) left\)", line)
        shown = sum(int(part) * 60**place for place, part in enumerate(reversed(left.split(":"))))
        assert abs(shown - seconds * (steps - step)) <= 1


def test_progress_bar_on_a_terminal(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(10, 4) as progress:
        time.sleep(1.5)
        progress.show(5, {"loss": 0.7})
        progress.show(10, {"loss": 0.5})
    shown = capsys.readouterr().err.split("\r")
    assert any("compiling (first step) 00:00" in text for text in shown)
    assert any("compiling (first step) 00:01" in text for text in shown)
    assert "10/10 steps" in shown[-1]
    assert "loss 0.5000" in shown[-1]
    assert "compiling" not in shown[-1]


def read_events(path: Path) -> list[Any]:
    """The events of a TensorBoard file: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events
