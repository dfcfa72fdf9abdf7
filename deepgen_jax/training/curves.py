"""Reads logged metrics of runs as arrays and groups them into panels of a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepgen_jax.errors import DeepGenError, did_you_mean
from deepgen_jax.stores.jsonl import read_lines

#: Share of a step's time spent waiting for data, in per cent; derived from logged seconds.
DATA_WAIT = "data_wait"


@dataclass(frozen=True)
class Curves:
    """Logged metrics of a run.

    Attributes:
      label: short name of the run.
      steps: [n] int64, ascending.
      values: metric -> float64 [n], or [n, k] for lists of k numbers; NaN where it was not logged.
    """

    label: str
    steps: np.ndarray
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class Look:
    """Appearance of a panel.

    Attributes:
      title: title of the panel.
      unit: label of the vertical axis.
      log: whether the vertical axis, or the colour scale, is logarithmic.
      bins: axis label for the items of a list, which span 0 to 1.
      smooth: whether to draw a moving average.
    """

    title: str
    unit: str = ""
    log: bool = False
    bins: str = ""
    smooth: bool = True


@dataclass(frozen=True)
class Panel:
    """One set of axes with the metrics ``names`` of group ``key``; ``is_list``: their values are lists of numbers."""

    key: str
    look: Look
    names: tuple[str, ...]
    is_list: bool


#: Known groups, in panel order; other groups follow in the order they were logged.
LOOKS = {
    "loss": Look("Loss", "loss"),
    "loss_by_sigma": Look("Loss by noise level", "loss", log=True, bins="noise level σ"),
    "reward": Look("Reward", "reward"),
    "rl/kl": Look("KL to the reference model", "KL"),
    "rl/ratio_mean": Look("Likelihood ratio to the sampling policy", "mean ratio"),
    "rl/clip_share": Look("Clipped ratios", "share of samples"),
    "rl/zero_variance_groups": Look("Groups without reward variance", "groups"),
    "rl/advantage_histogram": Look("Advantages", "samples"),
    "grad_norm": Look("Gradient norm", "L2 norm", log=True),
    "update_norm": Look("Update norm", "L2 norm", log=True),
    "learning_rate": Look("Learning rate", "learning rate", smooth=False),
    "samples_per_second": Look("Throughput", "samples / s"),
    "tokens_per_second": Look("Token throughput", "tokens / s"),
    "seconds": Look("Step time", "s"),
    DATA_WAIT: Look("Waiting for data", "% of the step"),
    "mfu": Look("Model FLOPs utilisation", "MFU"),
    "device_memory_gib": Look("Peak device memory", "GiB", smooth=False),
    "skipped": Look("Skipped steps", "steps", smooth=False),
}


def read_curves(folder: Path, label: str = "") -> Curves:
    """Reads the metrics of a run; skips incomplete lines, so the run may still be active.

    Raises:
      DeepGenError: the run does not exist or has no metrics yet.
    """
    # `tracking.METRICS_FILE`, not imported because tracking imports JAX.
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise DeepGenError(f"{folder} is no run, there is no such folder; give the folder that `deepgen train` writes")
    try:
        entries = list(read_lines(path))
    except FileNotFoundError:
        entries = []
    except OSError as error:
        raise DeepGenError(f"{path} cannot be read: {error.strerror or error}") from error
    if not entries:
        raise DeepGenError(f"{folder} has no metrics yet; {path.name} is written from the first logged step on")
    names = dict.fromkeys(name for entry in entries for name in entry if name not in ("step", "time"))
    values = {name: _column([entry.get(name) for entry in entries]) for name in names}
    values = {name: column for name, column in values.items() if np.isfinite(column).any()}
    if {"seconds/data", "seconds/step"} <= set(values):
        with np.errstate(divide="ignore", invalid="ignore"):
            values[DATA_WAIT] = 100 * values["seconds/data"] / values["seconds/step"]
    return Curves(label or folder.absolute().name, np.array([entry["step"] for entry in entries]), values)


def choose_panels(runs: Sequence[Curves], metrics: Sequence[str] = ()) -> list[Panel]:
    """Panels for the logged metrics; metrics of the same group share a panel.

    Args:
      runs: logged metrics of the runs.
      metrics: metrics and groups to show; empty for all informative ones.

    Raises:
      DeepGenError: no run has one of ``metrics``.
    """
    lists = {name: column.ndim == 2 for run in runs for name, column in run.values.items()}
    names = list(lists)
    if metrics:
        for word in metrics:
            if not any(_matches(name, word) for name in names):
                related = [name for name in names if "/" in word and name.split("/")[0] == word.split("/")[0]]
                known = related or dict.fromkeys(_group(name) for name in names)
                raise DeepGenError(f"no run has the metric {word!r}{did_you_mean(word, known)}")
        names = [name for name in names if any(_matches(name, word) for word in metrics)]
    else:
        names = [name for name in names if name != "skipped" or any(np.nansum(run.values.get(name, 0)) for run in runs)]
    panels: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        panels.setdefault((_group(name), lists[name]), []).append(name)
    made = [Panel(key, _look(key), tuple(members), is_list) for (key, is_list), members in panels.items()]
    order = list(LOOKS)
    places = {panel.key: _place(panel.key, order) for panel in made}
    return sorted(made, key=lambda panel: places[panel.key])


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over ``window`` entries, [n] -> [n]; narrower at the ends, ignores NaN."""
    there = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    at = np.arange(len(values))
    low, high = np.maximum(at - (window - 1) // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / np.where(counts[high] > counts[low], counts[high] - counts[low], np.nan)


def over_steps(steps: np.ndarray, values: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of ``values`` [n, k] over at most ``columns`` equal step ranges: edges [c + 1], means [c, k]."""
    columns = min(columns, len(steps))
    edges = np.linspace(steps[0] - 0.5, steps[-1] + 0.5, columns + 1)
    column = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, columns - 1)
    sums, counts = np.zeros((columns, values.shape[1])), np.zeros((columns, values.shape[1]))
    there = np.isfinite(values)
    np.add.at(sums, column, np.where(there, values, 0.0))
    np.add.at(counts, column, there)
    return edges, sums / np.where(counts, counts, np.nan)


def series_label(panel: Panel, name: str) -> str:
    """Part of a metric's name that is specific within its panel; "all" for the metric named like the panel."""
    if panel.key.startswith("reward/"):
        middle, _, kind = name.removeprefix(panel.key).rpartition("/")
        return (middle.removeprefix("@") or "all") + ("" if kind == "mean" else f" {kind}")
    return name.removeprefix(panel.key).removeprefix("/") or "all"


def _matches(name: str, word: str) -> bool:
    return name == word or _group(name) == word or name.startswith(f"{word}/")


def _group(name: str) -> str:
    first, _, rest = name.partition("/")
    if first == "reward" and "/" in rest:
        return f"{first}/{rest.split('/')[0].split('@')[0]}"
    # Metrics of reinforcement learning differ in units.
    return name if first == "rl" else first


def _look(key: str) -> Look:
    if key in LOOKS:
        return LOOKS[key]
    first, _, rest = key.partition("/")
    if first == "reward":
        return Look(f"Reward: {rest}", "mean reward")
    title = (rest if first == "rl" else key).replace("_", " ")
    return Look(title[:1].upper() + title[1:], title)


def _place(key: str, order: list[str]) -> int:
    for name in (key, key.split("/")[0]):
        if name in order:
            return order.index(name)
    return len(order)


def _column(items: list[Any]) -> np.ndarray:
    width = max((len(item) for item in items if isinstance(item, list)), default=0)
    if not width:
        return np.array([_number(item) for item in items])
    column = np.full((len(items), width), np.nan)
    for row, item in zip(column, items, strict=True):
        if isinstance(item, list):
            row[: len(item)] = list(map(_number, item))
    return column


def _number(item: Any) -> float:
    return float(item) if isinstance(item, int | float) else np.nan


def finite(values: Sequence[np.ndarray]) -> np.ndarray:
    """Finite values of all arrays, flattened."""
    flat = [np.ravel(array)[np.isfinite(np.ravel(array))] for array in values]
    return np.concatenate(flat) if flat else np.zeros(0)
