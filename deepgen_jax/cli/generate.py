"""``deepgen generate``: images from text."""

from __future__ import annotations

from dataclasses import dataclass

from deepgen_jax.cli.sampling import SamplingCommand


@dataclass
class GenerateCommand(SamplingCommand):
    """Makes images from text."""
