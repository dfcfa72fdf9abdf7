"""Plots the metrics of one run, or compares several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deepgen_jax import files
from deepgen_jax.errors import DeepGenError
from deepgen_jax.training.curves import (
    Curves,
    Panel,
    choose_panels,
    finite,
    over_steps,
    read_curves,
    series_label,
    smoothed,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: File formats by suffix.
SUFFIXES = (".png", ".pdf", ".svg")
#: Colour-blind-safe palette (Okabe and Ito) without yellow, which is faint on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B5A2B")
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
_COLUMNS = 3
#: Step ranges (columns) of a heat map.
_HEAT_COLUMNS = 200
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "agg.path.chunksize": 10_000,
}
#: Profiles of several runs are means over this last share of the steps.
_LAST = 0.2
#: Resolution of saved figures in dots per inch.
DPI = 150
#: Number of characters of title and legend that fit in one line.
_TITLE_ROOM = 53


def plot_runs(
    folders: Sequence[Path], out: Path | None = None, metrics: Sequence[str] = (), smooth: int | None = None
) -> Path:
    """Plots the metrics of runs to a file.

    Args:
      folders: folders of the runs; several runs are overlaid, one colour each.
      out: output file; by default `curves.png` in the first folder.
      metrics: metrics and groups to show; by default all.
      smooth: window of the moving average in logged entries; by default a fiftieth of each run's entries.

    Returns:
      Path of the file.

    Raises:
      DeepGenError: a run has no metrics, a metric is unknown, matplotlib is missing, or the file cannot be written.
    """
    if not folders:
        raise DeepGenError("there is no run; name the folder of one")
    if smooth is not None and smooth < 1:
        raise DeepGenError(f"the moving average takes {smooth} entries; use 1 or more")
    out = folders[0] / "curves.png" if out is None else out
    if out.suffix.lower() not in SUFFIXES:
        raise DeepGenError(f"{out} has the suffix {out.suffix!r}; use one of {', '.join(SUFFIXES)}")
    runs = [read_curves(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]
    figure = draw(runs, choose_panels(runs, metrics), smooth)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.write_error(out, error, out.parent) from error
    with files.replacing(out) as partial:
        figure.savefig(partial, dpi=DPI, format=out.suffix.lower().removeprefix("."))
    return out


def draw(runs: Sequence[Curves], panels: Sequence[Panel], smooth: int | None = None) -> Figure:
    """A figure without a window, with all runs in every panel."""
    with _figure(len(panels)) as (figure, places):
        from matplotlib.lines import Line2D

        for axes, panel in zip(places, panels, strict=True):
            axes.set_title(panel.look.title, loc="left")
            if not panel.is_list:
                _draw_lines(axes, panel, runs, smooth)
            elif len(runs) == 1:
                _draw_heat_map(figure, axes, panel, runs[0])
            else:
                _draw_profiles(axes, panel, runs)
        if len(runs) == 1:
            figure.suptitle(f"{runs[0].label}, step {runs[0].steps[-1]:,}", fontsize=11)
        else:
            handles = [Line2D([], [], color=_color(i), linewidth=2, label=run.label) for i, run in enumerate(runs)]
            figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 4), fontsize=9)
    return figure


def draw_apart(runs: Sequence[tuple[Curves, Panel]]) -> Figure:
    """A figure with one labelled panel per run, for consecutive runs."""
    with _figure(len(runs)) as (figure, places):
        for axes, (run, panel) in zip(places, runs, strict=True):
            axes.set_title(run.label, loc="left")
            _draw_lines(axes, panel, [run], None)
    return figure


@contextlib.contextmanager
def _figure(panels: int) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yields an empty figure and the axes of its panels; lays it out on exit."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DeepGenError("drawing curves needs matplotlib; pip install 'deepgen-jax[log]'") from error
    with rc_context(_STYLE):
        columns = min(_COLUMNS, panels)
        rows = -(-panels // columns)
        figure = Figure(figsize=(max(4.6 * columns, 5.5), 3.0 * rows + 0.6), layout="constrained")
        yield figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
        # Lay out within the style context.
        figure.draw_without_rendering()


def _labels(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, or their paths if names repeat."""
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _draw_lines(axes: Axes, panel: Panel, runs: Sequence[Curves], smooth: int | None) -> None:
    """Draws faint raw values and a bold moving average, one colour per metric, or per run if there are several."""
    shown, drawn = [name for name in panel.names if not _is_spread(panel, name)], []
    for r, run in enumerate(runs):
        window = smooth or max(1, len(run.steps) // 50)
        for s, name in enumerate(shown):
            if name not in run.values:
                continue
            there = np.isfinite(run.values[name])
            steps, raw = run.steps[there], run.values[name][there]
            line = _moving(panel, raw, window) if panel.look.smooth or smooth else raw
            drawn += [raw]
            color, dashes = (_color(s), "-") if len(runs) == 1 else (_color(r), _DASHES[s % len(_DASHES)])
            axes.plot(steps, raw, color=color, alpha=0.22 if len(runs) == 1 else 0.12, linewidth=0.7)
            label = series_label(panel, name) if r == 0 or name not in runs[0].values else None
            marker = "o" if len(steps) == 1 else ""
            axes.plot(steps, line, color=color, linestyle=dashes, linewidth=1.6, marker=marker, markersize=3)
            axes.plot([], [], color=color if len(runs) == 1 else "#555555", linestyle=dashes, label=label)
            spread = run.values.get(name.removesuffix("mean") + "std")
            if name.endswith("/mean") and series_label(panel, name) == "all" and spread is not None:
                width = smoothed(spread[there], window)
                axes.fill_between(steps, line - width, line + width, color=color, alpha=0.1, linewidth=0)
                drawn += [line - width, line + width]
    _set_limits(axes, panel, finite(drawn))
    _set_step_axis(axes, runs)
    if len(shown) > 1:
        _add_legend(axes, panel)


def _moving(panel: Panel, values: np.ndarray, window: int) -> np.ndarray:
    """Moving average; geometric on a logarithmic axis, where a single outlier would dominate the arithmetic mean."""
    if panel.look.log and len(values) and values.min() > 0:
        return np.exp(smoothed(np.log(values), window))
    return smoothed(values, window)


def _add_legend(axes: Axes, panel: Panel) -> None:
    """Adds a legend that hides no data: next to the title if it fits, else above the curves."""
    labels = axes.get_legend_handles_labels()[1]
    style: dict[str, Any] = {"borderpad": 0, "handlelength": 1.9, "handletextpad": 0.4, "columnspacing": 0.9}
    if len(panel.look.title) + sum(len(label) + 5 for label in labels) <= _TITLE_ROOM:
        axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.985), ncols=len(labels), **style)
        return
    columns = max(1, min(len(labels), 66 // (max(map(len, labels)) + 6)))
    share = min(0.09 * -(-len(labels) // columns) + 0.02, 0.6)
    transform = axes.yaxis.get_transform()
    low, high = transform.transform(axes.get_ylim())
    axes.set_ylim(*transform.inverted().transform([low, low + (high - low) / (1 - share)]))
    axes.legend(loc="upper center", ncols=columns, borderaxespad=0.2, **style)


def _is_spread(panel: Panel, name: str) -> bool:
    """Whether a metric is a standard deviation, drawn as a band around its mean."""
    return name.endswith("/std") and name.removesuffix("std") + "mean" in panel.names


def _set_limits(axes: Axes, panel: Panel, values: np.ndarray) -> None:
    """Sets axis limits that exclude the most extreme 0.5% of values at either end."""
    axes.set_ylabel(panel.look.unit)
    if panel.look.log and len(values) and values.min() > 0:
        axes.set_yscale("log")
        low, high = np.log(np.percentile(values, [0.5, 99.5]))
        margin = max(0.06 * (high - low), 0.05)
        axes.set_ylim(np.exp(low - margin), np.exp(high + margin))
    elif len(values):
        low, high = np.percentile(values, [0.5, 99.5])
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
        axes.set_ylim(low - margin, high + margin)
    if axes.get_yscale() == "linear":
        _set_number_format(axes)


def _set_number_format(axes: Axes) -> None:
    """Formats ticks as full numbers, as an offset or factor above the axis would overlap the title."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    large = EngFormatter(sep="")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.6g}" if abs(y) < 1e5 else large(y)))


def _set_step_axis(axes: Axes, runs: Sequence[Curves]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    first, last = min(run.steps[0] for run in runs), max(run.steps[-1] for run in runs)
    axes.set_xlabel("step")
    if last > first:
        axes.set_xlim(first, last)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_heat_map(figure: Figure, axes: Axes, panel: Panel, run: Curves) -> None:
    """Draws lists over steps as a heat map; missing values are grey."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    values = run.values[panel.names[0]]
    edges, means = over_steps(run.steps, values, _HEAT_COLUMNS)
    known = finite([means])
    low, high = np.percentile(known, [1, 99])
    norm = LogNorm(low, high) if panel.look.log and 0 < low < high else Normalize(low, high)
    axes.grid(False)
    axes.set_facecolor("#dddddd")
    items = np.linspace(0, 1, values.shape[1] + 1) if panel.look.bins else np.arange(values.shape[1] + 1) - 0.5
    mesh = axes.pcolormesh(edges, items, means.T, cmap="viridis", norm=norm, rasterized=True)
    bar = figure.colorbar(mesh, ax=axes, label=panel.look.unit, pad=0.02)
    if isinstance(norm, LogNorm):
        bar.set_ticks(np.geomspace(low, high, 5).tolist())
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.2g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    _set_step_axis(axes, [run])
    axes.set_ylabel(panel.look.bins or "bin")
    if not panel.look.bins:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_profiles(axes: Axes, panel: Panel, runs: Sequence[Curves]) -> None:
    """Draws lists of several runs as means of each item over the last steps."""
    axes.set_title(f"{panel.look.title}, last {_LAST:.0%} of steps", loc="left")
    for r, run in enumerate(runs):
        if panel.names[0] in run.values:
            values = run.values[panel.names[0]]
            late = run.steps >= run.steps[-1] - _LAST * (run.steps[-1] - run.steps[0])
            _, means = over_steps(run.steps[late], values[late], 1)
            count = values.shape[1]
            items = (np.arange(count) + 0.5) / count if panel.look.bins else np.arange(count)
            axes.plot(items, means[0], color=_color(r), linewidth=1.6, marker="o", markersize=3)
    axes.set_xlabel(panel.look.bins or "bin")
    axes.set_ylabel(panel.look.unit)
