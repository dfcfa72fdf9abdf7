"""Figures of a benchmark from scored prompts, with bootstrap intervals.

Every aggregation of the public benchmarks is a weighted mean over groups of ratios of sums: a group holds numerators
and denominators of prompts (a mean has denominators that count images; word accuracy counts words), a figure weighs
groups.
Resampled prompts are then counts, and all figures of all resamples one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Resamples of a bootstrap.
RESAMPLES = 2000
_CHUNK = 250


@dataclass(frozen=True)
class Cell:
    """Contribution of one image to a group: to its numerator and its denominator."""

    group: str
    value: float
    weight: float = 1.0


@dataclass(frozen=True)
class Measure:
    """A figure: ``scale * (weighted mean over its groups of value sums / weight sums) + offset``.

    Attributes:
      name: of the figure; the main one comes first in a benchmark's list.
      groups: group -> weight; weights are normalised over the groups that have data.
      scale, offset: such as 25 and -25 for percent from scores of 1 to 5.
      digits: decimals shown.
    """

    name: str
    groups: Mapping[str, float]
    scale: float = 1.0
    offset: float = 0.0
    digits: int = 3


@dataclass(frozen=True)
class Figure:
    """A figure's value, its 95% interval by bootstrap over prompts (Efron, 1979), and how many prompts gave it."""

    name: str
    value: float
    low: float
    high: float
    prompts: int
    digits: int = 3

    @property
    def shown(self) -> str:
        """The value for people."""
        return f"{self.value:.{self.digits}f}"

    @property
    def interval(self) -> str:
        """The interval for people; resamples of prompts that are all alike have none."""
        if self.low == self.high:
            return f"no interval, {self.prompts} prompts alike" if self.prompts > 1 else "1 prompt"
        return f"{self.low:.{self.digits}f} to {self.high:.{self.digits}f}"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name, "value": self.value, "low": self.low, "high": self.high, "prompts": self.prompts,
            "digits": self.digits,
        }  # fmt: skip


@dataclass
class Table:
    """Cells of prompts; a prompt's images are resampled together."""

    prompts: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, prompt: str, cells: Iterable[Cell]) -> None:
        """Adds an image's cells to its prompt."""
        sums = self.prompts.setdefault(prompt, {})
        for cell in cells:
            total = sums.setdefault(cell.group, [0.0, 0.0])
            total[0] += cell.value
            total[1] += cell.weight

    @property
    def groups(self) -> list[str]:
        """Groups with data, in the order of their first prompt."""
        return list(dict.fromkeys(group for sums in self.prompts.values() for group in sums))

    def figures(self, measures: Sequence[Measure], seed: int = 0, resamples: int = RESAMPLES) -> list[Figure]:
        """Values and intervals of the measures that have data.

        Args:
          measures: what to compute.
          seed: of the resampling.
          resamples: how many.
        """
        groups = self.groups
        column = {group: i for i, group in enumerate(groups)}
        values = np.zeros((len(self.prompts), len(groups)))
        weights = np.zeros_like(values)
        for row, sums in enumerate(self.prompts.values()):
            for group, (value, weight) in sums.items():
                values[row, column[group]], weights[row, column[group]] = value, weight
        kept = [measure for measure in measures if any(group in column for group in measure.groups)]
        if not kept:
            return []
        mixing = np.array([[measure.groups.get(group, 0.0) for group in groups] for measure in kept])
        scale = np.array([measure.scale for measure in kept])
        offset = np.array([measure.offset for measure in kept])

        def evaluate(counts: np.ndarray) -> np.ndarray:
            """Resample counts [R, prompts] -> figures [R, measures], NaN where no group of a measure has data."""
            below = counts @ weights
            there = below > 0
            ratios = np.divide(counts @ values, below, out=np.zeros_like(below), where=there)
            share = there @ mixing.T
            means = np.divide(ratios @ mixing.T, share, out=np.full(share.shape, np.nan), where=share > 0)
            return scale * means + offset

        count = len(self.prompts)
        points = evaluate(np.ones((1, count)))[0]
        generator = np.random.default_rng(seed)
        drawn = []
        for start in range(0, resamples, _CHUNK):
            size = min(_CHUNK, resamples - start)
            drawn.append(evaluate(generator.multinomial(count, np.full(count, 1 / count), size=size).astype(float)))
        low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5], axis=0)
        used = (weights > 0).astype(float) @ (mixing.T > 0) > 0
        return [
            Figure(measure.name, float(points[i]), float(low[i]), float(high[i]), int(used[:, i].sum()), measure.digits)
            for i, measure in enumerate(kept)
        ]


def mean_of(name: str, groups: Sequence[str], prefix: str, **options: Any) -> Measure:
    """The unweighted mean over the groups whose name begins with ``prefix``."""
    return Measure(name, {group: 1.0 for group in groups if group.startswith(prefix)}, **options)


def each(groups: Sequence[str], prefix: str, **options: Any) -> list[Measure]:
    """A measure for each group whose name begins with ``prefix``, named by the rest."""
    return [
        Measure(group.removeprefix(prefix), {group: 1.0}, **options) for group in groups if group.startswith(prefix)
    ]
