"""A training run's folder without its arrays: description, steps of checkpoints, last metrics.

Importing this module is light.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.jsonl import last_line
from deepgen_jax.user_warnings import warn_user

#: The name of a run's description, in its folder.
RUN_FILE = "config.json"
RUN_FORMAT, RUN_VERSION = "deepgen-jax-run", 1
#: Where a run's folder keeps its checkpoints.
CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
#: Subfolder with one empty file for each step whose checkpoint later runs started from.
_PINNED = "pinned"


def is_run(folder: Path) -> bool:
    """Whether ``deepgen train`` wrote a folder."""
    try:
        values = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, Mapping) and values.get("format") == RUN_FORMAT


def read_run(folder: Path) -> dict[str, Any]:
    """A training run's description: {"kind", "config", "origin", ...}.

    Raises:
      DeepGenError: the folder is not one of a training run.
    """
    path = folder / RUN_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        values = {}
    except ValueError as error:
        raise DeepGenError(f"{path} cannot be read ({error}); give the folder of another training run") from None
    if not isinstance(values, Mapping) or values.get("format") != RUN_FORMAT:
        raise DeepGenError(f"{folder} is not a training run; give a folder that `deepgen train` wrote")
    if values.get("version") != RUN_VERSION:
        raise DeepGenError(f"{path} is of version {values.get('version')}, expected {RUN_VERSION}; update the package")
    return dict(values)


def recorded_choice(folder: Path) -> dict[str, Any] | None:
    """What was chosen for the devices that a run was on last: devices, mesh, remat and gather_frozen.

    None for a folder without a run, and for a run without checkpoints, which has not begun.
    """
    if not is_run(folder) or not saved_steps(folder):
        return None
    values = read_run(folder)
    if "chosen" in values or not values.get("devices"):
        chosen: dict[str, Any] | None = values.get("chosen")
        return chosen
    # Written before "auto", when "" was a mesh for the devices and all else was given.
    config = values["config"]
    settings = {"remat": config["remat"], "gather_frozen": config.get("gather_frozen", False)}
    return {"devices": values["devices"][-1], "mesh": config["mesh"] or None, **settings}


def saved_steps(run: Path) -> list[int]:
    """Steps of a run's complete checkpoints, in ascending order."""
    folder = run / CHECKPOINTS
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def pin(run: Path, step: int) -> None:
    """Protects the checkpoint of a step from removal by its run; warns where that cannot be recorded."""
    marker = run / _PINNED / str(step)
    if marker.exists():
        return
    try:
        marker.parent.mkdir(exist_ok=True)
        marker.touch()
    except OSError as error:
        warn_user(
            f"{marker} cannot be written ({error.strerror}); should {run} train on, keep its checkpoint of step "
            f"{step}, from which this run starts each time it is resumed"
        )


def pinned_steps(run: Path) -> set[int]:
    """Steps protected by :func:`pin`."""
    folder = run / _PINNED
    return {int(path.name) for path in folder.iterdir() if path.name.isdecimal()} if folder.is_dir() else set()


def newest_step(run: Path) -> int:
    """Step of a run's newest complete checkpoint.

    Raises:
      DeepGenError: it has none.
    """
    steps = saved_steps(run)
    if not steps:
        raise DeepGenError(f"{run} has no checkpoint; give the folder of a training run that has saved one")
    return steps[-1]


def checkpoint_folder(run: Path, step: int) -> Path:
    """Path of the checkpoint of a step.

    Raises:
      DeepGenError: there is none of that step.
    """
    steps = saved_steps(run)
    if step not in steps:
        raise DeepGenError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
    return (run / CHECKPOINTS / str(step)).absolute()


def last_metrics(run: Path) -> dict[str, Any] | None:
    """The newest entry of a run's metrics, or None."""
    return last_line(run / METRICS_FILE)
