"""Prompt lists of reinforcement learning, and the YAML that says which are used, how often and with which rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deepgen_jax.data.prompt_rows import Row, read_rows
from deepgen_jax.errors import DeepGenError, did_you_mean
from deepgen_jax.rewards.registry import canonical
from deepgen_jax.user_warnings import warn_user

#: "sample_proportional": a data set's chance is its weight times its size; "weight_only": only its weight.
SamplingMode = Literal["sample_proportional", "weight_only"]
_MODES: tuple[SamplingMode, ...] = ("sample_proportional", "weight_only")


@dataclass(frozen=True)
class Prompt:
    """One record of a prompt list; ``metadata`` holds its other fields, JSON values all."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptDataset:
    """One prompt list.

    Attributes:
      name: unique among the data sets of a run.
      prompts: its records.
      rewards: weight of every reward that counts for them.
      weight: multiplies its chance to be drawn.
    """

    name: str
    prompts: Sequence[Prompt]
    rewards: Mapping[str, float]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DeepGenError(f"prompt data set {self.name} is empty; add prompts or take it out")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DeepGenError(f"prompt data set {self.name}: sample_weight is {self.weight}; it must be above 0")
        if not any(self.rewards.values()) or not all(math.isfinite(weight) for weight in self.rewards.values()):
            raise DeepGenError(f"prompt data set {self.name} needs at least one reward with a finite weight, not 0")


def read_prompt_list(path: str | Path) -> list[Prompt]:
    """Reads the prompts of any file that `deepgen_jax.data.prompt_rows` reads; other fields are metadata.

    Rows that cannot be used are left out with one warning that counts them and names the first.

    Raises:
      DeepGenError: the file is missing, of an unknown type or damaged, or none of its rows can be used.
    """
    rows = read_rows(Path(path))
    prompts: list[Prompt] = []
    bad: list[str] = []
    for row in rows:
        try:
            prompts.append(_prompt(row))
        except DeepGenError as error:
            bad.append(f"{row.where}: {error}")
    if bad and not prompts:
        raise DeepGenError(f"none of the {len(bad)} rows of {path} can be used; the first: {bad[0]}")
    if bad:
        warn_user(f"{path}: {len(bad)} of {len(rows)} rows cannot be used and are left out; the first: {bad[0]}")
    return prompts


def _prompt(row: Row) -> Prompt:
    text, column = row.prompt()
    metadata = {name: value for name, value in row.fields.items() if name != column}
    try:
        json.dumps(metadata)
    except (TypeError, ValueError, RecursionError) as error:
        raise DeepGenError(f"the other fields must be JSON values ({error})") from None
    return Prompt(text.strip(), metadata)


def read_prompt_config(
    path: str | Path, absent: Literal["error", "skip"] = "error"
) -> tuple[list[PromptDataset], SamplingMode]:
    """Reads a YAML of data sets, and the prompt lists that it names.

    ::

        sampling_mode: sample_proportional   # or weight_only
        datasets:
          - name: text_rendering
            path: text_rendering.txt
            sample_weight: 3.0               # 1 where absent
            rewards:                         # a list as here, or one mapping
              - preference: 0.2
              - ocr: 0.8

    A relative path is searched for next to the YAML, then in the working folder. If a file is missing, its base name is
    searched for next to the YAML.

    Args:
      path: the YAML.
      absent: what to do if the file of a data set is missing; "skip" leaves the data set out with a warning.

    Returns:
      the data sets, in order, and the sampling mode.

    Raises:
      DeepGenError: the YAML is not of this form, or files are absent (all are named).
    """
    path = Path(path)
    config = _mapping(_load_yaml(path), f"{path}", {"sampling_mode", "datasets"})
    mode = config.get("sampling_mode", _MODES[0])
    if mode not in _MODES:
        raise DeepGenError(f"{path}: sampling_mode is {mode!r}{did_you_mean(str(mode), _MODES)}")
    entries = config.get("datasets")
    if not isinstance(entries, list) or not entries:
        raise DeepGenError(f"{path}: 'datasets' must be a list of at least one data set")
    parsed = [_entry(entry, f"{path}: datasets[{place}]") for place, entry in enumerate(entries)]
    names = [entry.name for entry in parsed]
    for name in names:
        if names.count(name) > 1:
            raise DeepGenError(f"{path}: two data sets are called {name!r}; names must differ")
    found = {entry.name: _find(entry.path, path.parent) for entry in parsed}
    lost = [f"{entry.path} ({entry.name})" for entry in parsed if found[entry.name] is None]
    if lost and (absent == "error" or len(lost) == len(parsed)):
        raise DeepGenError(
            f"{path}: {len(lost)} of {len(parsed)} prompt lists are not there: {', '.join(lost)}; "
            "put them next to the YAML or remove their data sets"
        )
    if lost:
        warn_user(f"{path}: {len(lost)} of {len(parsed)} prompt lists are not there and left out: {', '.join(lost)}")
    datasets = [
        PromptDataset(entry.name, read_prompt_list(where), entry.rewards, entry.weight)
        for entry in parsed
        if (where := found[entry.name]) is not None
    ]
    return datasets, mode


@dataclass(frozen=True)
class _Entry:
    name: str
    path: str
    weight: float
    rewards: Mapping[str, float]


def _entry(values: Any, where: str) -> _Entry:
    values = _mapping(values, where, {"name", "path", "sample_weight", "rewards"})
    for name in ("name", "path"):
        if not isinstance(values.get(name), str) or not values[name]:
            raise DeepGenError(f"{where}: {name!r} must be a text")
    weight = values.get("sample_weight", 1.0)
    if not _is_number(weight):
        raise DeepGenError(f"{where}: sample_weight is {weight!r}; it must be a number")
    return _Entry(values["name"], values["path"], float(weight), _rewards(values.get("rewards"), where))


def _rewards(values: Any, where: str) -> dict[str, float]:
    """A mapping, or a list of mappings, of rewards to weights."""
    items = values if isinstance(values, list) else [values]
    rewards: dict[str, float] = {}
    for item in items:
        if not isinstance(item, dict) or not item:
            raise DeepGenError(f"{where}: 'rewards' must be a mapping of rewards to weights, or a list of such")
        for name, weight in item.items():
            if not isinstance(name, str) or not _is_number(weight):
                raise DeepGenError(f"{where}: the weight of reward {name} is {weight!r}; it must be a number")
            if canonical(name) in rewards:
                raise DeepGenError(f"{where}: reward {name} is listed twice")
            rewards[canonical(name)] = float(weight)
    return rewards


def _find(path: str, folder: Path) -> Path | None:
    """See `read_prompt_config`; an absolute path replaces the folder that it is joined to."""
    places = (folder / path, Path(path), folder / Path(path).name)
    return next((place for place in places if place.is_file()), None)


def _load_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeepGenError(f"{path} does not exist; give the YAML of the prompt data sets") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DeepGenError(f"{path} cannot be read as YAML ({' '.join(str(error).split())[:200]})") from error


def _mapping(values: Any, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DeepGenError(f"{where} is no mapping; it may have {', '.join(sorted(known))}")
    for name in values:
        if name not in known:
            raise DeepGenError(f"{where}: unknown field {name!r}{did_you_mean(str(name), sorted(known))}")
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
