"""``deepgen nano``: the small model for the procedural world."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from deepgen_jax.errors import DeepGenError


@dataclass(frozen=True)
class InitCommand:
    """Writes the model folder of DeepGen-nano with random weights and its tokenizer, for configs/nano to train."""

    out: Path = Path("out/nano/model")
    """Folder to write."""
    seed: int = 0
    """Of the weights."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def run(self) -> int:
        """Writes; returns the exit status."""
        if self.seed < 0:
            raise DeepGenError(f"--seed is {self.seed}; use 0 or more")
        # Nothing here computes on an accelerator, so none is taken.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from deepgen_jax.nano import write_untrained

        write_untrained(self.out, seed=self.seed, overwrite=self.overwrite)
        print(f"wrote {self.out}; its weights are random, train it with deepgen train nano/vae")
        return 0
