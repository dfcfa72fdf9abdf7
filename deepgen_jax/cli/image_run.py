"""Generates planned images into a resumable folder, in one or several processes."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from deepgen_jax.cli.processes import ProcessOptions
from deepgen_jax.cli.stopping import Stop
from deepgen_jax.errors import DeepGenError, is_out_of_memory
from deepgen_jax.inference.batch import Failure, Request, Settings, batch_sizes, render
from deepgen_jax.inference.outputs import Model, OutputFolder, describe
from deepgen_jax.terminal import progress_bar
from deepgen_jax.user_warnings import warn_user

#: Writes what is derived from finished images, given their metadata by file; returns the paths written.
Finish = Callable[[Mapping[str, Mapping[str, Any]]], Sequence[Path]]


@dataclass(frozen=True)
class FolderResult:
    """Result of a run in its folder.

    Attributes:
      metadata: of each finished image by file.
      status: exit status: 0, 1 where some records gave no image, 128 + signal where the run was stopped.
    """

    metadata: Mapping[str, Mapping[str, Any]]
    status: int


@dataclass(frozen=True)
class ImageRun:
    """How images are made: model, batches, devices and processes.

    Attributes:
      folder: the model folder.
      settings: shared by all images.
      batch_size: images at once.
      dtype: "float32", "bfloat16" or "auto".
      mesh: such as "data=8"; None or "auto" for `auto_mesh`, and of several processes for `usual_mesh`.
      compilation_cache: where compiled programs are kept.
      processes: the other processes, joined already.
    """

    folder: Path
    settings: Settings
    batch_size: int
    dtype: str
    mesh: str | None
    compilation_cache: str | None
    processes: ProcessOptions

    def fill_folder(
        self,
        output: OutputFolder,
        requests: Sequence[Request],
        failures: Sequence[Failure] = (),
        *,
        overwrite: bool = False,
        keep_others: bool = False,
        begin: Callable[[], None] | None = None,
        finish: Finish | None = None,
        derived: str = "",
    ) -> FolderResult:
        """Makes what ``output`` lacks, and reports on stdout and stderr; for the first process.

        Args:
          output: the folder, not yet entered.
          requests: all images that it is to hold.
          failures: records that cannot be used, reported at the end with those that fail here.
          overwrite, keep_others: see `OutputFolder.missing`.
          begin: called once the folder is held, before anything is made.
          finish: called at the end with the metadata of finished images, the folder still held.
          derived: what ``finish`` writes, in the singular.
        """
        failed = list(failures)
        if failed:
            warn_user(f"{counted(failed, 'line')} cannot be used; the others continue and a list follows at the end")
        model = Model.of(self.folder, resolved_dtype(self.dtype))
        with output, Stop(graceful=True) as stop:
            if begin is not None:
                begin()
            metadata = {request.file: describe(request, self.settings, model) for request in requests}
            missing = set(output.missing(metadata.values(), overwrite, keep_others=keep_others))
            todo = self._missing(requests, missing)
            made: list[str] = []

            def save(request: Request, image: Image.Image) -> None:
                output.save(image, metadata[request.file])
                made.append(request.file)

            cut_short = False
            if todo:
                new = self.make(todo, requests, save, lambda: stop.signum is not None)
                failed += new
                cut_short = len(made) + len(new) < len(todo)
            unfinished = missing.difference(made)
            finished = {file: values for file, values in metadata.items() if file not in unfinished}
            written = finish(finished) if finish else ()
        ready = len(requests) - len(missing)
        already = f" ({ready} there already)" if ready else ""
        beside = f", and {counted(written, derived)}" if derived else ""
        print(f"{counted(made, 'image')} written to {output.path}{already}{beside}")
        if failed:
            reasons = list(dict.fromkeys(map(str, failed)))
            text = "\n  ".join([f"deepgen: error: {counted(reasons, 'prompt')} gave no image:", *reasons])
            print(text, file=sys.stderr)
        if cut_short:
            so_far = f"{len(made) + ready} of {len(requests)} images are in {output.path}"
            cause = stop.name or "another process"
            print(f"deepgen: stopped by {cause}: {so_far}; run the same command for the rest", file=sys.stderr)
            return FolderResult(finished, 128 + (stop.signum or signal.SIGTERM))
        return FolderResult(finished, 1 if failed else 0)

    def follow(self, requests: Sequence[Request], into_folder: bool) -> int:
        """Computes with the first of several processes, which writes and reports for all."""
        todo = self._missing(requests, set()) if into_folder else list(requests)
        with Stop(graceful=into_folder) as stop:
            if todo:
                self.make(todo, requests, lambda *_: None, lambda: stop.signum is not None)
        return 0

    def make(
        self,
        todo: Sequence[Request],
        planned: Sequence[Request],
        save: Callable[[Request, Image.Image], None],
        stopped: Callable[[], bool],
    ) -> list[Failure]:
        """Loads the model and makes ``todo``, saving image by image, until done or ``stopped`` (any process)."""
        mesh = self._mesh(len(planned))
        pipe = load_pipeline(self.folder, resolved_dtype(self.dtype), mesh, self.compilation_cache)
        if self.processes.any(stopped()):
            return []
        sizes = batch_sizes(planned, self._whole_batch(mesh))
        failures: list[Failure] = []
        layers = [0.0, 0.0]

        def count(done: float, total: float) -> None:
            layers[0] += done
            layers[1] += total

        with progress_bar(len(planned), len(planned) - len(todo), "images") as bar:
            for batch in render(pipe, todo, sizes, self.settings, count):
                for request, result in batch:
                    if isinstance(result, DeepGenError):
                        failures.append(Failure(request.source, str(result)))
                    else:
                        save(request, result)
                bar.set_description_str("", refresh=False)
                bar.update(len(batch))
                if self.processes.any(stopped()):
                    break
        import jax

        if layers[1] and jax.process_index() == 0:
            saved = 1 - layers[0] / layers[1]
            print(f"{layers[0]:.0f} of {layers[1]:.0f} evaluations of MMDiT layers were run, {saved:.0%} saved")
        return failures

    def _missing(self, requests: Sequence[Request], missing: Collection[str]) -> list[Request]:
        """Those whose files the first process counts among ``missing``."""
        chosen = self.processes.broadcast([request.file in missing for request in requests])
        return [request for request, wanted in zip(requests, chosen, strict=True) if wanted]

    def _whole_batch(self, mesh: str | None) -> int:
        """The batch size, rounded up to what the mesh splits evenly: the rows are computed in any case."""
        if mesh is None:
            return self.batch_size
        from deepgen_jax.parallel.mesh import BATCH_AXES, parse_mesh

        sizes = parse_mesh(mesh)
        unit = math.prod(sizes[axis] for axis in BATCH_AXES)
        return -(-self.batch_size // unit) * unit

    def _mesh(self, images: int) -> str | None:
        given = self.processes.mesh if self.mesh in (None, "auto") else self.mesh
        return chosen_mesh(given, self.folder, self.dtype, images)


def load_pipeline(folder: Path, dtype: str, mesh: str | None, compilation_cache: str | None) -> Callable[..., Any]:
    """The pipeline, with compiled programs kept on disk."""
    from deepgen_jax.inference.cache import enable_compilation_cache
    from deepgen_jax.inference.pipeline import DeepGenPipeline

    enable_compilation_cache(compilation_cache)
    start = time.monotonic()
    try:
        pipe = DeepGenPipeline.from_pretrained(folder, dtype=dtype, mesh=mesh)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fix = "split the model over devices with --mesh" if dtype != "float32" else "use --dtype bfloat16 or --mesh"
        raise DeepGenError(f"out of memory while loading {folder}; {fix}") from error
    if sys.stderr.isatty():
        print(f"deepgen: loaded {folder} in {dtype}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return pipe


def chosen_mesh(mesh: str | None, folder: Path, dtype: str, images: int) -> str | None:
    """``mesh``, or for None and "auto" the one that `deepgen_jax.inference.auto_mesh` chooses, which is printed."""
    if mesh not in (None, "auto"):
        return mesh
    from deepgen_jax.inference.auto_mesh import auto_mesh

    chosen = auto_mesh(folder, resolved_dtype(dtype), images)
    if chosen is not None:
        print(f"deepgen: mesh {chosen} (auto)", file=sys.stderr, flush=True)
    return chosen


def resolved_dtype(dtype: str) -> str:
    """``dtype``, with "auto" as float32 on CPU and bfloat16 elsewhere."""
    if dtype != "auto":
        return dtype
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def counted(items: Sized, name: str) -> str:
    """ "1 image", "2 images"."""
    return f"{len(items)} {name}{'' if len(items) == 1 else 's'}"
