"""``deepgen export``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class ExportCommand:
    """Export a model folder, or the model of a training run, to a different format.

    Of a run, the newest checkpoint is taken over the model folder that it began with. What is written appears when
    everything is written, or not at all.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Model folder, folder of a training run, or nano."""
    format: Literal["model", "diffusers", "pth"]
    """A model folder (from a run), the folders of the release (adapters are merged), or one checkpoint of everything
    (a model folder's adapters stay apart)."""
    out: Path
    """Folder or file to write."""
    step: int | None = None
    """Of a run: step of the checkpoint, instead of the newest."""
    ema: bool = False
    """Of a run: take the moving average of what it trained."""
    keep_lora: bool = False
    """Of a run: keep LoRA adapters apart instead of merging them."""
    model: Path | None = None
    """Of a run: the model folder that it started from, if that has moved."""
    start: Path | None = None
    """Of a run: the run that it continued, if that has moved."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of all weights; by default each keeps the one it is stored in, and merged ones are float32."""
    max_shard_size: str = "5GB"
    """Largest size of one safetensors file, such as 5GB or 500MB."""
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> int:
        """Exports; returns the exit status."""
        # Nothing here computes on an accelerator, so none is taken.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from deepgen_jax.convert import export

        path = export(
            self.folder, self.format, self.out, step=self.step, ema=self.ema, keep_lora=self.keep_lora,
            model=self.model, start=self.start, dtype=self.dtype, max_shard_size=self.max_shard_size,
            overwrite=self.overwrite,
        )  # fmt: skip
        print(f"wrote {path}")
        return 0
