"""Loader of a host's shares of an endless, globally defined sequence of micro-batches.

    loader = Loader(config, model, tokenizer_folder, process_index=host, process_count=hosts)
    batch = next(loader)
    state = loader.get_state()      # JSON, the same on every host
    loader.set_state(state)         # continues exactly, on any number of hosts
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.buckets import Bucket
from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.data.indexing import open_indices
from deepgen_jax.data.plan import Plan
from deepgen_jax.data.prompt_encoder import PromptEncoder
from deepgen_jax.data.reader import Batch, Reader, Skipped, check_share, default_threads
from deepgen_jax.data.sources import require_images
from deepgen_jax.data.sources.features import Features
from deepgen_jax.errors import DeepGenError

# Micro-batches of an endless plan: more than any run has.
_ENDLESS = 2**40


class Loader(Iterator[Batch]):
    """Iterates over a host's shares of the micro-batches.

    A batch is a dict; B is the host's share of the micro-batch, L and L + Q are the lengths of the padded prompts
    without and with think tokens, equal on all hosts:

    * ``task``: "t2i" or "edit"; ``bucket``: (target (w, h), tuple of reference (w, h)); all samples share them
    * ``target``: uint8 [B, H, W, 3]; ``references``: tuple of uint8 [B, Hr, Wr, 3]; or, in place of both, where the
      task's sources are cached, ``features``: ``target`` and each of the tuple ``references`` are (mean, logvar),
      float32 [B, h, w, C], and ``image_tokens`` [B, V, hidden] are the VLM tokens of all references, V = 0 without any
    * ``input_ids``: int32 [B, L]; ``position_ids``: int32 [3, B, L + Q]
    * ``real``, ``visible``: bool [B, L + Q], as in `deepgen_jax.data.tokens.PromptBatch`
    * ``image_index``: int32 [B, L], place among the sample's own VLM tokens, all references in one row; else -1
    * ``weight``: float32 [B], 1; 0 for a copy that replaces an unreadable sample, which the loss must ignore
    * ``sample_ids``: str [B], ``source/row@epoch``, "" where the weight is 0
    * ``sample_index``: int64 [B], position in the global sequence, to derive random keys from

    Attributes:
      plan: the global sequence; ``plan[k]`` lists the samples of micro-batch k.
      prompts: tokenises the texts.
      loaded: samples delivered to this host by this loader, by source.
      skipped: samples that this host could not read, by (source, reason).
    """

    def __init__(
        self,
        config: DataConfig,
        model: DeepGenConfig,
        tokenizer: Path,
        *,
        process_index: int = 0,
        process_count: int = 1,
        once: bool = False,
        weights: str | None = None,
        images: bool = True,
    ) -> None:
        """Opens the sources; builds missing indices.

        Args:
          config: of the data.
          model: gives special tokens, think tokens and the longest prompt.
          tokenizer: folder with ``tokenizer.json``.
          process_index, process_count: this host and how many there are.
          once: end after every usable sample was read once; the last batch of a bucket is padded with copies of weight
            0.
          weights: digest of the frozen encoders, which cached features must come from; what
            `deepgen_jax.training.feature_cache.encoder_digest` gives. Needed with cached sources only.
          images: every sample must have pictures; False also takes prompts alone, whose ``target`` is black.

        Raises:
          DeepGenError: a source cannot be used, or the micro-batch cannot be shared evenly.
        """
        if config.micro_batch % process_count:
            raise DeepGenError(
                f"data: micro_batch {config.micro_batch} cannot be shared by {process_count} processes evenly; "
                "make it a multiple of them"
            )
        if images:
            require_images(config.sources)
        self._token_dtypes = _check_features(config, model, weights)
        self.prompts = PromptEncoder(tokenizer, model)
        indices = open_indices(config, self.prompts)
        self.plan = Plan(config, indices, self.prompts, once=once)
        size = config.micro_batch // process_count
        self._share = slice(process_index * size, (process_index + 1) * size)
        self._position = 0
        self._batches: Any = None
        self.loaded: Counter[str] = Counter()
        self.skipped: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._pipeline())
        batch = next(self._batches)
        self._position += 1
        self._count(batch)
        return batch

    @property
    def buckets(self) -> list[Bucket]:
        """Every shape that batches can have."""
        return self.plan.buckets

    def get_state(self) -> dict[str, Any]:
        """Position in the global sequence after the batches delivered so far; JSON, the same on every host."""
        return {"position": self._position, "settings": self.plan.settings}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved state, whatever the number of hosts, workers and threads.

        Raises:
          DeepGenError: the state was saved with other data or settings, so that there is no continuation of it.
        """
        saved, current = state["settings"], self.plan.settings
        different = sorted(name for name in {*saved, *current} if saved.get(name) != current.get(name))
        if different:
            changes = ", ".join(f"{name} {saved.get(name)!r} -> {current.get(name)!r}" for name in different)
            raise DeepGenError(
                f"the data position was saved with other data or settings ({changes}); restore them, or start from the "
                "first sample again"
            )
        self.close()
        self._position = int(state["position"])

    def close(self) -> None:
        """Stops prefetching; the next batch starts it again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _pipeline(self) -> Any:
        try:
            import grain
        except ImportError as error:
            raise DeepGenError("reading data needs grain; run: pip install 'deepgen-jax[data]'") from error
        config = self.plan.config
        total = len(self.plan) if self.plan.once else _ENDLESS
        reader = Reader(
            self.plan,
            self.prompts,
            start=self._position,
            length=max(0, total - self._position),
            share=self._share,
            threads=config.threads or default_threads(config.workers),
            token_dtypes=self._token_dtypes,
        )
        # grain's threads only wait; the reader decodes samples in its own, so that the first batch is ready early.
        options = grain.ReadOptions(num_threads=config.prefetch, prefetch_buffer_size=config.prefetch)
        batches = grain.MapDataset.source(reader).to_iter_dataset(options)
        if config.workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():
                # grain's worker processes read absl flags, which a program without absl has not parsed.
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(config.workers, config.prefetch))
        return batches

    def _count(self, batch: Batch) -> None:
        skipped: tuple[Skipped, ...] = batch.pop("skipped")
        self.loaded.update(str(name).partition("/")[0] for name in batch["sample_ids"] if name)
        for sample in skipped:
            self.skipped[sample.source, sample.reason] += 1
            bad = sum(count for (source, _), count in self.skipped.items() if source == sample.source)
            check_share(sample, bad, bad + self.loaded[sample.source], self.plan.config.max_bad_share)


def _check_features(config: DataConfig, model: DeepGenConfig, weights: str | None) -> dict[str, str]:
    """The dtype of cached VLM tokens by task, after checking that the features belong to this model.

    Raises:
      DeepGenError: they do not, or those of a task differ in dtype.
    """
    dtypes: dict[str, str] = {}
    for source in config.sources:
        if source.kind != "features":
            continue
        manifest = Features(source).manifest
        if weights is None:
            raise DeepGenError(
                f"source {source.name} holds cached features; give `weights`, the digest of the encoders"
            )
        manifest.check(f"source {source.name}", config, model, weights)
        if dtypes.setdefault(source.task, manifest.dtype) != manifest.dtype:
            raise DeepGenError(
                f"source {source.name} was cached in {manifest.dtype}, another source of task {source.task} in "
                f"{dtypes[source.task]}; cache both in one dtype"
            )
    return dtypes
