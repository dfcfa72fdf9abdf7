"""``deepgen nano``: the small model for the procedural world."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from deepgen_jax.errors import DeepGenError
from deepgen_jax.nano.model import Ablation, write_untrained


@dataclass(frozen=True)
class InitCommand:
    """Writes the model folder of DeepGen-nano with random weights and its tokenizer, for configs/nano to train."""

    out: Path = Path("out/nano/model")
    """Folder to write."""
    seed: int = 0
    """Of the weights."""
    without: Annotated[UseAppendAction[tuple[Ablation, ...]], arg(help_behavior_hint="(repeatable)")] = ()
    """Ablations: no think tokens, or only the deepest selected layer instead of stacked channels."""
    encoders: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """A trained nano ("nano" for the package's) that provides VLM, autoencoder and tokenizer; only bridge and MMDiT are
    random."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def run(self) -> int:
        """Writes; returns the exit status."""
        if self.seed < 0:
            raise DeepGenError(f"--seed is {self.seed}; use 0 or more")
        # No accelerator is needed.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        write_untrained(
            self.out, seed=self.seed, without=self.without, encoders=self.encoders, overwrite=self.overwrite
        )
        if self.encoders is None:
            print(f"wrote {self.out}; its weights are random, train it with deepgen train nano/vae_small")
        else:
            print(f"wrote {self.out}; its bridge and MMDiT are random, train them with deepgen train nano/bridge_trial")
        return 0


@dataclass(frozen=True)
class WordsCommand:
    """Lists the words of nano's training texts, for warnings about prompts with other words."""

    out: Path = Path("out/nano/model/known_words.txt")
    """File to write, in the model folder."""

    def run(self) -> int:
        """Writes and prints the path; returns the exit status."""
        from deepgen_jax.files import write_text
        from deepgen_jax.nano.known_words import training_words

        write_text(self.out, "\n".join(training_words()) + "\n")
        print(self.out)
        return 0


@dataclass(frozen=True)
class ReportCommand:
    """Writes the table of runs, their curves and the scores into the page of nano's experiments."""

    runs: Path = Path("out/nano")
    """Folder of the runs of configs/nano."""
    scores: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="LABEL=FILE")] = ()
    """Column of the table of scores: its title, and what `deepgen eval nano --json` printed."""
    device: str = ""
    """Device of runs that have not recorded theirs."""
    out: Path = Path("docs/experiments/nano.md")
    """The page, with marks for the report; the picture is written to images/nano_curves.png beside it."""

    def run(self) -> int:
        """Writes and prints the paths; returns the exit status."""
        # No accelerator is needed.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from deepgen_jax.nano.training_report import read_scores, write_report

        columns = {}
        for word in self.scores:
            label, equals, path = word.partition("=")
            if not label.strip() or not equals or not path:
                raise DeepGenError(f"--scores {word} is not understood; write LABEL=FILE")
            if label in columns:
                raise DeepGenError(f"--scores has {label!r} twice; give each its own label")
            columns[label] = read_scores(label, Path(path))
        picture = write_report(self.out, self.runs, list(columns.values()), self.device)
        print(f"{self.out}\n{picture}")
        return 0
