"""docs/extending.md works as written: its files add a reward, a source, a sampler and a benchmark from outside."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepgen_jax.cli.main import main
from deepgen_jax.rewards.base import RewardSample
from deepgen_jax.rewards.registry import RewardConfig, make

DOC = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the page's files, as a reader would save them."""
    for language, text in BLOCKS:
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", text)[1]
            (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(beginning: str) -> list[str]:
    """The words of the page's command that begins so, without "deepgen"."""
    shell = "".join(text for language, text in BLOCKS if language == "sh").replace("\\\n", " ")
    lines = shell.splitlines()
    return shlex.split(next(line for line in lines if line.startswith(f"deepgen {beginning}")))[1:]


def test_the_page_has_a_file_and_a_command_for_each():
    assert [language for language, _ in BLOCKS] == ["python", "sh"] * 4 + ["toml"]


def test_a_reward(folder):
    (setting, option) = command("train tiny_grpo")[2:]
    kind = setting.partition("=")[2]
    strength = float(option.rpartition("=")[2])
    reward = make(RewardConfig("warmth", kind=kind, options={"strength": strength}))
    red, blue = (np.full((4, 4, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 51)))
    scores = asyncio.run(reward.score([RewardSample(red, "x"), RewardSample(blue, "y")]))
    np.testing.assert_allclose(scores.values, [2.0, -0.4], rtol=1e-6)


def test_a_data_source(folder, capsys):
    (folder / "captions").mkdir()
    (folder / "captions" / "list.txt").write_text("a red square\na blue square\nlost\n", encoding="utf-8")
    for number, colour in ((1, "red"), (2, "blue")):
        Image.new("RGB", (96, 96), colour).save(folder / "captions" / f"{number}.png")
    words = command("data inspect")
    assert main(words) == 2
    assert "1 missing picture; such as captions/list.txt, line 3" in capsys.readouterr().err
    assert main([*words, "data.max_bad_share=0.5", "--seconds", "0.1"]) == 0
    assert "missing picture" in capsys.readouterr().out


def test_a_sampler(folder):
    assert main([*command("generate"), "--steps", "2", "--size", "32"]) == 0
    assert Image.open(folder / "circle.png").size == (32, 32)


def test_a_benchmark(folder, capsys):
    (folder / "prompts.txt").write_text("a red circle\na blue circle\n", encoding="utf-8")
    assert main([*command("eval redness"), "--size", "32", "--steps", "1"]) == 0
    assert main(command("eval score")) == 0
    assert "redness" in capsys.readouterr().out
    assert {path.name for path in (folder / "out" / "redness").glob("*.png")} == {"0000.png", "0001.png"}


def test_entry_points_name_what_the_registries_read():
    from deepgen_jax.data.source_kinds import SOURCE_KINDS
    from deepgen_jax.evaluation.benchmark_kinds import BENCHMARKS
    from deepgen_jax.flow.samplers import SAMPLERS
    from deepgen_jax.rewards.registry import REWARD_KINDS

    groups = set(re.findall(r'entry-points\."([\w.]+)"', BLOCKS[-1][1]))
    assert groups == {registry.group for registry in (SOURCE_KINDS, BENCHMARKS, SAMPLERS, REWARD_KINDS)}


def test_a_program_registers_a_class(folder):
    from deepgen_jax.flow import samplers
    from deepgen_jax.registry import load_object

    midpoint = load_object("midpoint.py:Midpoint", "test")
    samplers.SAMPLERS.register("midpoint_of_a_test", midpoint)
    sigmas = np.linspace(1, 0, 9, dtype=np.float32)
    # v = x has the solution x(0) = x(1) / e; the midpoint rule is off by O(h^2).
    end = samplers.sample("midpoint_of_a_test", lambda x, sigma: x, np.ones((1, 1), np.float32), sigmas)
    assert float(end[0, 0]) == pytest.approx(np.exp(-1), abs=2e-3)
    assert json.dumps(sorted(samplers.SAMPLERS.names())).count("midpoint_of_a_test") == 1
