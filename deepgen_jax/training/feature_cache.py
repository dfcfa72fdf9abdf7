"""Runs the frozen encoders over every usable sample of a data configuration once and stores their outputs.

A source is read in the order of its buckets and cut into shards of a fixed number of planned samples. A shard appears
when it is whole, so that an interrupted run continues with the first missing shard.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from deepgen_jax import files, locks
from deepgen_jax.data.batch_images import PixelBatch
from deepgen_jax.data.buckets import Bucket
from deepgen_jax.data.data_config import DataConfig, SourceConfig
from deepgen_jax.data.feature_files import DTYPES, MANIFEST, FeatureManifest, encoder_configs
from deepgen_jax.data.feature_shards import ShardCounts, ShardWriter, count_shards, shard_path
from deepgen_jax.data.indexing import open_indices
from deepgen_jax.data.plan import Plan
from deepgen_jax.data.prompt_encoder import PromptEncoder
from deepgen_jax.data.reader import Skipped, check_share, default_threads
from deepgen_jax.data.sources import BadSample, open_source, read_row, require_images
from deepgen_jax.data.sources.base import CachedImage, located
from deepgen_jax.data.tokens import round_up
from deepgen_jax.data.transforms import UNIT
from deepgen_jax.errors import DeepGenError, is_out_of_memory
from deepgen_jax.parallel.mesh import batch_sharding, make_mesh
from deepgen_jax.stores import model_folder
from deepgen_jax.terminal import progress_bar
from deepgen_jax.training.encoders import encoder_digest, load_encoders
from deepgen_jax.training.inputs import Features, encode

T = TypeVar("T")
R = TypeVar("R")

# Batches read, and batches encoded, before the one that is being written.
_READ_AHEAD, _ENCODED_AHEAD = 2, 1

_DIFFERENCES = {
    "data_digest": "other data, or other settings that choose samples and sizes",
    "weights": "the weights of another model",
    "vae": "another VAE",
    "vision": "another vision tower",
}


class CachedSource(NamedTuple):
    """The source to train from, and the contents of its shards."""

    entry: SourceConfig
    shards: ShardCounts


class _Planned(NamedTuple):
    """Samples to encode together: of one shard, and one bucket."""

    shard: int
    bucket: Bucket
    rows: np.ndarray


class _Read(NamedTuple):
    """Pixels and texts of planned samples; a text is a `BadSample` where one could not be read."""

    planned: _Planned
    pixels: dict[str, Any]
    texts: list[str | BadSample]


def cache_features(
    data: DataConfig, model: Path, dtype: str, out: Path, *, shard_size: int = 1024, batch_size: int = 8
) -> list[CachedSource]:
    """Writes a folder of features for each source into ``out``, or continues an interrupted run.

    Args:
      data: the samples; its buckets decide the sizes.
      model: the model folder.
      dtype: of the computation.
      out: folder of the cache.
      shard_size: samples of a shard.
      batch_size: samples encoded at a time; rounded up to a multiple of this host's devices.

    Raises:
      DeepGenError: a source or the model cannot be used, ``out`` holds something else, or too many samples are bad.
    """
    for name, value in (("--shard-size", shard_size), ("--batch-size", batch_size)):
        if value < 1:
            raise DeepGenError(f"{name} is {value}; use 1 or more")
    if dtype not in DTYPES:
        raise DeepGenError(f"dtype {dtype!r} cannot be cached; choose one of {', '.join(DTYPES)}")
    if cached := [source.name for source in data.sources if source.kind == "features"]:
        raise DeepGenError(f"source {cached[0]} is cached already; name the sources that it was made from")
    folders = _folders(data, out)
    config = model_folder.read_manifest(model).config
    prompts = PromptEncoder(model / "tokenizer", config)
    require_images(data.sources)
    plan = Plan(data, open_indices(data, prompts), prompts)
    weights = encoder_digest(model)
    sources: list[_SourceCache] = []
    with _one_line_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with locks.locked(out):
        for number, source in enumerate(data.sources):
            rows = list(plan.rows_by_bucket(number))
            manifest = FeatureManifest(
                source=source.name,
                task=source.task,
                samples=sum(len(part) for _, part in rows),
                shard_size=shard_size,
                data_digest=_data_digest(plan, number),
                weights=weights,
                **encoder_configs(config),
                image_size=data.image_size,
                transform=data.transform,
                dtype=dtype,
            )
            _prepare(folders[number], manifest)
            sources.append(_SourceCache(plan, prompts, number, folders[number], manifest, rows))
        done, total = (sum(getattr(source, name) for source in sources) for name in ("done", "total"))
        if done < total:
            devices = jax.local_devices()
            encoders = _Encoders(model, dtype, round_up(batch_size, len(devices)), devices)
            with progress_bar(total, done, "samples") as bar:

                def advance(count: int) -> None:
                    bar.set_description_str("", refresh=False)
                    bar.update(count)

                for cache in sources:
                    cache.write(encoders, advance)
    return [cache.report() for cache in sources]


class _Encoders:
    """The frozen encoders on all devices of this host, the batch split over them."""

    def __init__(self, folder: Path, dtype: str, batch_size: int, devices: Sequence[jax.Device]) -> None:
        self.batch_size = batch_size
        self._mesh = make_mesh(f"data={len(devices)}", devices)
        self._model, self._params = load_encoders(folder, dtype, self._mesh)
        self._encode = jax.jit(encode, static_argnums=0)

    def start(self, pixels: dict[str, Any]) -> Features:
        """Starts to encode a batch; its arrays become available asynchronously."""
        target, *references = (
            jax.device_put(image, batch_sharding(self._mesh, image.ndim))
            for image in (pixels["target"], *pixels["references"])
        )
        return self._encode(self._model, self._params, target, tuple(references))


class _SourceCache:
    """Writes one source into its folder."""

    def __init__(
        self,
        plan: Plan,
        prompts: PromptEncoder,
        number: int,
        folder: Path,
        manifest: FeatureManifest,
        rows: Sequence[tuple[Bucket, np.ndarray]],
    ) -> None:
        self._plan, self._prompts, self._number = plan, prompts, number
        self._folder, self._manifest, self._rows = folder, manifest, rows
        self._source = plan.config.sources[number]
        self._missing = [shard for shard in range(manifest.shards) if not shard_path(folder, shard).is_file()]

    @property
    def total(self) -> int:
        """Planned samples."""
        return self._manifest.samples

    @property
    def done(self) -> int:
        """Planned samples of the shards that were there before."""
        size = self._manifest.shard_size
        return self.total - sum(min(size, self.total - shard * size) for shard in self._missing)

    def write(self, encoders: _Encoders, advance: Callable[[int], object]) -> None:
        """Writes the missing shards; ``advance`` is called with the number of samples of every batch.

        Raises:
          DeepGenError: too many samples are bad, no memory, or nowhere to write.
        """
        before = count_shards(self._folder, self._manifest.shards)
        bad = before.bad.total()
        read = bad + before.samples
        with self._reading(encoders.batch_size) as batches, _one_line_errors(self._folder):
            encoded = _ahead(((item, encoders.start(item.pixels)) for item in batches), _ENCODED_AHEAD)
            for shard, items in itertools.groupby(encoded, key=lambda pair: pair[0].planned.shard):
                with ShardWriter(shard_path(self._folder, shard)) as writer:
                    for (planned, _, texts), features in items:
                        for place, images in enumerate(_split(features, planned.bucket, len(texts))):
                            name, text = self._plan.name(self._number, planned.rows[place], 0), texts[place]
                            read += 1
                            if isinstance(text, BadSample):
                                bad += 1
                                writer.add_bad(name, text)
                                last = Skipped(self._source.name, name, text.reason, text.detail)
                                check_share(last, bad, read, self._plan.config.max_bad_share)
                            else:
                                writer.add(name, self._source.name, text, images)
                        advance(len(texts))

    def report(self) -> CachedSource:
        """Counts the shards that are there."""
        source = self._source
        entry = SourceConfig(source.name, "features", str(self._folder.absolute()), source.task, source.weight)
        return CachedSource(entry, count_shards(self._folder, self._manifest.shards))

    def _batches(self, size: int) -> Iterator[_Planned]:
        starts = np.cumsum([0, *(len(rows) for _, rows in self._rows)]).tolist()
        for shard in self._missing:
            first = shard * self._manifest.shard_size
            last = min(first + self._manifest.shard_size, self.total)
            for start, (bucket, rows) in zip(starts, self._rows, strict=False):
                low, high = max(first - start, 0), min(last - start, len(rows))
                for place in range(low, high, size):
                    yield _Planned(shard, bucket, rows[place : min(place + size, high)])

    @contextlib.contextmanager
    def _reading(self, size: int) -> Iterator[Iterator[_Read]]:
        """The batches, read ahead in other threads."""
        threads = self._plan.config.threads or default_threads(1)
        with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as one:
            pending: deque[Future[_Read]] = deque()
            read = functools.partial(self._read, pool, size)

            def batches() -> Iterator[_Read]:
                for planned in self._batches(size):
                    pending.append(one.submit(read, planned))
                    if len(pending) > _READ_AHEAD:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()

            try:
                yield batches()
            finally:
                for future in pending:
                    future.cancel()

    def _read(self, pool: ThreadPoolExecutor, size: int, planned: _Planned) -> _Read:
        # Batches are padded to full size: one program a bucket.
        pixels = PixelBatch(self._plan.config, planned.bucket, size)
        index, source = self._plan.indices[self._number], self._opened

        def load(place: int) -> str | BadSample:
            row = planned.rows[place]
            try:
                location = index.row(row)
                with located(source, location):
                    record = read_row(source, location)
                    pixels.put(place, record, index.sizes[row])
                    edit = len(record.images) - 1 if self._source.task == "edit" else None
                    if self._prompts.length(record.text, edit) != index.lengths[row]:
                        raise BadSample("changed since indexed", "the text has another length")
                    return record.text
            except BadSample as bad:
                return bad

        texts = list(pool.map(load, range(len(planned.rows))))
        return _Read(planned, pixels.entries(), texts)

    @functools.cached_property
    def _opened(self) -> Any:
        return open_source(self._source)


def _split(features: Features, bucket: Bucket, count: int) -> Iterator[list[CachedImage]]:
    """The features of each sample of a batch, on the host."""
    sizes = (bucket.target, *bucket.references)
    moments = [(np.asarray(m.mean), np.asarray(m.logvar)) for m in (features.target, *features.references)]
    tokens = np.asarray(features.image_tokens)
    ends = np.cumsum([0, *(width * height // UNIT**2 for width, height in bucket.references)]).tolist()
    for place in range(count):
        yield [
            CachedImage(size, mean[place], logvar[place], tokens[place, ends[n - 1] : ends[n]] if n else None)
            for n, (size, (mean, logvar)) in enumerate(zip(sizes, moments, strict=True))
        ]


def _ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, taken ``count`` places ahead of the one that is yielded."""
    ahead: deque[T] = deque()
    for item in items:
        ahead.append(item)
        if len(ahead) > count:
            yield ahead.popleft()
    yield from ahead


def _data_digest(plan: Plan, number: int) -> str:
    digest = hashlib.sha256(plan.indices[number].folder.name.encode())
    for bucket, rows in plan.rows_by_bucket(number):
        digest.update(f"{bucket} ".encode())
        digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


def _folders(data: DataConfig, out: Path) -> list[Path]:
    """The sources' folders.

    Raises:
      DeepGenError: ``out`` holds something else.
    """
    names = [source.name for source in data.sources]
    if out.exists() and not out.is_dir():
        raise DeepGenError(f"{out} is a file; give a folder with --out")
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if path.name == files.LOCK_FILE:
            continue
        if path.name not in names or not path.is_dir():
            raise DeepGenError(f"{out} holds {path.name}, no cache of a source of this config; give another --out")
    return [out / name for name in names]


def _prepare(folder: Path, manifest: FeatureManifest) -> None:
    """Makes a source's folder, or checks that what is there is the beginning of the same cache."""
    path = folder / MANIFEST
    if path.is_file():
        found = FeatureManifest.from_json(path.read_bytes(), str(path))
        if different := found.differences(manifest):
            reasons = [
                _DIFFERENCES.get(name, f"{name} {getattr(found, name)} in the place of {getattr(manifest, name)}")
                for name in different
                if name != "samples" or different == ["samples"]
            ]
            raise DeepGenError(
                f"{folder} was made with {', '.join(reasons)}; give another --out, remove it, or restore the settings"
            )
    elif folder.is_dir() and any(not name.startswith(files.PARTIAL_PREFIX) for name in os.listdir(folder)):
        raise DeepGenError(f"{folder} is no cache of features; give another --out")
    else:
        with _one_line_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            files.write_text(path, manifest.to_json())
    files.remove_partials(folder)


@contextlib.contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    """Turns errors of the disk and of too little memory into a `DeepGenError`."""
    try:
        yield
    except OSError as error:
        raise DeepGenError(f"{folder} cannot be written: {error.strerror or error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeepGenError("out of memory while encoding; use a smaller --batch-size") from error
