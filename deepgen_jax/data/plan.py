"""The samples of micro-batch k, as a function of seed, configuration and data, computable for any k directly.

Only k is saved, and the number of hosts, workers or devices does not change what is read. Each task cycles through its
buckets and, within a bucket, through its sources in proportion to their shares (see `deepgen_jax.data.mixture`). The
samples of one source in one bucket are a *cell*; a cell is read in a new pseudo-random order every epoch, so that no
sample is repeated within an epoch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepgen_jax.data.buckets import Bucket, Sizes, choose_buckets, exact_sizes, list_buckets, pixel_difference
from deepgen_jax.data.data_config import TASKS, DataConfig
from deepgen_jax.data.index import Index
from deepgen_jax.data.mixture import integer_rates, interleave, task_at
from deepgen_jax.data.prompt_encoder import PromptEncoder
from deepgen_jax.data.shuffle import generator, permuted
from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import replacing
from deepgen_jax.random_keys import Data

# Settings of how data are read, which do not change the order of samples.
_READING = ("sources", "cache_dir", "threads", "workers", "prefetch", "index_workers", "max_bad_share", "max_pixels")


@dataclass(frozen=True)
class BatchPlan:
    """One micro-batch over all hosts.

    Attributes:
      number: k.
      bucket: its task and sizes.
      sources: int [G], place of each sample's source in `DataConfig.sources`.
      rows: int [G], its row in the index.
      epochs: int [G], completed epochs of its cell.
      dropped: bool [G], its text is replaced by the empty one.
      length: tokens of the padded prompts, think tokens included.
      visible: tokens of a prompt that the model sees at least, pads before shorter ones included.
      real: samples that count; the rest pad the last batch of a bucket when every sample is read once.
    """

    number: int
    bucket: Bucket
    sources: np.ndarray
    rows: np.ndarray
    epochs: np.ndarray
    dropped: np.ndarray
    length: int
    visible: int
    real: int


class _Cell(NamedTuple):
    """Samples of one source in one bucket: ``order[start : start + size]`` of the source."""

    source: int
    start: int
    size: int


@dataclass(frozen=True)
class _TaskPlan:
    """A task's buckets, their rates, and the cells of each with theirs."""

    buckets: Sequence[Bucket]
    rates: np.ndarray
    cells: Sequence[Sequence[_Cell]]
    cell_rates: Sequence[np.ndarray]


class Plan:
    """Micro-batches by number, endless; or each usable sample once.

    Attributes:
      config, indices: as given.
      buckets: all buckets in use.
      filtered: samples left out by the filters, by source and reason.
      shares: of its task's samples that each source gives.
      pixel_difference: mean share of pixels in which images differ from the exact size rule.
      settings: everything that the order of samples depends on, to compare with a saved position.
    """

    def __init__(
        self, config: DataConfig, indices: Sequence[Index], prompts: PromptEncoder, *, once: bool = False
    ) -> None:
        """Sorts all samples into buckets.

        Args:
          config: of the data.
          indices: one for each source.
          prompts: gives the length of the empty prompt and of cut ones.
          once: read every usable sample once, in order and without text dropping.

        Raises:
          DeepGenError: the filters leave nothing of a source.
        """
        self.config = config
        self.indices = indices
        self.once = once
        self._prompts = prompts
        self.filtered: dict[str, Counter[str]] = {}
        self._orders: dict[int, _Stored] = {}
        self._tasks: dict[str, _TaskPlan] = {}
        differences: list[tuple[float, int]] = []
        for task in TASKS:
            if sources := [n for n, source in enumerate(config.sources) if source.task == task]:
                self._tasks[task] = self._sort(task, sources, differences)
        self.buckets = [bucket for task in self._tasks.values() for bucket in task.buckets]
        self.pixel_difference = sum(d * count for d, count in differences) / sum(count for _, count in differences)
        self.shares = self._shares()
        self.settings = _settings(config, indices, prompts)
        self._once_starts = self._count_once() if once else None

    def __len__(self) -> int:
        """Micro-batches until every sample has been read once; only with ``once``."""
        if self._once_starts is None:
            raise TypeError("an endless plan has no length")
        return int(self._once_starts[-1])

    def __getitem__(self, number: int) -> BatchPlan:
        return self._endless(number) if self._once_starts is None else self._single(number)

    def name(self, source: int, row: int, epoch: int) -> str:
        """The id of a sample in the log: ``source/row@epoch``."""
        return f"{self.config.sources[source].name}/{row}@{epoch}"

    def rows_by_bucket(self, source: int) -> Iterator[tuple[Bucket, np.ndarray]]:
        """The usable rows of a source, int32, in the order in which `once` reads them."""
        for task in self._tasks.values():
            for bucket, cells in zip(task.buckets, task.cells, strict=True):
                for cell in cells:
                    if cell.source == source:
                        yield bucket, self._orders[source].array[cell.start : cell.start + cell.size]

    def usable_lengths(self) -> Iterator[tuple[np.ndarray, int]]:
        """Prompt lengths of all usable samples, some at a time, and the image tokens that each of these has."""
        for task in self._tasks.values():
            for bucket, cells in zip(task.buckets, task.cells, strict=True):
                for cell in cells:
                    rows = self._orders[cell.source].array[cell.start : cell.start + cell.size]
                    yield self.indices[cell.source].lengths[rows], bucket.image_tokens

    def _shares(self) -> list[float]:
        shares = [0.0] * len(self.config.sources)
        for task in self._tasks.values():
            for rate, cells, rates in zip(task.rates / task.rates.sum(), task.cells, task.cell_rates, strict=True):
                for cell, share in zip(cells, rates / rates.sum(), strict=True):
                    shares[cell.source] += float(rate * share)
        return shares

    def _endless(self, number: int) -> BatchPlan:
        size, seed = self.config.micro_batch, self.config.seed
        name, place = task_at(self.config.mixture, number)
        task = self._tasks[name]
        counts, bucket = interleave(task.rates, place)
        first = int(counts[bucket]) * size
        cells, rates = task.cells[bucket], task.cell_rates[bucket]
        before, after = interleave(rates, first)[0], interleave(rates, first + size)[0]
        sources, rows, epochs = [], [], []
        for cell, start, end in zip(cells, before.tolist(), after.tolist(), strict=True):
            for epoch in range(start // cell.size, -(-end // cell.size)):
                low, high = max(start - epoch * cell.size, 0), min(end - epoch * cell.size, cell.size)
                places = permuted(np.arange(low, high), cell.size, seed, Data.ORDER, cell.source, bucket, epoch)
                rows.append(self._orders[cell.source].array[cell.start + places])
                sources.append(np.full(high - low, cell.source))
                epochs.append(np.full(high - low, epoch))
        # Shuffled, because hosts take contiguous shares.
        mixed = generator(seed, Data.SLOTS, number).permutation(size)
        dropped = np.zeros(size, np.bool_)
        if name == "t2i":
            dropped = generator(seed, Data.TEXT_DROP, number).random(size) < self.config.text_drop
        mixed_sources, mixed_rows, mixed_epochs = (np.concatenate(part)[mixed] for part in (sources, rows, epochs))
        return self._batch(number, task.buckets[bucket], mixed_sources, mixed_rows, mixed_epochs, dropped)

    def _single(self, number: int) -> BatchPlan:
        if not 0 <= number < len(self):
            raise IndexError(number)
        assert self._once_starts is not None
        size = self.config.micro_batch
        place = int(np.searchsorted(self._once_starts, number, side="right")) - 1
        task, bucket = self._once_places[place]
        first = (number - int(self._once_starts[place])) * size
        sources, rows = [], []
        for cell in self._tasks[task].cells[bucket]:
            low, high = max(first, 0), min(first + size, cell.size)
            if low < high:
                rows.append(self._orders[cell.source].array[cell.start + low : cell.start + high])
                sources.append(np.full(high - low, cell.source))
            first -= cell.size
        all_sources, all_rows = np.concatenate(sources), np.concatenate(rows)
        real = len(all_rows)
        # Padding repeats the batch.
        fill = np.arange(size) % real
        none = np.zeros(size, np.int64)
        return self._batch(
            number, self._tasks[task].buckets[bucket], all_sources[fill], all_rows[fill], none, none.astype(bool), real
        )

    def _batch(
        self, number: int, bucket: Bucket, sources: np.ndarray, rows: np.ndarray, epochs: np.ndarray,
        dropped: np.ndarray, real: int | None = None,
    ) -> BatchPlan:  # fmt: skip
        lengths = np.empty(len(rows), np.int64)
        for source in np.unique(sources):
            chosen = sources == source
            lengths[chosen] = self.indices[source].lengths[rows[chosen]]
        lengths[dropped] = self._prompts.empty
        longest = int(self._prompts.kept(lengths).max()) + bucket.image_tokens
        total = longest + self._prompts.model.bridge.num_queries
        length = -(-total // self.config.token_multiple) * self.config.token_multiple
        visible = longest if self.config.padding == "batch" else 0
        return BatchPlan(
            number, bucket, sources, rows, epochs, dropped, length, visible, len(rows) if real is None else real
        )

    def _sort(self, task: str, sources: Sequence[int], differences: list[tuple[float, int]]) -> _TaskPlan:
        """The plan of a task; adds the order of each of its sources, and (pixel difference, samples) of each size."""
        # Features have the size of the bucket that their images were resized to.
        final = self.config.cached(task)
        found: dict[int, tuple[np.ndarray, np.ndarray, list[Sizes]]] = {}
        counts: Counter[Sizes] = Counter()
        for source in sources:
            rows = self._usable(source)
            keys, entries = exact_sizes(self.indices[source].sizes[rows], self.config, final=final)
            found[source] = rows, keys, entries
            counts.update(dict(zip(entries, np.bincount(keys, minlength=len(entries)).tolist(), strict=True)))
        chosen = {sizes: sizes for sizes in counts} if final else choose_buckets(counts, self.config)
        for entry, count in counts.items():
            each = [pixel_difference(a, b) for a, b in zip(entry, chosen[entry], strict=True)]
            differences.append((sum(each) / len(each), count))
        buckets = list_buckets(task, counts, chosen)
        place = {(bucket.target, *bucket.references): number for number, bucket in enumerate(buckets)}
        cells: list[list[_Cell]] = [[] for _ in buckets]
        weights: list[list[float]] = [[] for _ in buckets]
        for source, (rows, keys, entries) in found.items():
            bucket_of = np.array([place[chosen[entry]] for entry in entries], np.int64)[keys]
            order = rows[np.argsort(bucket_of, kind="stable")]
            self._orders[source] = _Stored.keep(order, self.indices[source].folder)
            sizes = np.bincount(bucket_of, minlength=len(buckets)).tolist()
            start = 0
            for bucket, count in enumerate(sizes):
                if count:
                    weight = self.config.sources[source].weight
                    cells[bucket].append(_Cell(source, start, count))
                    weights[bucket].append(count if weight is None else weight * count / len(rows))
                    start += count
        return _TaskPlan(
            buckets, integer_rates([sum(w) for w in weights]), cells, [integer_rates(w) for w in weights]
        )

    def _usable(self, source: int) -> np.ndarray:
        """int32 rows that are neither bad nor filtered out; counts the latter."""
        config, index = self.config, self.indices[source]
        sizes = np.asarray(index.sizes)
        there = sizes[..., 0] > 0
        short, long = sizes.min(axis=-1), sizes.max(axis=-1)
        # Images were resized for the cache; their originals passed the filters.
        original = config.sources[source].kind != "features"
        filters = {
            f"side of at most {config.min_side} px": original & (there & (short <= config.min_side)).any(axis=1),
            f"aspect beyond {config.max_aspect:g}:1": original & (long > short * config.max_aspect).any(axis=1),
            f"more than {config.max_references} references": there.sum(axis=1) > 1 + config.max_references,
        }
        left = np.asarray(index.status) == 0
        name = config.sources[source].name
        counted = self.filtered[name] = Counter()
        for reason, out in filters.items():
            if number := int((left & out).sum()):
                counted[reason] = number
            left &= ~out
        if not left.any():
            out_of = ", ".join(f"{number} {reason}" for reason, number in counted.items()) or "all are bad"
            raise DeepGenError(f"source {name}: no usable sample is left of {len(index)} ({out_of})")
        return np.flatnonzero(left).astype(np.int32)

    def _count_once(self) -> np.ndarray:
        """First micro-batch of every bucket when each sample is read once, and the end."""
        self._once_places = [(task, b) for task, plan in self._tasks.items() for b in range(len(plan.buckets))]
        batches = [-(-bucket.samples // self.config.micro_batch) for bucket in self.buckets]
        return np.cumsum([0, *batches])


class _Stored:
    """An array in a memory-mapped file: worker processes receive its path and share its pages."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type[_Stored], tuple[Path]]:
        return _Stored, (self.path,)

    @classmethod
    def keep(cls, array: np.ndarray, folder: Path) -> _Stored:
        """Writes ``array`` into a file of ``folder`` named after its content, if it is not there yet."""
        path = folder / f"order-{hashlib.sha256(array.data).hexdigest()[:16]}.npy"
        if not path.is_file():
            with replacing(path) as partial, open(partial, "wb") as file:
                np.save(file, array)
        return cls(path)

    @functools.cached_property
    def array(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")


def _settings(config: DataConfig, indices: Sequence[Index], prompts: PromptEncoder) -> dict[str, Any]:
    """Everything that the order of samples depends on, ready for JSON."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _READING}
    for source, index in zip(config.sources, indices, strict=True):
        values[f"source {source.name}"] = [source.task, source.weight, len(index), index.meta["digest"][:16]]
    values["max_prompt_tokens"] = prompts.model.max_prompt_tokens
    return json.loads(json.dumps(values))
