"""The table of skills."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from deepgen_jax.cli import eval as eval_command
from deepgen_jax.cli import eval_nano, image_run
from deepgen_jax.cli.main import main
from deepgen_jax.config import DeepGenConfig
from deepgen_jax.evaluation.intervals import wilson
from deepgen_jax.evaluation.run import RunFolder
from deepgen_jax.evaluation.scoring import read_scores
from deepgen_jax.nano.benchmark import PRESERVATION, WHOLE, evaluate, generated, held_out_samples, lines, renders
from deepgen_jax.nano.samples import render
from deepgen_jax.nano.world.truth import EDIT_SKILLS, SKILLS

#: Skills whose pictures hold no words, which take half a second each to read.
QUICK = [skill for skill in SKILLS if skill not in ("text", "replace_word")]


def nothing(sign: np.ndarray) -> list[str]:
    return []


class Oracle:
    """A pipeline that knows every prompt; it draws what is asked for, or gives the first reference back."""

    def __init__(self, samples, *, idle=False):
        self.scenes = {(sample.text, len(sample.references)): sample.scene for sample in samples}
        self.idle, self.batches = idle, []

    def __call__(self, prompts, image, height, width, seed, **settings):
        assert settings["padding"] == "masked"
        self.batches.append((len(prompts), 0 if image is None else len(image[0]), tuple(seed)))
        references = image or [[]] * len(prompts)
        found = [
            refs[0] if self.idle and refs else render(self.scenes[text, len(refs)], height)
            for text, refs in zip(prompts, references, strict=True)
        ]
        return SimpleNamespace(images=found)


def test_a_perfect_model_and_one_that_returns_its_input():
    samples = held_out_samples(3, 0, QUICK)
    oracle = Oracle(samples)
    settings = {"steps": 2, "guidance": 1.0, "seed": 5, "batch_size": 4}
    rows = {row.skill: row for row in evaluate(samples, generated(oracle, 96, **settings), nothing)}
    assert [(row.right, row.count) for row in rows.values()] == [(3, 3)] * len(QUICK) + [(18, 18)] * 2
    # Batches are whole and of one number of references; a sample's seed is that of its place.
    assert {count for count, _, _ in oracle.batches} == {4}
    assert [references for _, references, _ in oracle.batches] == [0] * 4 + [1] * 4 + [2]
    assert oracle.batches[0][2] == (5, 6, 7, 8)
    idle = evaluate(samples, generated(Oracle(samples, idle=True), 96, **settings), nothing)
    shares = {row.skill: row.right / row.count for row in idle}
    assert all(shares[skill] == 0 for skill in EDIT_SKILLS if skill in QUICK)
    assert shares[PRESERVATION] == shares["single"] == 1
    assert shares[WHOLE] == 0
    # Preservation is reported for each kind of edit, and only for edits.
    assert {row.skill: row.kept for row in idle if row.kept is not None} == {
        skill: 3 for skill in EDIT_SKILLS if skill in QUICK
    }


def test_right_and_wrong_renders():
    samples = held_out_samples(4, 1, QUICK)
    for kind, share in (("right", 1), ("wrong", 0)):
        rows = evaluate(samples, renders(kind, 96), nothing)
        assert [row.skill for row in rows] == [*QUICK, PRESERVATION, WHOLE]
        assert all(row.right == share * row.count for row in rows)


@pytest.mark.parametrize(
    ("right", "count", "interval"),
    [(0, 10, (0, 0.2775)), (10, 10, (0.7225, 1)), (95, 100, (0.8882, 0.9785)), (50, 100, (0.4038, 0.5962))],
)
def test_wilson_intervals(right, count, interval):
    np.testing.assert_allclose(wilson(right, count), interval, atol=1e-4)


def test_the_command_prints_a_table_or_json(capsys):
    words = ["eval", "nano", "--renders", "right", "--prompts", "2", "--skills", "single,remove"]
    assert main(words) == 0
    out = capsys.readouterr().out
    all_of_two = ["100.0%", "34.2%", "to", "100.0%"]
    assert out.splitlines()[1].split() == ["single", *all_of_two, "2"]
    assert out.splitlines()[3].split() == ["remove", *all_of_two, "2", *all_of_two]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["skill"] for row in facts["rows"]] == ["single", "remove", "preservation", "done_and_kept"]
    whole = {"right": 2, "count": 2, "share": 1.0, "low": 0.3424, "high": 1.0}
    assert facts["rows"][0] == {"skill": "single", **whole}
    kept = {"kept": 2, "kept_share": 1.0, "kept_low": 0.3424, "kept_high": 1.0}
    assert facts["rows"][1] == {"skill": "remove", **whole, **kept}


def test_a_kept_run_is_one_of_the_benchmarks(tmp_path, monkeypatch, capsys):
    """The same machinery: a folder that resumes, scores and reports."""
    skills = ["single", "recolour", "reference"]
    oracle = Oracle(held_out_samples(3, 4, skills))
    config = dataclasses.replace(DeepGenConfig(), guidance_scale=1.0, image_size=96)
    for module in (eval_command, eval_nano):
        monkeypatch.setattr(module, "open_model", lambda folder: (config, lambda text, sizes: None))
    monkeypatch.setattr(image_run, "load_pipeline", lambda *args: oracle)
    out = tmp_path / "run"
    words = ["eval", "nano", str(tmp_path / "model"), "--prompts", "3", "--skills", ",".join(skills), "--seed", "4"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [(row["skill"], row["right"]) for row in facts["rows"]] == [
        ("single", 3), ("recolour", 3), ("reference", 3), ("preservation", 6), ("done_and_kept", 6)]  # fmt: skip
    assert facts["guidance"] == 1.0
    pictures = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert {f"{skill}/0000{i}.png" for skill in skills for i in range(3)} < pictures
    scores = read_scores(RunFolder(out))
    assert scores.judge == "exact"
    assert {figure.name: figure.value for figure in scores.figures} == {
        "all skills": 1, "single": 1, "recolour": 1, "reference": 1, "recolour, rest kept": 1,
        "reference, rest kept": 1, "preservation": 1, "done_and_kept": 1,
    }  # fmt: skip
    # A sample's noise is that of its place in the table, and a second run makes what is missing alone.
    assert [seeds for _, _, seeds in oracle.batches] == [(4, 5, 6), (7, 8, 9), (10, 11, 12)]
    (out / "recolour/00001.png").unlink()
    assert main([*words, "--out", str(out)]) == 0
    assert oracle.batches[3:] == [(3, 1, (8, 8, 8))]
    assert main(["eval", "score", str(out)]) == 0
    assert main(["report", str(out), "--out", str(tmp_path / "r.html")]) == 0
    assert "Procedural world" in (tmp_path / "r.html").read_text()


def test_the_table_names_every_row():
    rows = evaluate(held_out_samples(1, 0, QUICK), renders("right", 64), nothing)
    text = "\n".join(lines(rows))
    assert all(row.skill in text for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either a MODEL or --renders"),
        (["model", "--renders", "right"], "either a MODEL or --renders"),
        (["--renders", "right", "--skills", "singles"], "'singles'"),
        (["--renders", "right", "--prompts", "0"], "--prompts is 0"),
        (["--renders", "right", "--size", "50"], "--size is 50"),
        (["nowhere"], "nowhere is not a folder"),
    ],
)
def test_reports_bad_options(words, message, capsys):
    assert main(["eval", "nano", *words]) == 2
    assert message in capsys.readouterr().err
