"""Checkpoints of a run: trainable parameters, optimiser, moving average, counters and positions as one unit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from deepgen_jax.errors import DeepGenError, is_out_of_memory
from deepgen_jax.stores.run_folder import CHECKPOINTS, checkpoint_folder, pinned_steps
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.run_config import CheckpointConfig
from deepgen_jax.training.state import TrainState

#: The item of a checkpoint that holds its arrays.
STATE = "state"


class Checkpoints:
    """A run's checkpoints, written in the background by all hosts together; one that is not complete is never seen.

    Writing goes on while training does. Leaving the context waits for what is being written.
    """

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        """Opens or makes ``run/checkpoints`` and removes what a killed run left half written there."""
        self._folder = (run / CHECKPOINTS).absolute()
        kept: list[policies.PreservationPolicy] = [policies.LatestN(config.keep_last), _Pinned(run.absolute())]
        if config.keep_every:
            kept.append(policies.EveryNSteps(config.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Starts writing; returns when the state is copied, so that its buffers may be reused.

        Args:
          step: optimiser steps taken.
          state: arrays on the mesh.
          position: everything else that resuming needs, JSON.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), position=ocp.args.JsonSave(position))
        self._manager.save(step, args=items, force=True)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """A checkpoint's state, laid out on the mesh as ``like`` is, and its position.

        Args:
          step: of the checkpoint.
          like: arrays, or shapes with shardings; the mesh may differ from the one that saved.

        Raises:
          DeepGenError: the checkpoint is damaged or of another model or setting.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict()
        )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax wraps errors of reading in bare exceptions
            raise _unusable(self._folder / str(step), error) from error
        return TrainState(**restored["state"]), dict(restored["position"])


class _Pinned(policies.PreservationPolicy):
    """Keeps the checkpoints that other runs started from."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: policies.PreservationContext
    ) -> Sequence[bool]:
        pinned = pinned_steps(self._run)
        return [checkpoint.step in pinned for checkpoint in checkpoints]


def stored_weights(run: Path, step: int, tree: str = "trainable") -> Tree:
    """Shapes of a checkpoint's ``trainable`` or ``ema`` tree: {"params": ..., "lora": ...}.

    Raises:
      DeepGenError: no such checkpoint, it is damaged, or it has no such tree.
    """
    folder = checkpoint_folder(run, step)
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(folder / STATE).tree
    except Exception as error:
        raise _unusable(folder, error) from error
    stored = metadata.get(tree)
    if not stored:
        raise DeepGenError(f"{folder} has no moving average; the run had no ema_decay")
    return {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored.get(name) or {})
        for name in ("params", "lora")
    }


def load_weights(run: Path, step: int, wanted: Tree, tree: str = "trainable") -> Tree:
    """Arrays of a checkpoint's ``trainable`` or ``ema`` tree.

    Args:
      run: folder of the run.
      step: of the checkpoint.
      wanted: the part of :func:`stored_weights` that is read, each leaf with its dtype and sharding.
      tree: "trainable" or "ema".

    Raises:
      DeepGenError: no such checkpoint, or it is damaged.
    """
    folder = checkpoint_folder(run, step)
    item = {tree: wanted}

    def arguments(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=leaf.dtype, sharding=leaf.sharding)

    args = ocp.args.PyTreeRestore(item, restore_args=jax.tree.map(arguments, item), partial_restore=True)
    try:
        return ocp.PyTreeCheckpointHandler().restore(folder / STATE, args=args)[tree]
    except Exception as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: Exception) -> DeepGenError:
    if is_out_of_memory(error):
        return DeepGenError(f"out of memory while loading {folder}, which is whole; use more devices or another mesh")
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return DeepGenError(f"checkpoint {folder} cannot be used ({reason}); remove it to go on from an earlier one")
