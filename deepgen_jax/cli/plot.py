"""``deepgen plot``: the curves of runs as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from deepgen_jax.training.plot import plot_runs


@dataclass(frozen=True)
class PlotCommand:
    """Draws the curves of runs, finished or still running."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
    """Folders of runs; several are drawn over each other."""
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: curves.png in the first RUN)")] = None
    """Picture file (.png, .pdf, .svg)."""
    metrics: Annotated[str | None, arg(metavar="NAMES", help_behavior_hint="(default: all)")] = None
    """What to show, such as loss,grad_norm/bridge; a name includes all that begin with it and a slash."""
    smooth: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: a fiftieth of the run)")] = None
    """Logged steps in the moving average; 1 for none."""

    def run(self) -> int:
        """Draws and prints the file's path; returns the exit status."""
        metrics = [name.strip() for name in (self.metrics or "").split(",") if name.strip()]
        print(plot_runs(self.runs, self.out, metrics, self.smooth))
        return 0
