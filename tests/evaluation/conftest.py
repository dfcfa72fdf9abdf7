"""A command line without a model."""

from __future__ import annotations

import pytest
from support.fake_pipeline import FakePipeline, check_prompt

from deepgen_jax.cli import eval as eval_command
from deepgen_jax.cli import image_run
from deepgen_jax.config import DeepGenConfig


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    """The command's pipeline; the model folder need not exist."""
    fake = FakePipeline()
    monkeypatch.setattr(image_run, "load_pipeline", lambda *args: fake)
    monkeypatch.setattr(eval_command, "open_model", lambda folder: (DeepGenConfig(), check_prompt))
    return fake
