"""The report on how nano was trained, from made-up runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from deepgen_jax.cli.main import main
from deepgen_jax.nano.training_report import BEGIN, END, stages
from deepgen_jax.settings import apply, to_json
from deepgen_jax.stores.jsonl import LineWriter
from deepgen_jax.stores.run_folder import RUN_FORMAT, RUN_VERSION
from deepgen_jax.training.config_files import load_config

PAGE = f"# Nano\n\nbefore\n\n{BEGIN}\nan old report\n{END}\n\nafter\n"


def write_run(folder: Path, name: str, words: list[str], entry, *, devices: list[str] | None = None, every: int = 1):
    """A run of a configuration with changes, all its steps logged."""
    config = apply(load_config(name), words)
    folder.mkdir(parents=True)
    description = {"format": RUN_FORMAT, "version": RUN_VERSION, "kind": "any", "config": to_json(config)}
    (folder / "config.json").write_text(json.dumps(description | ({"devices": devices} if devices else {})))
    with LineWriter(folder / "metrics.jsonl") as lines:
        for step in range(every, 101, every):
            lines.write({"step": step, "time": 0.0, "seconds/step": 2.0, "samples_per_second": 4.0, **entry(step)})


def scores(path: Path, share: float) -> str:
    row = {"skill": "single", "right": 0, "count": 200, "share": share, "low": share - 0.1, "high": share + 0.1}
    settings = {"model": "m", "prompts": 200, "seed": 3, "size": 96, "steps": 20, "guidance": 4.0}
    path.write_text(json.dumps({**settings, "rows": [row, {**row, "skill": f"only_{path.stem}", "kept_share": share}]}))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a page, three of the stages and two files of scores."""
    monkeypatch.chdir(tmp_path)
    Path("docs/experiments").mkdir(parents=True)
    Path("docs/experiments/nano.md").write_text(PAGE)
    runs = Path("out/nano")
    write_run(
        runs / "vae", "nano/vae", ["steps=100", "out=elsewhere", "log.every=5"], lambda step: {"loss": step / 100},
        devices=["1 x cpu", "1 x NVIDIA H100"], every=5,
    )  # fmt: skip
    words = ["steps=400", "seed=7", "optimizer.learning_rate=0.25", "lora.rank=2"]
    write_run(runs / "sft", "nano/sft", words, lambda step: {"loss": 0.5})
    rewards = {"reward/world/mean": 0.25, "reward/world@a/mean": 9.0, "reward/world/std": 8.0}
    write_run(runs / "grpo", "nano/grpo", ["steps=100"], lambda step: {"loss": 1e-3, **rewards})
    scores(Path("a.json"), 0.5)
    scores(Path("b.json"), 0.75)
    return tmp_path


def test_stages_come_after_what_they_start_from():
    names = [name for name, _ in stages()]
    assert names.index("nano/vae") < names.index("nano/language") < names.index("nano/sft") < names.index("nano/grpo")


def test_the_report(folder: Path, capsys: pytest.CaptureFixture):
    words = ["nano", "report", "--scores", "after SFT=a.json", "--scores", "after RL=b.json", "--device", "2 cores"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == ["docs/experiments/nano.md", "docs/experiments/images/nano_curves.png"]
    left_out = [line.split("; ")[1].split()[0] for line in captured.err.splitlines()]
    assert {"nano/vae_small", "nano/language", "nano/pretrain"} <= set(left_out)
    assert not {"nano/vae", "nano/sft", "nano/grpo"} & set(left_out)
    text = Path("docs/experiments/nano.md").read_text()
    assert text.startswith(f"# Nano\n\nbefore\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "an old report" not in text
    stage_rows = [line for line in text.splitlines() if line.startswith("| `nano/")]
    # One step in five was logged, so each entry counts five. The last 5% of 100 steps are 96 to 100.
    assert stage_rows == [
        "| `nano/vae` | 0 | 100 | 800 | 3 min | 1 x cpu, 1 x NVIDIA H100 | loss 1 |",
        "| `nano/sft` | 7 | 100 of 400 | 800 | 3 min | 2 cores | loss 0.5 |",
        "| `nano/grpo` | 0 | 100 | 800 | 3 min | 2 cores | loss 0.001, world 0.250 |",
    ]
    assert "`nano/sft` ran with `lora.rank=2`, `optimizer.learning_rate=0.25`." in text
    assert "`nano/vae` ran with" not in text
    assert "| skill | after SFT | after RL |" in text
    assert "| `single` | 50.0% (40.0% to 60.0%) | 75.0% (65.0% to 85.0%) |" in text
    assert "| `only_b` |  | 75.0% (65.0% to 85.0%); rest kept 75.0% |" in text
    assert "- after RL: 200 samples a skill, 20 steps of denoising, guidance 4, 96 pixels a side, seed 3" in text
    with Image.open("docs/experiments/images/nano_curves.png") as picture:
        assert min(picture.size) > 300
    # Again it says the same.
    assert main(words) == 0
    assert Path("docs/experiments/nano.md").read_text() == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scores", "a.json"], "--scores a.json is not understood; write LABEL=FILE"),
        (["--scores", "x=a.json", "--scores", "x=b.json"], "--scores has 'x' twice"),
        (["--scores", "x=none.json"], "scores none.json cannot be read"),
        (["--scores", "x=list.json"], "list.json is not what `deepgen eval nano MODEL --json` prints"),
        (["--scores", "x=renders.json"], "renders.json is not what `deepgen eval nano MODEL --json` prints"),
        (["--runs", "nowhere"], "nowhere has no run of nano's configurations"),
        (["--runs", "other"], "other/vae is not a training run"),
        (["--out", "bare.md"], "bare.md has no place for the report"),
        (["--out", "nothing.md"], "nothing.md cannot be read"),
    ],
)
def test_unusable_inputs_change_nothing(
    folder: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
):
    Path("list.json").write_text("[]")
    renders = json.loads(Path(scores(Path("renders.json"), 1.0)).read_text())
    Path("renders.json").write_text(json.dumps({**renders, "guidance": None}))
    Path("bare.md").write_text("# Nano\n")
    Path("other/vae").mkdir(parents=True)
    before = sorted(path for path in Path().rglob("*"))
    assert main(["nano", "report", *words]) == 2
    assert f"deepgen: error: {message}" in capsys.readouterr().err
    assert Path("docs/experiments/nano.md").read_text() == PAGE
    assert sorted(path for path in Path().rglob("*")) == before
