"""Fuzzed commands end with a result or one clear line, in time and memory; see `harness`.

The corpora are generated. `.ci/run` gives them 60 seconds of a new seed each day; by hand they run for hours:

    python -m tests.fuzz --seconds 3600 --seed mine
    python -m tests.fuzz --again safetensors mine/17
"""

from __future__ import annotations

import datetime
import os

import pytest

from .harness import Case, run_for, verdict

ANSWER = {"status": 2, "stderr": "deepgen: error: x is missing; give it\n", "seconds": 0.1, "peak_mib": 300.0}


@pytest.mark.xdist_group("fuzz")
def test_no_input_breaks_a_command(tmp_path):
    seconds = float(os.environ.get("DEEPGEN_FUZZ_SECONDS", "60"))
    seed = os.environ.get("DEEPGEN_FUZZ_SEED", str(datetime.date.today()))
    count, faults = run_for(seconds, seed, tmp_path)
    assert not faults, f"{len(faults)} of {count} cases:\n" + "\n".join(faults)
    assert count >= 9


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"status": -9}, "status -9"),
        ({"status": 0}, "status 0"),
        ({"stderr": "deepgen: error: KeyError: 'x' (a bug? --debug shows the traceback)\n"}, "a bug"),
        ({"stderr": "Traceback (most recent call last):\n"}, "Traceback"),
        ({"stderr": ""}, "0 lines of errors"),
        ({"stderr": f"deepgen: error: {'x' * 2000}\n"}, "2016 characters"),
        ({"seconds": 61.0}, "took 61 s"),
        ({"peak_mib": 3000.0}, "took 3000 MiB"),
    ],
)
def test_each_rule_can_fail(change, fault):
    case = Case(["generate"], (2,))
    assert verdict(case, ANSWER) is None
    assert fault in verdict(case, ANSWER | change)


def test_a_wrong_result_is_a_fault():
    def wrong() -> None:
        raise AssertionError("weights differ")

    assert "weights differ" in verdict(Case([], (0,), wrong), ANSWER | {"status": 0, "stderr": ""})
