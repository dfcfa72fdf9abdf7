"""``deepgen plot``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from deepgen_jax.cli.main import main
from deepgen_jax.stores.jsonl import LineWriter
from deepgen_jax.training.curves import DATA_WAIT, choose_panels, over_steps, read_curves, series_label, smoothed
from deepgen_jax.training.plot import draw

STEPS = 40


def supervised(step: int) -> dict[str, object]:
    entry: dict[str, object] = {
        "loss": 1 / step, "loss/t2i": 1.1 / step, "loss_by_sigma": [1.0, None, 1 / step], "grad_norm": 2.0,
        "grad_norm/bridge": 1.0, "learning_rate": 1e-4, "samples_per_second": 9.0, "seconds/data": 0.1,
        "seconds/step": 0.4, "skipped": 0, "mfu": float("nan"),
    }  # fmt: skip
    # Not every step has every task.
    return entry | ({"loss/edit": 0.9 / step} if step % 3 == 0 else {})


def reinforced(step: int) -> dict[str, object]:
    return {
        "reward/ocr/mean": 0.5, "reward/ocr/std": 0.1, "reward/ocr@posters/mean": 0.6, "reward/clip/mean": 3.0,
        "rl/kl": 1e-3, "rl/clip_share": 0.1, "rl/advantage_histogram": [1, 2, 3, 4], "grad_norm": 1.0,
        "learning_rate": 1e-5, "something/new": 5.0, "skipped": step > 3,
    }  # fmt: skip


def write_run(folder: Path, entry=supervised, count: int = STEPS) -> Path:
    folder.mkdir()
    with LineWriter(folder / "metrics.jsonl") as lines:
        for step in range(1, count + 1):
            lines.write({"step": step, "time": 0.0, **entry(step)})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "pretrain")


def test_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'curves.png'}\n"
    with Image.open(run / "curves.png") as picture:
        assert picture.width > 1500
    out = tmp_path / "new" / "loss.svg"
    assert main(["plot", str(run), "--out", str(out), "--metrics", "loss, grad_norm/bridge", "--smooth", "5"]) == 0
    assert out.read_text().startswith("<?xml")


def test_panels_are_what_was_logged(run: Path):
    curves = read_curves(run)
    panels = {panel.key: panel.names for panel in choose_panels([curves])}
    assert panels["loss"] == ("loss", "loss/t2i", "loss/edit")
    assert panels["grad_norm"] == ("grad_norm", "grad_norm/bridge")
    # Without a finite number, and without any skipped step, there is nothing to see.
    assert not {"mfu", "skipped"} & set(panels)
    assert list(panels) == [
        "loss", "loss_by_sigma", "grad_norm", "learning_rate", "samples_per_second", "seconds", "data_wait",
    ]  # fmt: skip
    assert curves.values[DATA_WAIT] == pytest.approx(np.full(STEPS, 25.0))
    assert curves.values["loss_by_sigma"].shape == (STEPS, 3)
    assert np.isnan(curves.values["loss_by_sigma"][:, 1]).all()
    assert np.isfinite(curves.values["loss/edit"]).sum() == STEPS // 3
    chosen = choose_panels([curves], ["loss", "grad_norm/bridge"])
    assert [panel.names for panel in chosen] == [("loss", "loss/t2i", "loss/edit"), ("grad_norm/bridge",)]


def test_panels_of_reinforcement_learning(tmp_path: Path):
    panels = choose_panels([read_curves(write_run(tmp_path / "rl", reinforced))])
    assert [panel.key for panel in panels] == [
        "reward/ocr", "reward/clip", "rl/kl", "rl/clip_share", "rl/advantage_histogram", "grad_norm", "learning_rate",
        "skipped", "something",
    ]  # fmt: skip
    assert [series_label(panels[0], name) for name in panels[0].names] == ["all", "all std", "posters"]
    assert panels[4].is_list
    assert panels[-1].look.title == "Something"


def test_what_is_drawn(run: Path, tmp_path: Path):
    other = write_run(tmp_path / "other", reinforced, 7)
    alone = [read_curves(run)]
    figure = draw(alone, choose_panels(alone, ["loss", "loss_by_sigma"]))
    loss, heat_map, bar = figure.axes
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["all", "t2i", "edit"]
    assert (loss.get_title("left"), loss.get_xlabel(), loss.get_ylabel()) == ("Loss", "step", "loss")
    assert loss.get_xlim() == (1, STEPS)
    (mesh,) = heat_map.collections
    assert mesh.get_array().shape == (3, STEPS)
    assert bar.get_ylabel() == "loss"
    both = [*alone, read_curves(other)]
    figure = draw(both, choose_panels(both))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["pretrain", "other"]
    titles = [axes.get_title("left") for axes in figure.axes]
    assert {"Loss", "Loss by noise level, last 20% of steps", "Reward: ocr", "Skipped steps"} <= set(titles)


def test_runs_over_each_other(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "b").mkdir()
    same_name = write_run(tmp_path / "b" / "pretrain", count=1)
    assert main(["plot", str(run), str(same_name), "--out", str(tmp_path / "both.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both.png'}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no run; name the folder of one"),
        (["{tmp}/nothing"], "nothing is no run, there is no such folder"),
        (["{tmp}/empty"], "empty has no metrics yet"),
        (["{tmp}/pretrain", "--metrics", "lss"], "no run has the metric 'lss'; did you mean loss? known: loss, "),
        (
            ["{tmp}/pretrain", "--metrics", "grad_norm/brige"],
            "no run has the metric 'grad_norm/brige'; did you mean grad_norm/bridge? known: grad_norm, ",
        ),
        (["{tmp}/pretrain", "--out", "x.gif"], "x.gif has the suffix '.gif'; use one of .png, .pdf, .svg"),
        (["{tmp}/pretrain", "--out", "{tmp}/pretrain/metrics.jsonl/x.png"], "x.png cannot be written"),
        (["{tmp}/pretrain", "--smooth", "0"], "the moving average takes 0 entries; use 1 or more"),
    ],
)
def test_what_is_refused(words: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "empty").mkdir()
    assert main(["plot", *(word.format(tmp=tmp_path) for word in words)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_matplotlib_is_missing(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["plot", str(run)]) == 2
    assert "drawing curves needs matplotlib; pip install 'deepgen-jax[log]'" in capsys.readouterr().err


def test_jax_is_not_loaded(run: Path):
    code = "import sys; import deepgen_jax.cli.plot; assert not {'jax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(arrays(float, st.integers(1, 30), elements=st.floats(-1e3, 1e3) | st.just(np.nan)), st.integers(1, 40))
def test_moving_average(values: np.ndarray, window: int):
    got = smoothed(values, window)
    for i, mean in enumerate(got):
        part = values[max(i - (window - 1) // 2, 0) : i + window // 2 + 1]
        want = part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan
        assert mean == pytest.approx(want, abs=1e-9, nan_ok=True)


def test_means_over_steps():
    steps = np.array([1, 2, 3, 4, 50, 100])
    values = np.array([[1.0, np.nan], [3.0, 2.0], [5.0, np.nan], [7.0, np.nan], [np.nan, np.nan], [9.0, 1.0]])
    edges, means = over_steps(steps, values, 4)
    np.testing.assert_allclose(edges, [0.5, 25.5, 50.5, 75.5, 100.5])
    np.testing.assert_allclose(means, [[4, 2], [np.nan, np.nan], [np.nan, np.nan], [9, 1]])
