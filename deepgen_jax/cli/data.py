"""``deepgen data``: a look at training data, their features computed ahead, and a tiny example of them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import replacing, write_error
from deepgen_jax.local_paths import LocalPath

if TYPE_CHECKING:
    from deepgen_jax.data.data_config import DataConfig
    from deepgen_jax.training.feature_cache import CachedSource
    from deepgen_jax.training.run_config import RunConfig


@dataclass(frozen=True)
class RunArguments:
    """A training configuration."""

    config: Annotated[Positional[str], arg(metavar="CONFIG")]
    """Training configuration: a .py file with `get_config()`, or a packaged one such as pretrain or sft."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY=VALUE", help_behavior_hint="")] = ()
    """Changes to it, as for `deepgen train`, such as model=deepgen data.sources.pairs.path=/data/pairs.json."""

    def load(self) -> tuple[RunConfig, DataConfig]:
        """The run and its data."""
        from deepgen_jax import settings
        from deepgen_jax.training import config_files

        config = settings.apply(config_files.load_config(self.config), self.overrides)
        data = getattr(config, "data", None)
        if data is None:
            raise DeepGenError(f"{self.config} describes no training data; name a configuration of supervised training")
        if not config.model:
            raise DeepGenError("model is not set; give model=FOLDER")
        return config, data


@dataclass(frozen=True, kw_only=True)
class InspectCommand(RunArguments):
    """Reports counts, bad samples, buckets, prompt lengths and speed of a run's data; builds missing indices."""

    contact_sheet: Annotated[LocalPath, arg(metavar="PNG")] = "contact_sheet.png"
    """Where to write a picture of samples of every bucket with their texts; "" for none."""
    seconds: float = 5.0
    """Seconds for which the speed of reading is measured; 0 to skip."""
    json: bool = False
    """Print one JSON object instead."""

    def run(self) -> int:
        """Prints; returns the exit status."""
        if not 0 <= self.seconds < float("inf"):
            raise DeepGenError(f"--seconds is {self.seconds}; use 0 or more")
        sheet = Path(self.contact_sheet) if self.contact_sheet else None
        if sheet is not None and sheet.suffix.lower() != ".png":
            raise DeepGenError(f"--contact-sheet {sheet} must end with .png")
        # No accelerator is needed.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        config, data = self.load()
        model = config.model_folder
        from deepgen_jax.data.inspect import inspect
        from deepgen_jax.stores.model_folder import read_manifest
        from deepgen_jax.training.encoders import digest_for

        manifest = read_manifest(model)
        report = inspect(
            data,
            manifest.config,
            model / "tokenizer",
            contact_sheet=sheet,
            seconds=self.seconds,
            weights=digest_for(data, model),
        )
        print(json.dumps(report.to_json(), indent=2) if self.json else "\n".join(report.lines()))
        return 0


@dataclass(frozen=True, kw_only=True)
class CacheCommand(RunArguments):
    """Runs the VAE's encoder and the vision tower over every usable sample once, in the config's dtype.

    Training then reads latents and vision tokens instead of pictures. The same command continues after an interruption.
    """

    out: Path
    """Folder to write, one folder a source in it."""
    shard_size: int = 1024
    """Samples of one file."""
    batch_size: int = 8
    """Samples encoded at a time, rounded up to a multiple of this machine's devices."""
    compilation_cache: LocalPath | None = None
    """Folder that keeps compiled programs, or "off". Default: $DEEPGEN_CACHE_DIR, else ~/.cache/deepgen-jax/xla."""

    def run(self) -> int:
        """Caches; returns the exit status."""
        config, data = self.load()
        from deepgen_jax.cli.stopping import Stop
        from deepgen_jax.inference.cache import enable_compilation_cache
        from deepgen_jax.stores.run_folder import saved_steps
        from deepgen_jax.training.encoders import check_untrained
        from deepgen_jax.training.feature_cache import cache_features

        if config.start and saved_steps(Path(config.start)):  # else training checks it, once the run has begun
            check_untrained(config)
        enable_compilation_cache(self.compilation_cache)
        with Stop(graceful=False):
            cached = cache_features(
                data,
                config.model_folder,
                config.dtype,
                self.out,
                shard_size=self.shard_size,
                batch_size=self.batch_size,
            )
        print("\n".join(line for source in cached for line in _counts(source)))
        print(f"wrote {self.out}; train from it with these sources in the configuration,\n")
        print("\n".join(f"    {_entry(source)}," for source in cached))
        print("\nor with these words after the configuration's name:\n")
        print("\n".join(f"    {_overrides(source)} \\" for source in cached).removesuffix(" \\"))
        return 0


@dataclass(frozen=True)
class ExampleCommand:
    """Writes coloured shapes with captions, and edits that change their colours: always the same ones."""

    out: Path
    """Folder to write: t2i.json, edit.json, prompts.txt and images."""
    pictures: int = 8
    """Pictures with captions."""
    edits: int = 4
    """Edits, every other one with two reference images."""
    size: int = 64
    """Side of the pictures in pixels, a multiple of 32."""

    def run(self) -> int:
        """Writes; returns the exit status."""
        from deepgen_jax.data.example_data import write_example_data

        for path in write_example_data(self.out, pictures=self.pictures, edits=self.edits, size=self.size):
            print(f"wrote {path}")
        return 0


@dataclass(frozen=True)
class WorldCommand:
    """Writes text-to-image prompts of the procedural world's training split, each with its ground truth."""

    out: Path
    """File to write, one JSON object a line: prompt, and truth, by which the reward `world` scores pictures."""
    prompts: int = 2000
    """Number of prompts."""
    seed: int = 1
    """Of the world; supervised training uses seed 0."""
    skills: Annotated[str, arg(help_behavior_hint="(default: all of text to image)")] = ""
    """Only these skills, such as text,count."""
    overwrite: bool = False
    """Replace the file if it is there."""

    def run(self) -> int:
        """Writes; returns the exit status."""
        from tqdm import tqdm

        from deepgen_jax.nano.reward import TRUTH
        from deepgen_jax.nano.samples import make_sample
        from deepgen_jax.nano.world.truth import PICTURE_SKILLS

        skills = [name.strip() for name in self.skills.split(",") if name.strip()] or ["t2i"]
        if unknown := [name for name in skills if name not in (*PICTURE_SKILLS, "t2i")]:
            raise DeepGenError(f"--skills has {unknown[0]!r}; use {', '.join(PICTURE_SKILLS)}")
        if self.prompts < 1 or self.seed < 0:
            raise DeepGenError(f"--prompts is {self.prompts} and --seed {self.seed}; use 1 and 0 or more")
        if self.out.exists() and not self.overwrite:
            raise DeepGenError(f"{self.out} exists; choose another --out or use --overwrite")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.out.parent, error) from error
        numbers = tqdm(range(self.prompts), desc="prompts", disable=None, leave=False)
        with replacing(self.out) as partial, partial.open("w", encoding="utf-8") as file:
            for number in numbers:
                sample = make_sample("train", skills[number % len(skills)], seed=self.seed, index=number)
                record = {"prompt": sample.text, TRUTH: sample.truth.to_json()}
                file.write(f"{json.dumps(record, ensure_ascii=False)}\n")
        print(f"wrote {self.out}")
        return 0


def _counts(source: CachedSource) -> list[str]:
    entry, held = source.entry, source.shards
    bad = [f"  bad: {count} {reason}, such as {held.examples[reason]}" for reason, count in held.bad.items()]
    return [f"{entry.name}: {held.samples} samples in {held.shards} shards", *bad]


def _entry(source: CachedSource) -> str:
    """The source as an entry of a configuration file."""
    entry = source.entry
    weight = "" if entry.weight is None else f", weight={entry.weight!r}"
    name, path, task = map(json.dumps, (entry.name, entry.path, entry.task))
    return f'SourceConfig({name}, "features", {path}, task={task}{weight})'


def _overrides(source: CachedSource) -> str:
    """The source as overrides."""
    path = f"data.sources.{source.entry.name}"
    return f"{path}.kind=features {path}.path={source.entry.path}"
