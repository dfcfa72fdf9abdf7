"""`benchmarks/full_size.py` on the tiny model: every part is compared, and the comparison can fail."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "full_size.py"


@pytest.fixture(scope="module")
def full_size():
    spec = importlib.util.spec_from_file_location("full_size", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_differences_are_relative_to_the_peers_values(full_size):
    found = full_size.compare(np.array([1.0, -8.0, 3.0]), np.array([1.0, -8.0, 4.0]))
    assert found["max"] == pytest.approx(1 / 8)
    assert found["rms"] == pytest.approx((1 / 81) ** 0.5)
    with pytest.raises(ValueError, match="shapes differ"):
        full_size.compare(np.zeros(3), np.zeros((3, 1)))


@pytest.mark.slow
def test_every_part_of_the_tiny_model_equals_pytorch(full_size, tmp_path):
    command = [sys.executable, str(SCRIPT), "--work", str(tmp_path / "work"), "--size", "tiny", "--delete"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    results = json.loads(done.stdout.splitlines()[-1])
    assert sorted(results) == sorted(full_size.PARTS)
    assert not (tmp_path / "work").exists()
    for part, result in results.items():
        for name, difference in result["outputs"].items():
            assert difference["max"] < 2e-5, (part, name)
            assert difference["largest_value"] > 1e-3, (part, name)
