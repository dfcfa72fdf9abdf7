"""A benchmark run: the images to make, and the folder's record of how they are made, which scoring and reports read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Benchmark, Item, check_distinct
from deepgen_jax.files import read_text, write_text
from deepgen_jax.inference.batch import Failure, PromptCheck, Request, Settings, plan
from deepgen_jax.inference.defaults import resolve_sampling
from deepgen_jax.inference.prompts import Record
from deepgen_jax.inference.requests import MAX_SEED

#: Folder in a run's tree that holds our records; official scorers pass it by.
RECORDS = ".deepgen"
_RUN, _ITEMS = "run.json", "items.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """A run's folder: the official tree, and our records in `RECORDS`."""

    path: Path

    @property
    def records(self) -> Path:
        """The folder of our records."""
        return self.path / RECORDS

    def check(self, benchmark: str) -> None:
        """Raises a DeepGenError if the folder holds a run of a different benchmark."""
        if (self.records / _RUN).exists():
            before = self.read().get("benchmark")
            if before != benchmark:
                raise DeepGenError(f"{self.path} holds images of {before}; choose another --out")

    def write(self, run: Mapping[str, Any], items: Sequence[Item]) -> None:
        """Writes the description of a run and its prompts.

        Raises:
          DeepGenError: the folder holds a run of a different benchmark, or cannot be written.
        """
        self.check(run["benchmark"])
        try:
            self.records.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeepGenError(f"output folder {self.path} cannot be used: {error.strerror or error}") from error
        write_text(self.records / _RUN, json.dumps(run, indent=2, ensure_ascii=False) + "\n")
        lines = [json.dumps(item.to_json(), ensure_ascii=False) + "\n" for item in items]
        write_text(self.records / _ITEMS, "".join(lines))

    def read(self) -> dict[str, Any]:
        """The description of the run.

        Raises:
          DeepGenError: there is none.
        """
        path = self.records / _RUN
        if not path.is_file():
            raise DeepGenError(f"{self.path} holds no benchmark run; give a folder that `deepgen eval` has written")
        return _json(read_text(path), path)

    def items(self) -> list[Item]:
        """The prompts of the run.

        Raises:
          DeepGenError: there are none.
        """
        path = self.records / _ITEMS
        lines = read_text(path).split("\n")
        return [Item.from_json(_json(line, path)) for line in lines if line]


def chosen(items: Sequence[Item], limit: int | None, spread: bool = False) -> list[Item]:
    """The first ``limit`` items, or as many evenly spaced ones, which cover all categories; all where it is None."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)] if spread else list(items[:limit])


def image_seed(seed: int, file: str) -> int:
    """Seed of one image: a digest of the run's seed and the image's file, so that no other image has a part in it."""
    digest = hashlib.sha256(f"{seed}:{file}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & MAX_SEED


def plan_images(
    benchmark: Benchmark, items: Sequence[Item], settings: Settings, check_prompt: PromptCheck, out: Path
) -> tuple[list[Request], list[Failure]]:
    """The images to make, and the items that the model cannot take.

    Args:
      benchmark: lays out its items.
      items: in the order of the files.
      settings: from `run_settings`; ``settings.seed`` is the run's.
      check_prompt: whether the model takes a prompt.
      out: the tree.

    Raises:
      DeepGenError: two items have the same file.
    """
    check_distinct(items)
    requests: list[Request] = []
    failures: list[Failure] = []
    for index, item in enumerate(items):
        for number, file in enumerate(item.files):
            seed = benchmark.seed(item, number, settings.seed)
            record = Record(
                index=index,
                line=item.row,
                prompt=item.prompt,
                images=tuple(out / source for source in item.sources),
                seed=image_seed(settings.seed, file) if seed is None else seed,
                name=file.removesuffix(".png"),
            )
            planned, failed = plan([record], settings, check_prompt, item.file)
            requests += planned
            failures += failed[: 1 if number == 0 else 0]
    return requests, failures


def run_settings(
    benchmark: Benchmark,
    config: DeepGenConfig,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    side: int | None = None,
    sampler: str | None = None,
) -> Settings:
    """Settings of a run: what is asked for, else the model's own where it has any, else the benchmark's.

    Args:
      benchmark: with DeepGen's published settings.
      config: of the model; one made for smaller images or another guidance than DeepGen keeps to its own.
      seed: of the run.
      steps, guidance, side, sampler: asked for; None for the default.
    """
    released = DeepGenConfig()
    side = side or min(benchmark.side, config.default_side)
    if guidance is None:
        same = config.guidance_scale == released.guidance_scale
        guidance = benchmark.guidance if same else config.guidance_scale
    if steps is None:
        same = config.num_inference_steps == released.num_inference_steps
        steps = benchmark.steps if same else config.num_inference_steps
    sampling = resolve_sampling(config, steps, guidance, sampler)
    negative = benchmark.negative_prompt if guidance != 1 else ""
    return Settings(
        negative_prompt=negative,
        seed=seed,
        width=side,
        height=side,
        steps=sampling.steps,
        guidance=sampling.guidance,
        sampler=sampling.sampler,
        needs_image=benchmark.task == "edit",
        padding=benchmark.padding,
        side=side,
        multiple=config.image_multiple,
        strict_size=True,
        max_reference_pixels=side * side,
        exact_reference_size=(side, side) if benchmark.square_sources else None,
    )


def fewer_images(items: Sequence[Item], images: int | None) -> list[Item]:
    """The items with at most ``images`` images each."""
    return [dataclasses.replace(item, files=item.files[:images]) for item in items]


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DeepGenError(f"{path} is damaged ({error}); run `deepgen eval` again") from None
