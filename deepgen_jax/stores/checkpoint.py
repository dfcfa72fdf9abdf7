"""Checkpoints of a run: arrays (parameters, optimiser, counters) and a JSON position, saved as one unit."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from deepgen_jax import files
from deepgen_jax.errors import DeepGenError, first_line, is_out_of_memory
from deepgen_jax.stores import checksums, orbax_logs
from deepgen_jax.stores.run_folder import CHECKPOINTS, checkpoint_folder, pinned_steps, saved_steps

Tree = dict[str, Any]
T = TypeVar("T")

#: The item of a checkpoint that holds its arrays.
STATE = "state"
#: Where a run's folder keeps the checkpoints that a run from an earlier one put aside.
SET_ASIDE = "set-aside"


class Checkpoints:
    """A run's checkpoints, written in the background by all hosts together; incomplete ones are never seen.

    Leaving the context waits for the one that is being written.
    """

    def __init__(self, run: Path, keep_last: int = 3, keep_every: int = 0) -> None:
        """Opens or makes ``run/checkpoints`` and removes what a killed run left half written there.

        Args:
          run: folder of the run.
          keep_last: how many of the newest are kept.
          keep_every: those of steps divisible by this are kept for good; 0 for none.
        """
        self._folder = (run / CHECKPOINTS).absolute()
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep_last), _Pinned(run.absolute())]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        # The step and the number of bytes of the newest call of `save`.
        self._writing = (0, 0)
        # Checksums of a checkpoint are made in the background once it is complete.
        self._sealing = ThreadPoolExecutor(1, "deepgen-checksums")
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except OSError as error:
            raise files.write_error(self._folder, error) from error

    def __enter__(self) -> Checkpoints:
        orbax_logs.hide()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._manager.close()
        except Exception as failure:  # Orbax wraps errors of its threads in various types
            if kind is None:
                raise self._unwritable(failure) from failure
        else:
            self._seal()
        finally:
            self._sealing.shutdown(wait=True)
            orbax_logs.show()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Starts writing; returns when the state is copied, so that its buffers may be reused.

        Args:
          step: optimiser steps taken.
          state: a NamedTuple of trees of arrays on the mesh.
          position: everything else that resuming needs, JSON.

        Raises:
          DeepGenError: this or the previous checkpoint could not be written.
        """
        if step in self._manager.all_steps():
            return
        values = state._asdict()
        items = ocp.args.Composite(state=ocp.args.StandardSave(values), position=ocp.args.JsonSave(position))
        try:
            self._manager.wait_until_finished()
            self._seal()
            checksums.unseal(self._folder / str(step))
            self._writing = step, sum(x.nbytes for x in jax.tree.leaves(values))
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # Orbax wraps errors of its threads in various types
            raise self._unwritable(error) from error

    def _seal(self) -> None:
        """Lists the checksums of the checkpoint that was written last, which is complete."""
        folder = self._folder / str(self._writing[0])
        if self._writing[1] and folder.is_dir():
            self._sealing.submit(checksums.seal, folder)

    def check(self) -> None:
        """Raises a DeepGenError where writing in the background has failed; does not wait."""
        if self._manager.is_saving_in_progress():
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax wraps errors of its threads in various types
            raise self._unwritable(error) from error

    def restore(self, step: int, like: T) -> tuple[T, dict[str, Any]]:
        """A checkpoint's state, sharded as ``like`` is, and its position.

        Args:
          step: of the checkpoint.
          like: the NamedTuple with arrays, or shapes with shardings; the mesh may differ from the one that saved.

        Raises:
          DeepGenError: the checkpoint is damaged, or of a different model or setting.
        """
        values = cast(Any, like)._asdict()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), values)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        try:
            checksums.verify_sealed(self._folder / str(step), "it is damaged")
            restored = self._manager.restore(step, args=items)
            return type(like)(**restored["state"]), dict(restored["position"])
        except Exception as error:  # Orbax wraps errors of reading in bare exceptions
            raise _unusable(self._folder / str(step), error) from error

    def _unwritable(self, error: Exception) -> DeepGenError:
        """The message for a checkpoint that could not be written; the half-written one is removed."""
        step, needed = self._writing
        last = max(saved_steps(self._folder.parent), default=None)
        kept = "no checkpoint was written before" if last is None else f"the checkpoint of step {last} is kept"
        what = f"{self._folder}: the checkpoint of step {step} cannot be written"
        if not files.is_disk_full(error):
            return DeepGenError(f"{what} ({first_line(error)}); {kept}")
        for partial in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            files.remove(partial)
        free = files.free_bytes(self._folder)
        if last is not None:  # small arrays take more than their bytes
            needed = max(needed, files.disk_usage(self._folder / str(last)))
        lacking = f": {files.size(needed - free)} are lacking" if needed > free else ", or less by a quota"
        return DeepGenError(
            f"{what}: it takes {files.size(needed)}, and the disk has {files.size(free)} free{lacking}; {kept}: free "
            "some space and give the same command again"
        )


def set_aside(run: Path, step: int) -> Path | None:
    """Moves the checkpoints of a run after ``step`` to the folder :data:`SET_ASIDE`, so that the run continues from it.

    Returns:
      that folder; None where there was none to move.

    Raises:
      DeepGenError: there is no checkpoint of that step, another run starts from a later one, or it cannot be moved.
    """
    checkpoint_folder(run, step)
    later = [saved for saved in saved_steps(run) if saved > step]
    if held := sorted(pinned_steps(run) & set(later)):
        raise DeepGenError(
            f"{run} cannot go back to step {step}: other runs started from its checkpoint of step {held[0]}; give "
            f"another out, and start={run}"
        )
    folder = run / SET_ASIDE
    try:
        for saved in later:
            folder.mkdir(exist_ok=True)
            files.remove(folder / str(saved))
            (run / CHECKPOINTS / str(saved)).rename(folder / str(saved))
    except OSError as error:
        raise files.write_error(folder, error) from error
    return folder if later else None


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
        checksums.verify_sealed(folder, "it is damaged")
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
    earlier = [step for step in saved_steps(folder.parent.parent) if step < int(folder.name)]
    fix = (
        f"--resume-from previous continues from step {earlier[-1]}"
        if earlier
        else "it is the earliest; remove it to begin again"
    )
    return DeepGenError(f"checkpoint {folder} cannot be used ({first_line(error)}); {fix}")
