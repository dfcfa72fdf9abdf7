"""Skills in the procedural world: held-out prompts and edits, scored exactly."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from deepgen_jax.data.images import load_image
from deepgen_jax.evaluation.benchmark import Benchmark, ImageScore, Item, Reading
from deepgen_jax.evaluation.figures import Cell, Measure, each, mean_of
from deepgen_jax.evaluation.intervals import wilson
from deepgen_jax.evaluation.live import make_images
from deepgen_jax.evaluation.run import RECORDS
from deepgen_jax.files import replacing
from deepgen_jax.inference.batch import Settings
from deepgen_jax.nano.reward import WorldReward
from deepgen_jax.nano.samples import VERSION, Sample, make_sample, render
from deepgen_jax.nano.world import wrong
from deepgen_jax.nano.world.scene import Scene
from deepgen_jax.nano.world.score import Reader, score
from deepgen_jax.nano.world.truth import SKILLS, Truth

#: Renders that replace a model's images, to validate the scorer.
Renders = Literal["right", "wrong"]
#: Rows over all kinds of edits: preserved the rest; performed the edit and preserved the rest.
PRESERVATION, WHOLE = "preservation", "done_and_kept"


class SampleImages(NamedTuple):
    """Images of a sample, uint8 [H, W, 3]: `done` is scored for the edit itself, `kept` for preservation."""

    done: np.ndarray
    kept: np.ndarray


#: Yields the images of samples, in order.
ImageSource = Callable[[Sequence[Sample]], Iterable[SampleImages]]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      skill: one of `SKILLS`, or `PRESERVATION` or `WHOLE`.
      right, count: number of correct images, and of all images.
      kept: number of edits that preserved the rest of the image; None in rows that are not a kind of edit.
    """

    skill: str
    right: int
    count: int
    kept: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The row with shares and 95% intervals; omits ``kept`` if it is None."""
        values: dict[str, Any] = {"skill": self.skill, "right": self.right, "count": self.count}
        values |= _interval("", self.right, self.count)
        if self.kept is not None:
            values |= {"kept": self.kept, **_interval("kept_", self.kept, self.count)}
        return values


def held_out_samples(prompts: int, seed: int, skills: Sequence[str] = SKILLS) -> list[Sample]:
    """``prompts`` held-out samples of each skill."""
    return [make_sample("held_out", skill, seed=seed, index=i) for skill in skills for i in range(prompts)]


def evaluate(samples: Sequence[Sample], make: ImageSource, read: Reader) -> list[Row]:
    """Scores samples: a row per skill, then `PRESERVATION` and `WHOLE` over all edits.

    Args:
      samples: samples of any skills.
      make: yields their images.
      read: reads words on signs.
    """
    done: dict[str, list[bool]] = {}
    kept: dict[str, list[bool]] = {}
    whole: list[bool] = []
    for sample, images in zip(samples, make(samples), strict=True):
        skill = sample.truth.skill
        result = score(images.done, sample.truth, read)
        done.setdefault(skill, []).append(result.done)
        if sample.truth.is_edit:
            whole.append(result.done and result.kept)
            same = images.kept is images.done
            kept.setdefault(skill, []).append((result if same else score(images.kept, sample.truth, read)).kept)
    rows = [
        Row(skill, sum(results), len(results), sum(kept[skill]) if skill in kept else None)
        for skill, results in done.items()
    ]
    if whole:
        rows += [Row(PRESERVATION, sum(map(sum, kept.values())), len(whole)), Row(WHOLE, sum(whole), len(whole))]
    return rows


def renders(kind: Renders, size: int) -> ImageSource:
    """Renders of the ground truth, or of scenes with one error."""

    def make(samples: Sequence[Sample]) -> Iterator[SampleImages]:
        rng = random.Random(0)
        for sample in samples:
            if kind == "right":
                picture = np.asarray(render(sample.scene, size))
                yield SampleImages(picture, picture)
                continue
            unkept = wrong.unkept(rng, sample) if sample.truth.is_edit else sample.scene
            done, kept = (np.asarray(render(scene, size)) for scene in (wrong.undone(rng, sample), unkept))
            yield SampleImages(done, kept)

    return make


def generated(
    pipe: Callable[..., Any],
    size: int,
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int,
    sampler: str = "euler",
) -> ImageSource:
    """Images that a pipeline generates from the samples' prompts and references.

    Args:
      pipe: a `DeepGenPipeline`.
      size: side of references and results in pixels.
      steps, guidance: sampler steps and guidance scale.
      seed: sample i draws its noise from seed + i.
      batch_size: images per batch; samples in a batch have the same number of references.
      sampler: name of the sampler.
    """

    def make(samples: Sequence[Sample]) -> Iterator[SampleImages]:
        benchmark = NanoBenchmark(size=size)
        items = benchmark.items(samples)
        settings = Settings(
            seed=seed, width=size, height=size, steps=steps, guidance=guidance, sampler=sampler,
            padding=benchmark.padding, side=size, max_reference_pixels=size * size,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            benchmark.prepare(items, Reading(Path(), ""), Path(folder))
            made = dict(make_images(benchmark, items, pipe, settings, batch_size, Path(folder)))
        for item in items:
            yield SampleImages(made[item.files[0]], made[item.files[0]])

    return make


def saved(items: Sequence[Item], out: Path) -> ImageSource:
    """Images in a run's folder; ``items`` correspond to the samples, in order."""

    def make(samples: Sequence[Sample]) -> Iterator[SampleImages]:
        for item in items:
            picture = np.asarray(load_image(out / item.files[0]))
            yield SampleImages(picture, picture)

    return make


class NanoBenchmark(Benchmark):
    """Held-out prompts and edits of the procedural world, scored exactly.

    Args:
      prompts: prompts per skill.
      seed: seed of the prompts.
      skills: skills to evaluate.
      size: side of the source images in pixels.
    """

    title = "Procedural world"
    scorer = "exact"
    protocol = f"procedural-world/{VERSION}"
    steps, guidance, side = 20, 1.0, 96
    square_sources = False
    padding = "masked"

    def __init__(self, prompts: int = 100, seed: int = 0, skills: Sequence[str] = SKILLS, size: int = 96) -> None:
        self._prompts, self._seed, self._skills, self._size = prompts, seed, tuple(skills), size
        self._reader: WorldReward | None = None
        #: Item key -> scenes of its source images.
        self._scenes: dict[str, tuple[Scene, ...]] = {}

    def read(self, reading: Reading) -> list[Item]:
        """The samples as items; reads no files."""
        return self.items(held_out_samples(self._prompts, self._seed, self._skills))

    def items(self, samples: Sequence[Sample]) -> list[Item]:
        """One item per sample, named by skill and number."""
        items: list[Item] = []
        numbers: Counter[str] = Counter()
        for index, sample in enumerate(samples):
            skill = sample.truth.skill
            key = f"{skill}/{numbers[skill]:05d}"
            numbers[skill] += 1
            self._scenes[key] = sample.references
            facts = {"truth": sample.truth.to_json(), "index": index}
            sources = tuple(f"{RECORDS}/references/{key}_{k}.png" for k in range(len(sample.references)))
            items.append(Item(key, sample.text, (f"{key}.png",), skill, index, skill, sources, facts))
        return items

    def prepare(self, items: Sequence[Item], reading: Reading, out: Path) -> None:
        """Renders the source images."""
        for item in items:
            for scene, source in zip(self._scenes[item.key], item.sources, strict=True):
                path = out / source
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as partial:
                    render(scene, self._size).save(partial, "PNG")

    def seed(self, item: Item, number: int, seed: int) -> int:
        return seed + int(item.facts["index"])

    def score_pixels(self, item: Item, image: np.ndarray) -> ImageScore:
        self._reader = self._reader or WorldReward(workers=1)
        truth = Truth.from_json(item.facts["truth"])
        result = score(image, truth, self._reader.read)
        cells = [Cell(f"skill/{truth.skill}", float(result.done))]
        if truth.is_edit:
            cells += [Cell(f"kept/{truth.skill}", float(result.kept)), Cell(PRESERVATION, float(result.kept))]
            cells.append(Cell(WHOLE, float(result.done and result.kept)))
        return ImageScore(result.share, tuple(cells))

    def measures(self, groups: Sequence[str]) -> list[Measure]:
        rows = [mean_of("all skills", groups, "skill/"), *each(groups, "skill/")]
        rows += [Measure(f"{m.name}, rest kept", m.groups) for m in each(groups, "kept/")]
        return [*rows, *(Measure(name, {name: 1.0}) for name in (PRESERVATION, WHOLE))]


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table as text."""
    first_edit = next((row for row in rows if row.kept is not None), None)
    header = f"{'skill':<14} {'right':>7}   {'95% interval':<16} {'of':<6}"
    yield f"{header} {'rest kept':>9}   95% interval" if first_edit else header.rstrip()
    for row in rows:
        if row is first_edit or row.skill == PRESERVATION:
            yield ""
        values = row.to_json()
        line = f"{row.skill:<14} {values['share']:>7.1%}   {_between(values, ''):<16} {row.count:<6}"
        if row.kept is not None:
            line += f" {values['kept_share']:>9.1%}   {_between(values, 'kept_')}"
        yield line.rstrip()


def _between(values: dict[str, Any], prefix: str) -> str:
    return f"{values[prefix + 'low']:.1%} to {values[prefix + 'high']:.1%}"


def _interval(prefix: str, right: int, count: int) -> dict[str, float]:
    """Share and 95% interval; keys start with ``prefix``."""
    low, high = wilson(right, count)
    values = {"share": right / count, "low": low, "high": high}
    return {prefix + name: round(value, 4) for name, value in values.items()}
