"""Training report of DeepGen-nano, a section of its documentation page, from run folders and saved scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import replacing
from deepgen_jax.settings import to_json
from deepgen_jax.stores.run_folder import read_run
from deepgen_jax.training.config_files import load_config, packaged_configs
from deepgen_jax.training.curves import LOOKS, Curves, Panel, read_curves
from deepgen_jax.training.plot import DPI, draw_apart
from deepgen_jax.training.run_config import RunConfig
from deepgen_jax.user_warnings import warn_user

#: Lines of the page that delimit the report.
BEGIN, END = "<!-- begin of deepgen nano report -->", "<!-- end of deepgen nano report -->"
#: Plot of the curves, relative to the page.
PICTURE = Path("images/nano_curves.png")
#: Final values are means over this last share of the logged steps.
_LAST = 0.05
#: Settings that do not affect what a model learns: paths, logging, checkpoints and devices.
_ASIDE = (
    "model", "start", "out", "steps", "seed", "mesh", "checkpoints", "log", "samples", "eval", "pictures_every",
    "prompts.path",
)  # fmt: skip


@dataclass(frozen=True)
class StageRun:
    """The run of one training stage.

    Attributes:
      name: name of its configuration.
      description: description of the run (`read_run`).
      curves: logged metrics.
      changes: settings that differ from the configuration, "path.to.field=value".
    """

    name: str
    description: Mapping[str, Any]
    curves: Curves
    changes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Training time; steps repeated after a resume count once."""
        return float(np.nansum(self._each("seconds/step") * self._gaps))

    @property
    def samples(self) -> int:
        """Number of training samples."""
        return round(float(np.nansum(self._each("seconds/step") * self._each("samples_per_second") * self._gaps)))

    def last(self, metric: str) -> float:
        """Mean over the last steps; NaN if it was not logged."""
        steps, values = self.curves.steps, self._each(metric)
        late = values[steps > steps[-1] * (1 - _LAST)]
        return float(np.mean(late[np.isfinite(late)])) if np.isfinite(late).any() else float("nan")

    @property
    def rewards(self) -> list[str]:
        """Names of mean-reward metrics over all prompts."""
        return [name for name in self.curves.values if _is_reward(name)]

    @property
    def _gaps(self) -> np.ndarray:
        """Number of steps since the previous logged one."""
        return np.diff(self.curves.steps, prepend=0)

    def _each(self, metric: str) -> np.ndarray:
        return self.curves.values.get(metric, np.full(len(self.curves.steps), np.nan))


@dataclass(frozen=True)
class Scores:
    """Output of ``deepgen eval nano --json``: settings, and rows by skill."""

    label: str
    settings: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]


def write_report(page: Path, runs: Path, scores: Sequence[Scores], device: str = "") -> Path:
    """Writes the report into a page, and its plot; replaces both files atomically.

    Args:
      page: a Markdown file with the lines `BEGIN` and `END`.
      runs: folder of the runs, named like the last part of their configurations' ``out``.
      scores: one column each.
      device: device of runs that did not record it.

    Returns:
      Path of the plot.

    Raises:
      DeepGenError: the page lacks `BEGIN` or `END`, no stage was run, or a file cannot be read or written.
    """
    before, after = _around(page)
    found = read_stages(runs)
    figure = draw_apart([_panel(stage) for stage in found])
    picture = page.parent / PICTURE
    text = "\n".join([BEGIN, "", *lines(found, scores, device), END])
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeepGenError(f"folder {picture.parent} cannot be made: {error.strerror or error}") from error
    with replacing(picture) as new_picture, replacing(page) as new_page:
        figure.savefig(new_picture, dpi=DPI, format="png")
        new_page.write_text(before + text + after, encoding="utf-8")
    return picture


def read_stages(runs: Path) -> list[StageRun]:
    """Stages that were run, in order; warns about missing ones.

    Raises:
      DeepGenError: no stage was run, or a folder is not a run with logged metrics.
    """
    found: list[StageRun] = []
    for name, config in stages():
        folder = runs / Path(config.out).name
        if not folder.exists():
            warn_user(f"{folder} does not exist; {name} is left out")
            continue
        description = read_run(folder)
        found.append(StageRun(name, description, read_curves(folder, name), _changes(config, description["config"])))
    if not found:
        raise DeepGenError(f"{runs} has no run of nano's configurations; name the folder of the runs with --runs")
    return found


def stages() -> list[tuple[str, RunConfig]]:
    """Names and configurations of nano's stages; each follows the stage that it starts from."""
    configs = {name: load_config(name) for name in packaged_configs() if name.startswith("nano/")}
    by_out = {config.out: config for config in configs.values()}

    def depth(config: RunConfig) -> int:
        return 1 + depth(by_out[config.start]) if config.start in by_out else 0

    return sorted(configs.items(), key=lambda item: (depth(item[1]), item[0]))


def read_scores(label: str, path: Path) -> Scores:
    """Reads saved scores.

    Raises:
      DeepGenError: the file cannot be read or is not output of ``deepgen eval nano --json``.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["skill"]: row for row in values["rows"]}
        for row in rows.values():
            float(row["share"]), float(row["low"]), float(row["high"]), int(row["count"])
            # Only in rows of edits, and absent from scores saved by earlier versions.
            float(row.get("kept_share", 0))
        settings = {name: values[name] for name in ("prompts", "seed", "size", "steps", "guidance")}
        # None for renders, which have no sampler settings.
        float(settings["guidance"])
    except OSError as error:
        raise DeepGenError(f"scores {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DeepGenError(f"{path} is not what `deepgen eval nano MODEL --json` prints ({error!r})") from None
    return Scores(label, settings, rows)


def lines(found: Sequence[StageRun], scores: Sequence[Scores], device: str = "") -> Iterator[str]:
    """The report in Markdown."""
    yield "Written by `deepgen nano report` from what the runs have logged; values at the end are means of the last"
    yield "5% of the steps."
    yield ""
    yield "| stage | seed | steps | samples | time | device | at the end |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for stage in found:
        devices = ", ".join(stage.description.get("devices") or ([device] if device else ["not recorded"]))
        cells = [f"`{stage.name}`", stage.description["config"]["seed"], _steps(stage), f"{stage.samples:,}"]
        yield _row([*cells, _time(stage.seconds), devices, _ending(stage)])
    yield ""
    for stage in found:
        if stage.changes:
            yield f"`{stage.name}` ran with {', '.join(f'`{change}`' for change in stage.changes)}."
            yield ""
    yield f"![Loss of each stage over its steps; rewards where it learned from them]({PICTURE})"
    yield ""
    if scores:
        yield from _table(scores)


def _table(scores: Sequence[Scores]) -> Iterator[str]:
    yield "Held-out samples that came out right, with 95% intervals:"
    yield ""
    yield _row(["skill", *(column.label for column in scores)])
    yield _row(["---"] * (1 + len(scores)))
    for skill in dict.fromkeys(skill for column in scores for skill in column.rows):
        yield _row([f"`{skill}`", *(_score(column.rows.get(skill)) for column in scores)])
    yield ""
    for column in scores:
        used = column.settings
        yield (
            f"- {column.label}: {used['prompts']:,} samples a skill, {used['steps']} steps of denoising, guidance "
            f"{used['guidance']:g}, {used['size']} pixels a side, seed {used['seed']}"
        )
    yield ""


def _score(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    right = f"{row['share']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
    return f"{right}; rest kept {row['kept_share']:.1%}" if "kept_share" in row else right


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _steps(stage: StageRun) -> str:
    done, wanted = int(stage.curves.steps[-1]), stage.description["config"]["steps"]
    return f"{done:,}" if done >= wanted else f"{done:,} of {wanted:,}"


def _ending(stage: StageRun) -> str:
    """The final loss and, if any, rewards."""
    loss = stage.last("loss")
    losses = [f"loss {loss:.3g}"] if np.isfinite(loss) else []
    return ", ".join([*losses, *(f"{_reward(name)} {stage.last(name):.3f}" for name in stage.rewards)])


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _panel(stage: StageRun) -> tuple[Curves, Panel]:
    """The panel of a stage: its rewards if it has any, else its loss."""
    if stage.rewards:
        values = {_reward(name): stage.curves.values[name] for name in stage.rewards}
        return Curves(stage.name, stage.curves.steps, values), Panel("reward", LOOKS["reward"], tuple(values), False)
    return stage.curves, Panel("loss", LOOKS["loss"], ("loss",), False)


def _is_reward(name: str) -> bool:
    return name.startswith("reward/") and name.endswith("/mean") and "@" not in name


def _reward(metric: str) -> str:
    return metric.removeprefix("reward/").removesuffix("/mean")


def _changes(config: RunConfig, run: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings of a run that differ from its configuration."""
    return tuple(_differences(to_json(config), run, ""))


def _differences(before: Any, now: Any, path: str) -> Iterator[str]:
    if path in _ASIDE:
        return
    # Settings that the run did not record were added later.
    if isinstance(before, dict) and isinstance(now, dict) and now.keys() <= before.keys():
        for name in now:
            yield from _differences(before[name], now[name], f"{path}.{name}" if path else name)
    elif before != now:
        yield f"{path}={now if isinstance(now, str) else json.dumps(now)}"


def _around(page: Path) -> tuple[str, str]:
    """Text of the page before and after the report."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DeepGenError(f"{page} cannot be read ({error}); give the page with --out") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DeepGenError(f"{page} has no place for the report; write {BEGIN!r} and {END!r} there, a line each")
    before, _, rest = text.partition(BEGIN)
    return before, rest.partition(END)[2]
