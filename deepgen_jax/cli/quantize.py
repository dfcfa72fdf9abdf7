"""``deepgen quantize``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class QuantizeCommand:
    """Write a model folder whose large layers have 8-bit weights, for inference.

    Adapters kept apart are merged. The folder appears when everything is written, or not at all.
    """

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Model folder, or nano."""
    to: Literal["int8", "fp8"]
    """Type of the weights."""
    out: Path
    """Model folder to write."""
    products: bool = False
    """Compute matrix products in 8 bits, too."""
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> int:
        """Quantises and prints the sizes; returns the exit status."""
        # Nothing here computes on an accelerator, so none is taken.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from deepgen_jax.convert import quantize

        print(quantize(self.model, self.to, self.out, products=self.products, overwrite=self.overwrite))
        return 0
