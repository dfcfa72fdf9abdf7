"""Contents of a report on benchmark runs: scores next to published ones, categories, images, settings, differences."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Item
from deepgen_jax.evaluation.figures import RESAMPLES, Figure
from deepgen_jax.evaluation.run import RunFolder
from deepgen_jax.evaluation.scoring import Scores, read_scores

#: Prompts at each end of the order by score, and where there are no scores.
ENDS, UNSCORED = 6, 12
_PUBLISHED = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class RunReport:
    """A run as it is reported.

    Attributes:
      folder: of the run.
      label: of the model, distinct among the runs of a report.
      run: its description.
      items: its prompts.
      scores: None where it has none yet.
    """

    folder: Path
    label: str
    run: Mapping[str, Any]
    items: Sequence[Item]
    scores: Scores | None

    @property
    def main(self) -> Figure | None:
        """The benchmark's main figure."""
        return self.scores.figures[0] if self.scores and self.scores.figures else None

    def shown(self) -> dict[str, list[tuple[Item, str, float | None]]]:
        """Images to show: the worst and the best by score, or the first ones; each with its prompt and score."""
        files = {file: item for item in self.items for file in item.files if (self.folder / file).is_file()}
        if not self.scores or not self.scores.images:
            first: dict[str, tuple[Item, str, float | None]]
            first = {item.key: (item, file, None) for file, item in reversed(files.items())}
            return {"first": list(first.values())[: -UNSCORED - 1 : -1]}
        ordered = sorted((score, file) for file, score in self.scores.images.items() if file in files)
        worst, best = _distinct(ordered, files), _distinct(ordered[::-1], files)
        seen = {file for _, file in worst}
        return {
            "worst": [(files[file], file, score) for score, file in worst],
            "best": [(files[file], file, score) for score, file in best if file not in seen],
        }


@dataclass(frozen=True)
class Comparison:
    """Two runs of a benchmark, image by image.

    Attributes:
      first, second: their labels.
      images: scored in both.
      better, worse: images that the second scores higher and lower.
      mean, low, high: mean difference of the images' scores, second less first, with its 95% interval by bootstrap over
        prompts.
    """

    first: str
    second: str
    images: int
    better: int
    worse: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Published:
    """Published scores of a benchmark; rows hold model, params, open, values, source and perhaps a protocol."""

    protocol: str = ""
    rows: Sequence[Mapping[str, Any]] = ()

    def of(self, figure: str) -> list[Mapping[str, Any]]:
        """Rows that have the figure, best first."""
        return sorted((row for row in self.rows if figure in row["values"]), key=lambda row: -row["values"][figure])


@dataclass(frozen=True)
class Section:
    """A benchmark's part of a report."""

    name: str
    title: str
    runs: Sequence[RunReport]
    published: Published
    comparisons: Sequence[Comparison] = field(default=())

    @property
    def top(self) -> float:
        """End of the scale of its figures."""
        found = [figure.high for run in self.runs if run.scores for figure in run.scores.figures]
        found += [value for row in self.published.rows for value in row["values"].values()]
        highest = max(found, default=1.0)
        return next((end for end in (1.0, 5.0, 10.0, 100.0) if highest <= end + 1e-9), highest)

    @property
    def figures(self) -> list[str]:
        """Names of the figures, the main one first."""
        return list(dict.fromkeys(f.name for run in self.runs if run.scores for f in run.scores.figures))


def collect(folders: Sequence[Path]) -> list[Section]:
    """The report's sections, a benchmark each, in the order of the folders.

    Raises:
      DeepGenError: a folder holds no run, or its records are damaged.
    """
    read: list[tuple[Path, dict[str, Any]]] = []
    for path in folders:
        if path.resolve() in [other.resolve() for other, _ in read]:
            raise DeepGenError(f"{path} is given twice; give each folder once")
        read.append((path, RunFolder(path).read()))
    sections = []
    for name in dict.fromkeys(run["benchmark"] for _, run in read):
        mine = [(path, run) for path, run in read if run["benchmark"] == name]
        labels = [run["model"] for _, run in mine]
        runs = [
            RunReport(
                path,
                run["model"] if labels.count(run["model"]) == 1 else f"{run['model']} ({path.name})",
                run,
                RunFolder(path).items(),
                read_scores(RunFolder(path)),
            )
            for path, run in mine
        ]
        comparisons = [found for other in runs[1:] if (found := compare(runs[0], other)) is not None]
        sections.append(Section(name, mine[0][1]["title"], runs, published(name), comparisons))
    return sections


def compare(first: RunReport, second: RunReport, resamples: int = RESAMPLES) -> Comparison | None:
    """The difference of two scored runs over the images that both have; None if they share none."""
    if not first.scores or not second.scores:
        return None
    ours, theirs = first.scores.images, second.scores.images
    rows = [[(file, item.key) for file in item.files if file in ours and file in theirs] for item in first.items]
    differences = [np.array([theirs[file] - ours[file] for file, _ in row]) for row in rows if row]
    if not differences:
        return None
    sums = np.array([row.sum() for row in differences])
    counts = np.array([len(row) for row in differences], float)
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
    means = (drawn @ sums) / (drawn @ counts)
    low, high = np.percentile(means, [2.5, 97.5])
    every = np.concatenate(differences)
    return Comparison(
        first.label,
        second.label,
        len(every),
        int((every > 1e-9).sum()),
        int((every < -1e-9).sum()),
        float(every.mean()),
        float(low),
        float(high),
    )


@functools.cache
def _all_published() -> dict[str, Any]:
    return json.loads(_PUBLISHED.read_text(encoding="utf-8"))


def published(name: str) -> Published:
    """Published scores of a benchmark; none for those that the paper does not report."""
    found = _all_published()["benchmarks"].get(name)
    return Published(found["protocol"], found["rows"]) if found else Published()


def to_json(sections: Sequence[Section]) -> dict[str, Any]:
    """The report's figures, JSON-ready."""
    return {
        "published_in": _all_published()["paper"],
        "benchmarks": [
            {
                "benchmark": section.name,
                "title": section.title,
                "runs": [
                    {
                        "folder": str(run.folder),
                        "label": run.label,
                        "run": dict(run.run),
                        "scores": None if run.scores is None else {**run.scores.to_json(), "by": run.scores.by},
                    }
                    for run in section.runs
                ],
                "comparisons": [vars(comparison) for comparison in section.comparisons],
                "published": {"protocol": section.published.protocol, "rows": list(section.published.rows)},
            }
            for section in sections
        ],
    }


def _distinct(ordered: Sequence[tuple[float, str]], files: Mapping[str, Item]) -> list[tuple[float, str]]:
    """The first images of `ENDS` different prompts."""
    chosen: dict[str, tuple[float, str]] = {}
    for score, file in ordered:
        chosen.setdefault(files[file].key, (score, file))
        if len(chosen) == ENDS:
            break
    return list(chosen.values())
