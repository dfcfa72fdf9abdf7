"""Origin of a run's starting weights, pinned at its first launch.

A run starts from a model folder, perhaps with what earlier runs trained on top. The latest values of one thing that
trains may be several runs back: reinforcement learning starts from a run that trained bridge, MMDiT and adapters, and
trains the MMDiT alone. So a run's description lists, for everything that was ever trained, the run and the step that
hold it. An earlier run that trains on later does not change what its successors started from.

Importing this module is light.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from deepgen_jax.config import DeepGenConfig, from_dict, to_dict
from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores import model_folder
from deepgen_jax.stores.run_folder import RUN_FILE, newest_step, read_run

#: Adapters that train, by their name in a run's ``trains`` -> the part on which they sit.
ADAPTED = {"lora": "text", "mmdit_lora": "mmdit"}
#: Entry of a run's description: what training changes in the model's configuration, see :func:`changed`.
MODEL_CHANGES = "model_changes"


class Run(Protocol):
    """The entries of a run's configuration that say what it starts from."""

    @property
    def out(self) -> str: ...
    @property
    def start(self) -> str: ...
    @property
    def model_folder(self) -> Path: ...


class Saved(NamedTuple):
    """A run and the step of one of its checkpoints."""

    run: Path
    step: int


@dataclass(frozen=True)
class StartingPoint:
    """Starting point of a run, with absolute paths.

    Attributes:
      model: the model folder.
      start: the earlier run that the config names, or None.
      inherited: names as in a run's ``trains`` -> the checkpoint with their latest values; what is not named is the
        model folder's.
    """

    model: Path
    start: Path | None
    inherited: Mapping[str, Saved]

    def to_json(self) -> dict[str, Any]:
        """As a run's description holds it."""
        return {
            "model": str(self.model),
            "start": str(self.start or ""),
            "inherited": {name: {"run": str(at.run), "step": at.step} for name, at in self.inherited.items()},
        }

    def moved(self, model: Path | None, start: Path | None) -> StartingPoint:
        """The same with the model folder, and the run it started from, in other places."""
        model = self.model if model is None else model.absolute()
        if start is None:
            return replace(self, model=model)
        start = start.absolute()
        inherited = {
            name: at._replace(run=start) if at.run == self.start else at for name, at in self.inherited.items()
        }
        return StartingPoint(model, start, inherited)


def read_starting_point(run: Path) -> StartingPoint:
    """The origin in a run's description.

    Raises:
      DeepGenError: the folder is not one of a training run, or its description is damaged.
    """
    description = read_run(run)
    try:
        values = description["origin"]
        inherited = {name: Saved(Path(at["run"]), int(at["step"])) for name, at in values["inherited"].items()}
        return StartingPoint(Path(values["model"]), Path(values["start"]) if values["start"] else None, inherited)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeepGenError(f"{run / RUN_FILE} is damaged ({error!r}); give another run") from None


def starting_point_of(config: Run) -> StartingPoint:
    """Starting point of a run: as pinned in its folder, or, before its first launch, the newest checkpoint.

    Raises:
      DeepGenError: ``config.start`` is no run, has no checkpoint or is of another model, or the folder is damaged.
    """
    if (Path(config.out) / RUN_FILE).is_file():
        start = Path(config.start) if config.start else None
        return read_starting_point(Path(config.out)).moved(config.model_folder, start)
    return newest_starting_point(config)


def newest_starting_point(config: Run) -> StartingPoint:
    """Starting point that a run would have now.

    Raises:
      DeepGenError: ``config.start`` is no run, has no checkpoint or is of another model.
    """
    model, start = config.model_folder, Path(config.start) if config.start else None
    if start is None:
        return StartingPoint(model.absolute(), None, {})
    if read_run(start).get(MODEL_CHANGES):
        raise DeepGenError(
            f"{start} was distilled to few steps, and no training continues from that; export it, or give the run that "
            "it was distilled from"
        )
    base = read_starting_point(start).model
    if not _same_model(base, model):
        raise DeepGenError(f"{start} was trained on {base}, another model than {model}; give model={base}")
    return StartingPoint(model.absolute(), start.absolute(), trained_until(start, newest_step(start)))


def trained_until(run: Path, step: int, origin: StartingPoint | None = None) -> dict[str, Saved]:
    """Names as in a run's ``trains`` -> the checkpoint with the latest values, at a step of a run.

    Args:
      run: folder of the run.
      step: of its checkpoint.
      origin: of the run; by default the one in its description.

    Raises:
      DeepGenError: the folder is not one of a training run, or its description is damaged.
    """
    trains = read_run(run)["config"]["trains"]
    kept = dict((read_starting_point(run) if origin is None else origin).inherited)
    for adapters, part in ADAPTED.items():
        if part in trains:  # they were merged into what has trained since
            kept.pop(adapters, None)
    return kept | dict.fromkeys(trains, Saved(run.absolute(), step))


def changed(config: DeepGenConfig, changes: Mapping[str, Any], where: str) -> DeepGenConfig:
    """A model's configuration with entries of its JSON form replaced; what is not named in a nested one stays.

    Args:
      config: of the model.
      changes: such as {"mmdit": {"estimates": 8}, "sampler": "pi_flow"}.
      where: they come from, for messages.

    Raises:
      DeepGenError: an entry is unknown or of the wrong type.
    """
    values = to_dict(config)
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, Mapping) else value
    return from_dict(DeepGenConfig, values, where)


def trained_config(run: Path, config: DeepGenConfig) -> DeepGenConfig:
    """Configuration of the model that a run trains, from that of the model folder it started from."""
    return changed(config, read_run(run).get(MODEL_CHANGES, {}), str(run / RUN_FILE))


def adapter_scale(run: Path) -> float:
    """Alpha over rank of a run's adapters."""
    settings = read_run(run)["config"]["lora"]
    return settings["alpha"] / settings["rank"]


def _same_model(one: Path, other: Path) -> bool:
    """Whether two folders hold the same model: the same path, or the same weights."""
    if one.absolute() == other.absolute() or not (one / "config.json").is_file():
        return True
    first, second = model_folder.read_manifest(one), model_folder.read_manifest(other)
    return first.config == second.config and first.files == second.files
