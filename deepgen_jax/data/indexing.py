"""Builds the index of a source in parallel, or opens it.

The pass opens every image file once for its header (and its last bytes) and tokenises every text: about 2,000 samples a
second and core from a local disk; remote files are fetched whole. The index has some 400 bytes a sample. Where hosts
share a cache folder, build it on one of them first with ``deepgen data inspect``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from deepgen_jax.data.checks import SampleInfo, check_sample
from deepgen_jax.data.data_config import DataConfig, SourceConfig
from deepgen_jax.data.index import VERSION, Index, IndexWriter
from deepgen_jax.data.prompt_encoder import PromptEncoder
from deepgen_jax.data.sources import BadSample, Source, open_source
from deepgen_jax.data.sources.base import bad_row_at
from deepgen_jax.data.storage import FileInfo, cache_folder, is_remote
from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import remove, replacing
from deepgen_jax.user_warnings import warn_user

T = TypeVar("T")
R = TypeVar("R")

#: Samples that one task checks.
_CHUNK = 256
#: Files of a remote store that are read at a time by one task.
_REMOTE_READS = 16
#: Reasons for which a file of many samples is left out from the damage on.
_DAMAGED = ("damaged tar", "damaged shard", "damaged parquet")
#: Below these, threads are used: starting processes would take longer than they save.
_MANY_ROWS, _MANY_BYTES = 50_000, 2**30


def open_indices(config: DataConfig, prompts: PromptEncoder) -> list[Index]:
    """The index of every source, built if it is not there yet. Missing files are reported before the first is built.

    Raises:
      DeepGenError: a source is missing or empty, or more than ``max_bad_share`` of it is bad.
    """
    opened = [open_source(source) for source in config.sources]
    listed = [source.files() for source in opened]
    return [_open(config, source, prompts, files) for source, files in zip(opened, listed, strict=True)]


def _open(config: DataConfig, opened: Source, prompts: PromptEncoder, files: Sequence[FileInfo]) -> Index:
    source = opened.config
    folder = cache_folder(config.cache_dir) / "index" / f"{source.name}-{_fingerprint(config, source, prompts, files)}"
    index = _load(folder)
    if index is None:
        _build(config, opened, prompts, files, folder)
        index = Index(folder)
        if left_out := ", ".join(f"{count} {reason}" for reason, count in opened.passed_over.items() if count):
            warn_user(f"source {source.name}: passed over in its folders: {left_out}")
    for reason, count in index.meta["counts"].items():
        if reason in _DAMAGED:
            # Each counts as one bad sample, however many it holds.
            example = index.meta["examples"][reason]
            warn_user(f"source {source.name}: {count} {reason}, left out from there on; such as {example}")
    bad = sum(index.meta["counts"].values())
    if bad > config.max_bad_share * len(index):
        reasons = ", ".join(f"{count} {reason}" for reason, count in index.meta["counts"].items())
        first = next(iter(index.meta["examples"].values()))
        raise DeepGenError(
            f"source {source.name}: {bad} of {len(index)} samples are bad ({reasons}; such as {first}), more than "
            f"max_bad_share {config.max_bad_share:g} allows; fix the data, or raise data.max_bad_share"
        )
    return index


def _load(folder: Path) -> Index | None:
    """The index in a folder; None if there is none. One that is damaged is removed with a notice."""
    if not folder.is_dir():
        return None
    try:
        index = Index(folder)
        index.check()
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        warn_user(f"the index {folder} is damaged ({error}); it is built again")
        remove(folder)
        return None
    return index


def _fingerprint(config: DataConfig, source: SourceConfig, prompts: PromptEncoder, files: Sequence[FileInfo]) -> str:
    """Digest of everything the index depends on, except image files of listings, of which there may be millions."""
    settings = [VERSION, source.kind, source.task, source.path, source.root, source.split, config.max_pixels]
    digest = hashlib.sha256(json.dumps([settings, sorted(source.fields.items()), prompts.digest]).encode())
    for file in files:
        digest.update(json.dumps(file).encode())
    return digest.hexdigest()[:16]


def _build(config: DataConfig, source: Source, prompts: PromptEncoder, files: Sequence[FileInfo], folder: Path) -> None:
    # Another process may be faster with the same result. An OSError is one of writing: those of reading are
    # DeepGenErrors by now.
    with replacing(folder, keep_existing=True) as partial, contextlib.ExitStack() as stack:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise DeepGenError(
                f"the index of source {source.config.name} cannot be written ({error}); name another folder with "
                "cache_dir or DEEPGEN_CACHE"
            ) from error
        writer = IndexWriter(partial, source.config.name)
        pools = _Pools(config, stack)
        _scan(source, files, writer, pools)
        _check(source, prompts, config.max_pixels, writer, pools)
        writer.finish()


class _Pools:
    """Processes for large sources, threads for small ones; each started when first needed."""

    def __init__(self, config: DataConfig, stack: contextlib.ExitStack) -> None:
        self._config, self._stack = config, stack

    def get(self, large: bool) -> tuple[Executor, int]:
        """A pool and how many work in it."""
        if self._config.index_workers == 1 or not (large or self._config.index_workers):
            return self._threads, 4
        return self._processes

    @functools.cached_property
    def _threads(self) -> Executor:
        # More than cores: most of the time goes by waiting for files.
        return self._stack.enter_context(ThreadPoolExecutor(4))

    @functools.cached_property
    def _processes(self) -> tuple[Executor, int]:
        number = self._config.index_workers or os.cpu_count() or 1
        # Forking is unsafe once JAX has started its threads.
        return self._stack.enter_context(ProcessPoolExecutor(number, get_context("spawn"))), number


def _scan(source: Source, files: Sequence[FileInfo], writer: IndexWriter, pools: _Pools) -> None:
    name = source.config.name
    if len(files) < 2 or sum(file.size for file in files) < _MANY_BYTES:
        # In this process, row by row: one JSON file may hold millions.
        with _progress(f"{name}: files", len(files)) as advance:
            for file in files:
                for rows in _chunks(map(_encoded, _rows(source, file.path)), 10_000):
                    writer.add_rows(rows)
                advance(1)
        return
    pool, width = pools.get(large=True)
    groups = list(_chunks(files, max(1, len(files) // (16 * width))))
    with _progress(f"{name}: files", len(files)) as advance:
        for rows in _ordered(pool, functools.partial(_scan_files, source), groups, 2 * width):
            writer.add_rows(rows)
            advance(len(groups[0]))


def _check(source: Source, prompts: PromptEncoder, max_pixels: int, writer: IndexWriter, pools: _Pools) -> None:
    count = writer.finish_rows()
    pool, width = pools.get(large=count >= _MANY_ROWS)
    chunks = (writer.encoded_rows(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
    check = functools.partial(_check_rows, source, prompts, max_pixels)
    with _progress(f"{source.config.name}: samples", count) as advance:
        for infos in _ordered(pool, check, chunks, 4 * width):
            writer.add_samples(infos)
            advance(len(infos))


def _scan_files(source: Source, files: Sequence[FileInfo]) -> list[bytes]:
    return [_encoded(row) for file in files for row in _rows(source, file.path)]


def _rows(source: Source, path: str) -> Iterator[Any]:
    """A file's rows, bad ones with their place.

    Raises:
      DeepGenError: the file cannot be opened, or its store fails half-way: no index without the rest is left.
    """
    try:
        for number, row in enumerate(source.scan(path)):
            yield bad_row_at(row, f"{path}: row {number}")
    except OSError as error:
        raise DeepGenError(
            f"source {source.config.name}: {path} cannot be read ({error}); fix that, or remove the file"
        ) from error


def _check_rows(
    source: Source, prompts: PromptEncoder, max_pixels: int, rows: Sequence[bytes]
) -> list[SampleInfo | BadSample]:
    def check(row: bytes) -> SampleInfo | BadSample:
        try:
            return check_sample(source, json.loads(row), prompts, max_pixels)
        except BadSample as bad:
            return bad

    if is_remote(source.config.path) or is_remote(source.config.root):
        # A store answers late, but many at a time.
        with ThreadPoolExecutor(_REMOTE_READS) as pool:
            return list(pool.map(check, rows))
    return [check(row) for row in rows]


def _encoded(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _ordered(pool: Executor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """``map`` in order with at most ``ahead`` items in flight."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    # None: shown on a terminal only.
    with tqdm(total=total, desc=label, disable=None, leave=False) as bar:
        yield bar.update
