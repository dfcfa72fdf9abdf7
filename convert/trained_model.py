"""A training run's checkpoint as a model: what was trained, in the run and before it, over the model folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from deepgen_jax.config import DeepGenConfig, LoRAConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.checkpoint import STATE, stored_weights
from deepgen_jax.stores.lineage import (
    ADAPTED,
    Saved,
    StartingPoint,
    adapter_scale,
    read_starting_point,
    trained_config,
    trained_until,
)
from deepgen_jax.stores.model_folder import read_manifest
from deepgen_jax.stores.run_folder import checkpoint_folder, newest_step, read_run

from .stored_params import (
    StoredAdapter,
    StoredArray,
    StoredModel,
    TreePath,
    open_folder,
    stored_adapters,
    stored_arrays,
)


class TrainedModel(NamedTuple):
    """A run's model, and JSON-ready facts of everything that it is made of, the run first."""

    model: StoredModel
    sources: list[dict[str, Any]]


def open_run(
    run: Path,
    *,
    step: int | None = None,
    ema: bool = False,
    keep_lora: bool = False,
    model: Path | None = None,
    start: Path | None = None,
) -> TrainedModel:
    """A checkpoint of a run; its model's ``config.lora`` is set with ``keep_lora``.

    Args:
      run: folder of the run.
      step: of the checkpoint; the newest by default.
      ema: take the moving average of what the run trained.
      keep_lora: keep the adapters separate.
      model: new path of the model folder that the run started from.
      start: new path of the run that it continued.

    Raises:
      DeepGenError: there is no such checkpoint, something that it builds on is missing, or the parts do not fit.
    """
    description = read_run(run)
    step = newest_step(run) if step is None else step
    here = Saved(run.absolute(), step)
    checkpoint_folder(run, step)
    origin = read_starting_point(run).moved(model, start)
    if not origin.model.is_dir():
        raise DeepGenError(f"{run} was trained on {origin.model}, which is gone; give --model FOLDER, its place now")
    base = open_folder(origin.model)
    config = trained_config(run, base.config)
    params, adapters = dict(base.params), dict(base.adapters)
    trained = trained_until(run, step, origin)
    for name, at in trained.items():
        _require(at, name, run, origin)
        tree = "ema" if ema and at == here else "trainable"
        stored, state = stored_weights(at.run, at.step, tree), checkpoint_folder(at.run, at.step) / STATE
        if name in ADAPTED:
            part = ADAPTED[name]
            factors = stored_arrays(state, {part: stored["lora"][part]}, (tree, "lora"))
            adapters = {path: adapter for path, adapter in adapters.items() if path[0] != part}
            adapters |= stored_adapters(factors, adapter_scale(at.run))
            name = part
        # Beside adapters, a layer of their part may train in full.
        arrays = stored_arrays(state, {name: stored["params"].get(name, {})}, (tree, "params"))
        _check_shapes(arrays, base, config, at.run)
        params |= arrays
    config = dataclasses.replace(config, lora=_common_adapters(adapters) if keep_lora else None)
    sources = [
        {"path": str(at.run), "layout": f"{kind} run, step {at.step}{', moving average' if ema and at == here else ''}"}
        | {"kind": kind, "step": at.step, "ema": ema and at == here, "trained": names}
        for at, kind, names in _by_checkpoint(trained, here, description["kind"])
    ]
    folder = {"path": str(origin.model), "layout": "model folder", "provenance": read_manifest(origin.model).provenance}
    whole = StoredModel(str(run), config, base.scheduler, base.tokenizer, params, adapters)
    return TrainedModel(whole, [*sources, folder])


def _by_checkpoint(trained: dict[str, Saved], here: Saved, kind: str) -> list[tuple[Saved, str, list[str]]]:
    """(checkpoint, kind of its run, what is taken from it), the run that is exported first."""
    others = sorted(set(trained.values()) - {here}, reverse=True)
    return [
        (at, kind if at == here else read_run(at.run)["kind"], [name for name in trained if trained[name] == at])
        for at in (here, *others)
    ]


def _require(at: Saved, name: str, run: Path, origin: StartingPoint) -> None:
    if not at.run.is_dir():
        fix = "give --start FOLDER, its place now" if at.run == origin.start else "put it back"
        raise DeepGenError(f"{run} has its {name} from {at.run}, which is gone; {fix}")


def _check_shapes(arrays: dict[TreePath, StoredArray], base: StoredModel, config: DeepGenConfig, run: Path) -> None:
    for path, array in arrays.items():
        shape = base.params[path].shape if path in base.params else None
        if shape is not None and path[:2] == ("mmdit", "proj_out"):
            shape = (*shape[:-1], shape[-1] * config.mmdit.estimates)
        if shape != array.shape:
            raise DeepGenError(
                f"{run} does not fit {base.where} at {'/'.join(path)}; give the model it was trained on as --model"
            )


def _common_adapters(adapters: dict[TreePath, StoredAdapter]) -> LoRAConfig:
    """Rank and alpha of adapters to keep."""
    if not adapters:
        raise DeepGenError("there are no adapters to keep; leave out --keep-lora")
    if any(path[0] == "mmdit" for path in adapters):
        raise DeepGenError("model folders and releases have no adapters on the MMDiT; leave out --keep-lora")
    kinds = {(adapter.a.shape[-1], adapter.scale) for adapter in adapters.values()}
    if len(kinds) > 1:
        listed = ", ".join(f"rank {rank} with scale {scale:g}" for rank, scale in sorted(kinds))
        raise DeepGenError(f"adapters of several kinds cannot be kept ({listed}); leave out --keep-lora")
    rank, scale = kinds.pop()
    return LoRAConfig(rank, scale * rank)
