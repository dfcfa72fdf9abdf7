"""Shared fixtures: the tiny checkpoints under ``tests/data`` and their golden arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Tiny checkpoints in every released layout, and ``GOLDENS.md`` that says what each is."""
    return DATA


@pytest.fixture(scope="session")
def cases() -> dict[str, Any]:
    """Prompts, judge answers, OCR lines and size tables that go with the golden arrays."""
    return json.loads((DATA / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def goldens() -> Callable[[str], dict[str, np.ndarray]]:
    """``goldens("dit")`` -> arrays of ``goldens_dit.npz`` by name."""
    loaded: dict[str, dict[str, np.ndarray]] = {}

    def load(part: str) -> dict[str, np.ndarray]:
        if part not in loaded:
            with np.load(DATA / f"goldens_{part}.npz") as arrays:
                loaded[part] = dict(arrays)
        return loaded[part]

    return load


@pytest.fixture(scope="session")
def tolerance() -> Callable[[str, str], float]:
    """``tolerance("dit", "noref/base/velocity/0")`` -> its absolute tolerance in ``GOLDENS.md`` (0 for exact)."""
    table: dict[tuple[str, str], float] = {}
    part = ""
    for line in (DATA / "GOLDENS.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## goldens_"):
            part = line.removeprefix("## goldens_").removesuffix(".npz")
        cells = [cell.strip() for cell in line.split("|")]
        if part and len(cells) >= 6 and cells[1] not in ("name", "---"):
            table[part, cells[1]] = float(cells[4]) if cells[4] else 0.0

    return lambda golden_part, name: table[golden_part, name]
