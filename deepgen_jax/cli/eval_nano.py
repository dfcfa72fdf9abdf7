"""``deepgen eval nano``: how often held-out prompts of the procedural world come out right."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from deepgen_jax.cli.eval import EvalCommand
from deepgen_jax.cli.processes import ProcessOptions
from deepgen_jax.cli.sampling import open_model
from deepgen_jax.data.transforms import UNIT
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.run import RunFolder
from deepgen_jax.evaluation.scoring import score_exactly, write_scores
from deepgen_jax.local_paths import LocalPath
from deepgen_jax.stores.model_folder import NANO, locate

if TYPE_CHECKING:
    from deepgen_jax.nano.benchmark import ImageSource
    from deepgen_jax.nano.samples import Sample


@dataclass(frozen=True)
class NanoArguments:
    """Positional arguments; a base class, so that options follow them in the help."""

    model: Annotated[Positional[Path | None], arg(metavar="MODEL", help_behavior_hint="")] = None
    """Model folder, or nano for the one in the package; not needed with --renders."""


@dataclass(frozen=True)
class NanoCommand(NanoArguments):
    """Prints how often held-out prompts and edits of the procedural world come out right, by skill."""

    prompts: int = 100
    """Prompts of each skill."""
    skills: Annotated[str, arg(help_behavior_hint="(default: all)")] = ""
    """Only these skills, such as single,recolour."""
    renders: Annotated[Literal["right", "wrong"] | None, arg(help_behavior_hint="")] = None
    """Score pictures drawn from the ground truth, or ones that are wrong in one thing, to try the scorers."""
    size: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="")] = None
    """Side of the pictures, a multiple of 32; by default what the model is for, and 96 for --renders."""
    seed: int = 0
    """Seed of prompts and noise."""
    steps: int = 20
    """Denoising steps."""
    guidance: Annotated[float | None, arg(help_behavior_hint="")] = None
    """Classifier-free guidance scale; by default the model's."""
    batch_size: int = 16
    """Pictures made at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and computation."""
    compilation_cache: Annotated[LocalPath | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where compiled programs are kept, or off; by default $DEEPGEN_CACHE_DIR or ~/.cache/deepgen-jax/xla."""
    json: bool = False
    """Print one JSON object instead."""

    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: nothing is kept)")] = None
    """Keep the pictures, resumable, and their scores for `deepgen report`."""
    mesh: Annotated[str | None, arg(metavar="AXES", help_behavior_hint="(default: auto)")] = None
    """Split the work over devices, such as data=8."""
    processes: Annotated[ProcessOptions, OmitArgPrefixes] = field(default_factory=ProcessOptions)

    def run(self) -> int:
        """Prints; returns the exit status."""
        from deepgen_jax.nano.world.truth import SKILLS

        skills = tuple(name.strip() for name in self.skills.split(",") if name.strip()) or SKILLS
        if unknown := [name for name in skills if name not in SKILLS]:
            raise DeepGenError(f"--skills has {unknown[0]!r}; use {', '.join(SKILLS)}")
        for name, least in (("prompts", 1), ("steps", 1), ("batch_size", 1), ("seed", 0), ("guidance", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise DeepGenError(f"--{name.replace('_', '-')} is {value}; use {least} or more")
        if (self.model is None) == (self.renders is None):
            raise DeepGenError("give either a MODEL or --renders")
        if self.size is not None and (self.size < UNIT or self.size % UNIT):
            raise DeepGenError(f"--size is {self.size}; use a multiple of {UNIT}")
        if self.renders is not None:
            return self._score_renders(skills)
        if self.out is not None:
            return self._evaluate(skills, self.out)
        if self.processes != ProcessOptions():
            raise DeepGenError("several processes share a folder; name it with --out")
        with tempfile.TemporaryDirectory() as folder:
            return self._evaluate(skills, Path(folder))

    def _score_renders(self, skills: Sequence[str]) -> int:
        from deepgen_jax.nano import benchmark

        assert self.renders is not None
        size = self.size or benchmark.NanoBenchmark.side
        samples = benchmark.held_out_samples(self.prompts, self.seed, skills)
        self._print(samples, benchmark.renders(self.renders, size), f"{self.renders} renders", size, None)
        return 0

    def _evaluate(self, skills: Sequence[str], out: Path) -> int:
        """Makes a model's pictures in a folder, and scores them."""
        from deepgen_jax.nano import benchmark

        config, _ = open_model(locate(self.model))
        size, guidance = self.size or config.default_side, config.guidance(self.guidance)
        world = benchmark.NanoBenchmark(self.prompts, self.seed, skills, size)
        command = EvalCommand(
            NANO, None if self.model is None else str(self.model), out=out, steps=self.steps, guidance=guidance,
            size=size, seed=self.seed, batch_size=self.batch_size, dtype=self.dtype, mesh=self.mesh,
            compilation_cache=self.compilation_cache, processes=self.processes,
        )  # fmt: skip
        # The table, or one JSON object, is all that goes to stdout.
        with contextlib.redirect_stdout(sys.stderr):
            status = command.make(world)
        folder = RunFolder(out)
        if status != 0:
            return status or 0
        items = folder.items()
        samples = benchmark.held_out_samples(self.prompts, self.seed, skills)
        self._print(samples, benchmark.saved(items, out), str(self.model), size, guidance)
        if self.out is not None:
            write_scores(folder, score_exactly(world, items, out))
        return 0

    def _print(
        self, samples: Sequence[Sample], make: ImageSource, model: str, size: int, guidance: float | None
    ) -> None:
        from deepgen_jax.nano import benchmark
        from deepgen_jax.nano.reward import WorldReward

        rows = benchmark.evaluate(samples, make, WorldReward(workers=1).read)
        if not self.json:
            print("\n".join(benchmark.lines(rows)))
            return
        settings = {
            "model": model, "prompts": self.prompts, "seed": self.seed, "size": size, "steps": self.steps,
            "guidance": guidance,
        }  # fmt: skip
        print(json.dumps({**settings, "rows": [row.to_json() for row in rows]}, indent=2))
