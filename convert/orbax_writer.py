"""Writes parameter trees as Orbax checkpoints, one piece at a time, so that memory holds no whole tree."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from .lazy_params import Leaf, Piece

#: Bytes buffered before a data file of the checkpoint is written out.
_DATA_FILE_BYTES = 256 * 2**20
#: Bytes of values that may wait for being written.
_PENDING_BYTES = 64 * 2**20


class _StreamingHandler(ocp.type_handlers.NumpyHandler):
    """Stores leaves like numpy arrays (and says so in the metadata), but makes their values while writing."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._progress = progress
        self._stores: dict[tuple[str, ...], Any] = {}
        self.error: BaseException | None = None
        self._cancelled = threading.Event()
        self._idle = threading.Event()
        self._idle.set()

    def cancel(self) -> None:
        """Stops before the next piece and waits for the one being written."""
        self._cancelled.set()
        self._idle.wait()

    async def _open_and_write(self, value: Leaf, tspec: dict[str, Any], ts_context: ts.Context) -> None:  # type: ignore[override]
        tspec["metadata"]["chunks"] = list(value.chunks)
        self._stores[value.path] = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)

    async def _background_serialize(  # type: ignore[override]
        self, values: Sequence[Leaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> None:
        self._idle.clear()
        try:
            await super()._background_serialize(values, infos, args)  # type: ignore[arg-type]
            await self._write_pieces([(leaf, piece) for leaf in values for piece in leaf.pieces])
        except Exception as error:
            # Orbax logs the traceback of any error in its threads but this one, and it passes none on unchanged.
            self.error = error
            raise asyncio.CancelledError from None
        finally:
            self._stores.clear()
            self._idle.set()

    async def _write_pieces(self, pieces: list[tuple[Leaf, Piece]]) -> None:
        """Makes and writes the pieces in their order, several small ones at a time."""
        writes: list[Any] = []
        pending = 0
        try:
            for leaf, piece in sorted(pieces, key=lambda item: item[1].order):
                if self._cancelled.is_set():
                    raise asyncio.CancelledError
                value = piece.value()
                store = self._stores[leaf.path][piece.index]
                writes.append(store.write(value, can_reference_source_data_indefinitely=True))
                pending += value.nbytes
                if pending > _PENDING_BYTES:
                    await asyncio.gather(*writes)
                    writes, pending = [], 0
                self._progress(value.nbytes)
        except BaseException:
            # Submitted writes continue in the background; wait, as the folder is about to be removed.
            await asyncio.gather(*writes, return_exceptions=True)
            raise
        await asyncio.gather(*writes)


def nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """A tree of dicts from values by path."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def write_tree(folder: Path, leaves: Sequence[Leaf], progress: Callable[[int], None]) -> None:
    """Writes ``leaves`` to the new checkpoint ``folder``; ``progress`` is called with the bytes of each piece."""
    handler = _StreamingHandler(progress)
    registry = ocp.type_handlers.create_type_handler_registry(
        (Leaf, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    tree = nested({leaf.path: leaf for leaf in leaves})
    args = ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=_DATA_FILE_BYTES)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        try:
            checkpointer.save(folder.absolute(), args=args)
        except BaseException:
            handler.cancel()
            if handler.error is not None:
                raise handler.error from None
            raise
    # Orbax writes here where the folder was made, which is of no use once it is moved or shared.
    (folder / "commit_success.txt").write_text("Checkpoint commit was successful\n")
