"""``deepgen eval nano``: how often held-out prompts of the procedural world come out right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import LocalPath

if TYPE_CHECKING:
    from deepgen_jax.nano.benchmark import Maker


@dataclass(frozen=True)
class NanoArguments:
    """The word after the command; a class of its own so that options can follow it in the help."""

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
    """Of prompts and noise."""
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

    def run(self) -> int:
        """Prints; returns the exit status."""
        from deepgen_jax.nano import benchmark
        from deepgen_jax.nano.reward import WorldReward
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
        samples = benchmark.held_out_samples(self.prompts, self.seed, skills)
        make, size, guidance = self._maker()
        rows = benchmark.evaluate(samples, make, WorldReward(workers=1).read)
        if self.json:
            settings = {
                "model": str(self.model or f"{self.renders} renders"), "prompts": self.prompts, "seed": self.seed,
                "size": size, "steps": self.steps, "guidance": guidance,
            }  # fmt: skip
            print(json.dumps({**settings, "rows": [row.facts() for row in rows]}, indent=2))
        else:
            print("\n".join(benchmark.lines(rows)))
        return 0

    def _maker(self) -> tuple[Maker, int, float | None]:
        """What makes the pictures, their side, and the guidance that a model makes them with."""
        from deepgen_jax.data.transforms import UNIT
        from deepgen_jax.nano import benchmark

        if self.size is not None and (self.size < UNIT or self.size % UNIT):
            raise DeepGenError(f"--size is {self.size}; use a multiple of {UNIT}")
        if self.renders is not None:
            size = self.size or 96
            return benchmark.renders(self.renders, size), size, None
        from deepgen_jax.cli.image_run import load_pipeline
        from deepgen_jax.cli.sampling import open_model
        from deepgen_jax.stores.model_folder import locate

        assert self.model is not None
        folder = locate(self.model)
        config, _ = open_model(folder)
        size = self.size or config.default_side
        guidance = config.guidance(self.guidance)
        pipe = load_pipeline(folder, self.dtype, None, self.compilation_cache)
        make = benchmark.generated(
            pipe, size, steps=self.steps, guidance=guidance, seed=self.seed, batch_size=self.batch_size
        )
        return make, size, guidance
