"""The table of skills."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from deepgen_jax.cli.main import main
from deepgen_jax.evaluation.intervals import wilson
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


def test_a_model_that_does_what_is_asked_and_one_that_leaves_pictures_alone():
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
    # What was left alone is told of each kind of edit, and of edits only.
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
def test_bad_options_are_told(words, message, capsys):
    assert main(["eval", "nano", *words]) == 2
    assert message in capsys.readouterr().err
