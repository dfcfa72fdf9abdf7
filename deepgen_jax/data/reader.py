"""Reads, decodes, resizes and tokenises one host's share of a planned micro-batch."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from deepgen_jax.data.batch_images import BatchImages, FeatureBatch, FeatureShapes, PixelBatch
from deepgen_jax.data.buckets import Bucket
from deepgen_jax.data.feature_files import token_dtype
from deepgen_jax.data.plan import BatchPlan, Plan
from deepgen_jax.data.prompt_encoder import PromptEncoder
from deepgen_jax.data.sources import BadSample, open_source, read_row
from deepgen_jax.data.sources.base import located
from deepgen_jax.data.tokens import TokenizedPrompt, pad_prompts
from deepgen_jax.data.transforms import UNIT
from deepgen_jax.errors import DeepGenError

# Unreadable samples that a source may have however few were read.
_LEAST_SKIPPED = 10

#: A host's share of a micro-batch, see `deepgen_jax.data.loader.Loader`.
Batch = dict[str, Any]


class Skipped(NamedTuple):
    """A sample that could not be read."""

    source: str
    sample: str
    reason: str
    detail: str


class Reader:
    """Random access to a host's micro-batches, for grain; picklable for its worker processes."""

    def __init__(
        self,
        plan: Plan,
        prompts: PromptEncoder,
        *,
        start: int,
        length: int,
        share: slice,
        threads: int,
        token_dtypes: Mapping[str, str],
    ) -> None:
        """Reads nothing yet.

        Args:
          plan: lists the samples.
          prompts: tokenises them.
          start: micro-batch of item 0.
          length: number of items.
          share: this host's slots of each micro-batch.
          threads: number of threads that read and decode.
          token_dtypes: of cached VLM tokens, by task.
        """
        self._plan, self._prompts, self._token_dtypes = plan, prompts, token_dtypes
        self._sources = [open_source(source) for source in plan.config.sources]
        self._start, self._length, self._share, self._threads = start, length, share, threads

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_pool"}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> Batch:
        batch = self._plan[self._start + item]
        slots = range(len(batch.rows))[self._share]
        bucket, count = batch.bucket, len(slots)
        images = self._new_images(bucket, count)
        results = list(self._pool.map(functools.partial(self._load, batch, slots, images), range(count)))
        skipped, weight = [], np.zeros(count, np.float32)
        prompts: list[TokenizedPrompt] = []
        for place, result in enumerate(results):
            if isinstance(result, BadSample):
                skipped.append(self._skipped(batch, slots[place], result))
                result = self._substitute(batch, slots[place], images, place)
            else:
                weight[place] = slots[place] < batch.real
            prompts.append(result)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        padded = pad_prompts(
            prompts, [max(length, batch.visible) for length in lengths], self._prompts.model, multiple=batch.length
        )
        ids = [
            self._plan.name(batch.sources[slot], batch.rows[slot], batch.epochs[slot]) if weight[place] else ""
            for place, slot in enumerate(slots)
        ]
        return {
            "task": bucket.task,
            "bucket": (bucket.target, bucket.references),
            **images.entries(),
            "input_ids": padded.input_ids,
            "position_ids": padded.position_ids,
            "real": padded.real,
            "visible": padded.visible,
            "image_index": padded.image_slots,
            "weight": weight,
            "sample_ids": np.array(ids),
            "sample_index": batch.number * len(batch.rows) + np.array(slots, np.int64),
            "skipped": tuple(skipped),
        }

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, "deepgen-data")

    def _new_images(self, bucket: Bucket, count: int) -> BatchImages:
        if bucket.task not in self._token_dtypes:
            return PixelBatch(self._plan.config, bucket, count)
        model, dtype = self._prompts.model, token_dtype(self._token_dtypes[bucket.task])
        vae, hidden = model.vae, model.vision.out_hidden_size
        shapes = FeatureShapes(vae.downscale, vae.latent_channels, UNIT, hidden, dtype)
        return FeatureBatch(shapes, bucket, count)

    def _load(
        self, batch: BatchPlan, slots: Sequence[int], images: BatchImages, place: int
    ) -> TokenizedPrompt | BadSample:
        """Puts a slot's images into their place and returns its prompt, or a `BadSample`."""
        try:
            return self._sample(batch, slots[place], images, place)
        except BadSample as bad:
            return bad

    def _sample(self, batch: BatchPlan, slot: int, images: BatchImages, place: int) -> TokenizedPrompt:
        bucket = batch.bucket
        source, row = int(batch.sources[slot]), int(batch.rows[slot])
        index = self._plan.indices[source]
        location = index.row(row)
        with located(self._sources[source], location):
            record = read_row(self._sources[source], location)
            images.put(place, record, index.sizes[row])
        references = bucket.references if bucket.task == "edit" else None
        if batch.dropped[slot]:
            return self._prompts("", references, self._prompts.empty)
        with located(self._sources[source], location):
            return self._prompts(record.text, references, int(index.lengths[row]))

    def _substitute(self, batch: BatchPlan, slot: int, images: BatchImages, place: int) -> TokenizedPrompt:
        """Fills a slot with the next readable sample of the global micro-batch: the same on any number of hosts."""
        for step in range(1, len(batch.rows)):
            try:
                return self._sample(batch, (slot + step) % len(batch.rows), images, place)
            except BadSample:
                continue
        raise DeepGenError(
            f"data: no sample of micro-batch {batch.number} can be read; check that its disk or store is available"
        )

    def _skipped(self, batch: BatchPlan, slot: int, bad: BadSample) -> Skipped:
        source, row, epoch = batch.sources[slot], batch.rows[slot], batch.epochs[slot]
        name = self._plan.config.sources[source].name
        return Skipped(name, self._plan.name(source, row, epoch), bad.reason, bad.detail)


def check_share(last: Skipped, bad: int, read: int, limit: float) -> None:
    """Ends the run where too many samples of a source cannot be read.

    Args:
      last: unreadable sample of the source.
      bad: unreadable samples of the source, out of ``read``.
      limit: `DataConfig.max_bad_share`.

    Raises:
      DeepGenError: too many of its samples cannot be read.
    """
    if bad > max(_LEAST_SKIPPED, limit * read):
        raise DeepGenError(
            f"source {last.source}: {bad} samples could not be read, more than max_bad_share {limit:g} of {read}; "
            f"the last: {last.reason} ({last.detail})"
        )


def default_threads(workers: int) -> int:
    """Cores of this machine for each of ``workers`` reading processes, or for this one."""
    return max(1, (os.cpu_count() or 1) // max(1, workers))
