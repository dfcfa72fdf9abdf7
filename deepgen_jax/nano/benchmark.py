"""Skills in the procedural world: held-out prompts and edits, scored exactly."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from deepgen_jax.evaluation.intervals import wilson
from deepgen_jax.nano.samples import Sample, make_sample, render
from deepgen_jax.nano.world import wrong
from deepgen_jax.nano.world.score import Reader, score
from deepgen_jax.nano.world.truth import SKILLS

#: What is shown instead of a model's pictures, to see whether the scorers are right.
Renders = Literal["right", "wrong"]
#: Rows over edits of all kinds: how often they left everything else alone, and how often they were done and did.
PRESERVATION, WHOLE = "preservation", "done_and_kept"


class Shown(NamedTuple):
    """Pictures for a sample, uint8 [H, W, 3]: the one that tells whether it was done, and whether the rest was kept."""

    done: np.ndarray
    kept: np.ndarray


#: Pictures for samples, in their order.
Maker = Callable[[Sequence[Sample]], Iterable[Shown]]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      skill: one of `SKILLS`, or `PRESERVATION` or `WHOLE`.
      right, count: pictures that were right, of so many.
      kept: of one kind of edit, pictures that left everything else alone; None in other rows.
    """

    skill: str
    right: int
    count: int
    kept: int | None = None

    def facts(self) -> dict[str, Any]:
        """With the shares and their 95% intervals, JSON; without ``kept`` where there is none."""
        facts: dict[str, Any] = {"skill": self.skill, "right": self.right, "count": self.count}
        facts |= _interval("", self.right, self.count)
        if self.kept is not None:
            facts |= {"kept": self.kept, **_interval("kept_", self.kept, self.count)}
        return facts


def held_out_samples(prompts: int, seed: int, skills: Sequence[str] = SKILLS) -> list[Sample]:
    """So many held-out samples of each skill."""
    return [make_sample("held_out", skill, seed=seed, index=i) for skill in skills for i in range(prompts)]


def evaluate(samples: Sequence[Sample], make: Maker, read: Reader) -> list[Row]:
    """The table: a row for each skill, and two over edits of all kinds.

    Args:
      samples: of any skills.
      make: gives their pictures.
      read: reads words on signs.
    """
    done: dict[str, list[bool]] = {}
    kept: dict[str, list[bool]] = {}
    whole: list[bool] = []
    for sample, shown in zip(samples, make(samples), strict=True):
        skill = sample.truth.skill
        result = score(shown.done, sample.truth, read)
        done.setdefault(skill, []).append(result.done)
        if sample.truth.is_edit:
            whole.append(result.done and result.kept)
            same = shown.kept is shown.done
            kept.setdefault(skill, []).append((result if same else score(shown.kept, sample.truth, read)).kept)
    rows = [
        Row(skill, sum(results), len(results), sum(kept[skill]) if skill in kept else None)
        for skill, results in done.items()
    ]
    if whole:
        rows += [Row(PRESERVATION, sum(map(sum, kept.values())), len(whole)), Row(WHOLE, sum(whole), len(whole))]
    return rows


def renders(kind: Renders, size: int) -> Maker:
    """Pictures drawn from the ground truth, or from scenes that are wrong in one thing."""

    def make(samples: Sequence[Sample]) -> Iterator[Shown]:
        rng = random.Random(0)
        for sample in samples:
            if kind == "right":
                picture = np.asarray(render(sample.scene, size))
                yield Shown(picture, picture)
                continue
            unkept = wrong.unkept(rng, sample) if sample.truth.is_edit else sample.scene
            done, kept = (np.asarray(render(scene, size)) for scene in (wrong.undone(rng, sample), unkept))
            yield Shown(done, kept)

    return make


def generated(
    pipe: Callable[..., Any], size: int, *, steps: int, guidance: float, seed: int, batch_size: int
) -> Maker:
    """Pictures that a pipeline makes of the samples' texts and references.

    Args:
      pipe: a `DeepGenPipeline`.
      size: side of references and results in pixels.
      steps, guidance: of sampling.
      seed: sample i draws its noise from seed + i.
      batch_size: pictures at once; only samples with equally many references share a batch.
    """

    def make(samples: Sequence[Sample]) -> Iterator[Shown]:
        made: dict[int, np.ndarray] = {}
        for references in sorted({len(sample.references) for sample in samples}):
            places = [i for i, sample in enumerate(samples) if len(sample.references) == references]
            for start in range(0, len(places), batch_size):
                chosen = places[start : start + batch_size]
                # The last batch is filled up: one program for all.
                filled = chosen + chosen[-1:] * (batch_size - len(chosen))
                pictures = [_references(samples[i], size) for i in filled]
                out = pipe(
                    [samples[i].text for i in filled],
                    image=pictures if references else None,
                    height=size,
                    width=size,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    seed=[seed + i for i in filled],
                    padding="masked",
                )
                made |= {i: np.asarray(picture) for i, picture in zip(chosen, out.images, strict=False)}
        for i in range(len(samples)):
            yield Shown(made[i], made[i])

    return make


def _references(sample: Sample, size: int) -> list[Image.Image]:
    return [render(scene, size) for scene in sample.references]


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table for people."""
    first_edit = next((row for row in rows if row.kept is not None), None)
    header = f"{'skill':<14} {'right':>7}   {'95% interval':<16} {'of':<6}"
    yield f"{header} {'rest kept':>9}   95% interval" if first_edit else header.rstrip()
    for row in rows:
        if row is first_edit or row.skill == PRESERVATION:
            yield ""
        facts = row.facts()
        line = f"{row.skill:<14} {facts['share']:>7.1%}   {_between(facts, ''):<16} {row.count:<6}"
        if row.kept is not None:
            line += f" {facts['kept_share']:>9.1%}   {_between(facts, 'kept_')}"
        yield line.rstrip()


def _between(facts: dict[str, Any], prefix: str) -> str:
    return f"{facts[prefix + 'low']:.1%} to {facts[prefix + 'high']:.1%}"


def _interval(prefix: str, right: int, count: int) -> dict[str, float]:
    """Share and 95% interval under names that begin with ``prefix``."""
    low, high = wilson(right, count)
    values = {"share": right / count, "low": low, "high": high}
    return {prefix + name: round(value, 4) for name, value in values.items()}
