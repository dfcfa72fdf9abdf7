"""``deepgen export``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class ExportCommand:
    """Write a model folder back into a released layout."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Model folder."""
    format: Literal["diffusers", "pth"]
    """The folders of the release (adapters are merged), or one checkpoint of everything (kept adapters stay apart)."""
    out: Path
    """Folder or file to write."""
    max_shard_size: str = "5GB"
    """Largest size of one safetensors file, such as 5GB or 500MB."""
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> int:
        """Exports; returns the exit status."""
        # Nothing here computes on an accelerator, so none is taken.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from deepgen_jax.convert import export

        path = export(self.folder, self.format, self.out, max_shard_size=self.max_shard_size, overwrite=self.overwrite)
        print(f"wrote {path}")
        return 0
