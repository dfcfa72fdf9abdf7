"""Tables of estimated images are those of their data, and reports of `deepgen compile` become rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "inference_estimates", Path(__file__).parents[2] / "benchmarks" / "inference_estimates.py"
)
estimates = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(estimates)


def data():
    return estimates.json.loads(estimates.DATA.read_text(encoding="utf-8"))


def test_the_page_shows_its_data():
    page = estimates.PAGE.read_text(encoding="utf-8")
    assert estimates.page_with(page, data()) == page, "run python benchmarks/inference_estimates.py"


def test_rows_are_whole():
    rows = data()
    assert len({row["command"] for row in rows}) == len(rows)
    known = {estimates.command(image.words(program)) for image in estimates.images() for program in estimates._PROGRAMS}
    known |= {estimates.command(words) for words in estimates.copied()}
    for row in rows:
        assert row["command"] in known
        assert row["seconds"] > 0
        assert row["hbm_gb"] >= row["copies_gb"] >= 0
        assert row["tflop"] >= row["tflop_8_bit"]
        assert (row["tflop_8_bit"] > 0) == ("--products" in row["command"])


def test_a_report_becomes_a_row():
    words = ("sft", "--topology", "h100:1", "--program", "inference", "--batch", "8")
    gib = 2**30
    report = {
        "memory": {"frozen weights": 12 * gib, "batch": gib / 2, "total": 13 * gib, "limit": 75.25 * gib},
        "estimate": {"seconds": 0.1234567, "operations": 2e12, "eight_bit": 1e12, "memory": 3e9, "moved": 1e9},
    }
    row = estimates.row_of(words, report)
    assert row.pop("compiled")
    assert row == {
        "command": "deepgen compile sft --topology h100:1 --program inference --batch 8", "weights_gib": 12.0,
        "work_gib": 1.0, "limit_gib": 75.2, "seconds": 0.12346, "tflop": 2.0, "tflop_8_bit": 1.0, "hbm_gb": 3.0,
        "copies_gb": 1.0,
    }  # fmt: skip


def test_an_image_takes_its_three_programs():
    image = next(image for image in estimates.images() if image.batch == 8)
    rows = [
        {"command": estimates.command(image.words(program)), "weights_gib": 10.0, "work_gib": work, "limit_gib": 75.2,
         "seconds": seconds}
        for program, work, seconds in (("prompts", 0.5, 0.008), ("inference", 0.25, 0.08), ("decoder", 2.0, 0.04))
    ]  # fmt: skip
    (line,) = [line for line in estimates.image_table(rows).splitlines()[2:] if "not compiled" not in line]
    assert line == "| H100 | bfloat16 | 8 | 4 | 12.0 of 75.2 | 0.008 | 0.080 | 0.040 | 0.016 |"
    partial = estimates.image_table(rows[:2]).splitlines()
    assert "| H100 | bfloat16 | 8 | 4 | 10.5 of 75.2 | 0.008 | 0.080 | not compiled |  |" in partial


@pytest.mark.parametrize("topology", ["h100:1", "v6e:1x1", "v5e:1x1"])
def test_commands_are_of_existing_options(topology):
    """Every command is parsed by `deepgen`, up to the compiler."""
    import tyro

    from deepgen_jax.cli.compile import CompileCommand

    for image in estimates.images():
        if image.topology == topology:
            for program in estimates._PROGRAMS:
                words = image.words(program)
                parsed = tyro.cli(CompileCommand, args=list(words))
                assert (parsed.program, parsed.topology, parsed.batch) == (program, topology, image.batch)
