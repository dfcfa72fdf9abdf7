"""Loader batches -> what a training step takes, on the mesh: the micro-batches of one step and their random keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.data.loader import Loader
from deepgen_jax.data.reader import Batch
from deepgen_jax.data.tokens import pad_prompts, round_up
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel.hosts import same_on_all
from deepgen_jax.parallel.jit_options import device_jit
from deepgen_jax.parallel.mesh import batch_sharding, host_share, to_global
from deepgen_jax.random_keys import Training
from deepgen_jax.training.encoders import check_untrained, digest_for, has_cached
from deepgen_jax.training.inputs import (
    Features,
    MicroBatch,
    Moments,
    Text,
    TokenBudget,
    assemble,
    encode,
    posterior_noise,
    sample_keys,
)
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.run_config import RunConfig
from deepgen_jax.training.weights import Weights


class StepBatch(NamedTuple):
    """The data of one optimiser step.

    Attributes:
      micro_batches: task -> its micro-batches, stacked on a leading axis.
      keys: task -> keys [A, B], one a sample.
      sample_ids: of this host's samples, stand-ins left out.
      samples: over all hosts, stand-ins included.
      tokens: image, prompt and think tokens that are no padding, over all hosts (from this host's share).
      flops: operations of the forward and backward passes, over all hosts.
      seconds: that this host waited for its loader.
    """

    micro_batches: dict[str, MicroBatch]
    keys: dict[str, jax.Array]
    sample_ids: list[str]
    samples: int
    tokens: int
    flops: float
    seconds: float


class StepBatches:
    """Iterates over the batches of optimiser steps, made from a loader's batches.

    The VAE and the vision tower run here, one program for each bucket; everything is padded so that the training step
    sees few shapes: targets to the largest bucket, references to whole images, prompts to the longest of the step.
    """

    def __init__(
        self,
        loader: Loader,
        model: DeepGen,
        frozen: Tree,
        mesh: Mesh,
        *,
        accumulation: int,
        seed: int,
        operations: Callable[[int, int, int], float],
        targets: bool = True,
        negative: bool = False,
    ) -> None:
        """Reads nothing yet.

        Args:
          loader: of this host's share.
          model: without dropout.
          frozen: holds the VAE and the vision tower.
          mesh: batches are split over it.
          accumulation: micro-batches of a step.
          seed: of the samples' keys.
          operations: (MMDiT tokens of a target, prompt and think tokens, MMDiT tokens of references) -> operations of
            a step for one sample.
          targets: encode targets; otherwise their latents are zeros.
          negative: give each sample's empty prompt, too.
        """
        self._loader, self._model, self._mesh = loader, model, mesh
        self._encoders = {part: frozen[part] for part in ("vae", "vision")}
        self._accumulation, self._seed, self._operations = accumulation, seed, operations
        self._targets, self._negative = targets, negative
        config = model.config
        self._unit = config.vae.downscale * config.mmdit.patch_size
        self._target = max(_tokens([bucket.target], self._unit) for bucket in loader.buckets)

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        start = time.perf_counter()
        batches = [next(self._loader) for _ in range(self._accumulation)]
        seconds = time.perf_counter() - start
        by_task: dict[str, list[Batch]] = {}
        for batch in batches:
            by_task.setdefault(batch["task"], []).append(batch)
        micro_batches, keys = {}, {}
        for task in sorted(by_task):
            prepared = self._prepare(by_task[task])
            micro_batches[task], keys[task] = _stack(prepared)
        ids = [str(name) for batch in batches for name in batch["sample_ids"] if name]
        tokens, operations = self._count(batches)
        samples = self._accumulation * self._loader.plan.config.micro_batch
        return StepBatch(micro_batches, keys, ids, samples, tokens, operations, seconds)

    def _prepare(self, batches: Sequence[Batch]) -> list[tuple[MicroBatch, jax.Array]]:
        negatives = [self._empty_prompts(batch) if self._negative else None for batch in batches]
        shown = [*batches, *(negative for negative in negatives if negative is not None)]
        length = max(batch["input_ids"].shape[1] for batch in shown)
        references = max(_tokens(batch["bucket"][1], self._unit) for batch in batches)
        budget = token_budget(self._model.config, self._target, references)
        pairs = zip(batches, negatives, strict=True)
        return [self._prepare_one(batch, negative, length, budget) for batch, negative in pairs]

    def _empty_prompts(self, batch: Batch) -> dict[str, np.ndarray]:
        """The empty prompt with each sample's references, padded as the guidance pairs of inference are."""
        config, multiple = self._model.config, self._loader.plan.config.token_multiple
        references = batch["bucket"][1] if batch["task"] == "edit" else None
        prompts = self._loader.prompts
        empty = prompts("", references, prompts.length("", None if references is None else len(references)))
        shown = batch["visible"].sum(axis=1) - config.bridge.num_queries
        lengths = np.maximum(shown, len(empty.input_ids)).tolist()
        padded = pad_prompts([empty] * len(lengths), lengths, config, multiple=multiple)
        return {**vars(padded), "image_index": padded.image_slots}

    def _prepare_one(
        self, batch: Batch, negative: Mapping[str, np.ndarray] | None, length: int, budget: TokenBudget
    ) -> tuple[MicroBatch, jax.Array]:
        share = partial(to_global, self._mesh)

        def shared(prompts: Mapping[str, np.ndarray]) -> Text:
            local: Any = widen(prompts, length, self._model.config)
            return Text(share(local[0]), share(local[1], axis=1), *map(share, local[2:]))

        text = shared(batch)
        empty = None if negative is None else shared(negative)
        index = share(index_words(batch))
        images = _features(batch, share)
        if images is None:
            pictures = share(batch["target"]), tuple(map(share, batch["references"]))
            images = encode_images(self._model, self._mesh, self._encoders, *pictures, targets=self._targets)
        return _assemble(
            self._model, self._mesh, images, text, empty, share(batch["weight"]), index, np.uint32(self._seed), budget
        )

    def _count(self, batches: Sequence[Batch]) -> tuple[int, float]:
        """Tokens and operations over all hosts, assuming that their prompts are like this host's."""
        tokens, operations = 0, 0.0
        samples = self._loader.plan.config.micro_batch
        for batch in batches:
            targets = _tokens([batch["bucket"][0]], self._unit)
            references = _tokens(batch["bucket"][1], self._unit)
            context = round(float(batch["real"].sum(axis=1).mean()))
            tokens += samples * (targets + references + context)
            operations += samples * self._operations(targets, context, references)
        return tokens, operations


def token_budget(config: DeepGenConfig, target: int, references: int) -> TokenBudget:
    """The sizes that micro-batches are padded to.

    Args:
      config: of the model.
      target: MMDiT tokens of the largest target of all.
      references: MMDiT tokens of the most references of one sample in the step; 0 for none.
    """
    most = round_up(references, target) if references else 0
    per_token = config.image_multiple // (config.vae.downscale * config.mmdit.patch_size)
    return TokenBudget(target, most, -(-most // per_token**2))


def open_loader(
    run: RunConfig, data: DataConfig, weights: Weights, mesh: Mesh, images: bool = True
) -> Loader:
    """A loader of this host's share of the batches.

    Args:
      run: the run that reads; cached features must come from its encoders.
      data: what is read.
      weights: of the run.
      mesh: batches are split over it.
      images: as for `Loader`.

    Raises:
      DeepGenError: the data cannot be used or are not the same on all hosts, or the mesh splits batches unevenly over
        hosts.
    """
    if has_cached(data):
        check_untrained(run)
    share, shares = host_share(mesh)
    loader = Loader(
        data,
        weights.config,
        weights.tokenizer,
        process_index=share,
        process_count=shares,
        weights=digest_for(data, run.model_folder),
        images=images,
    )
    # Each host would else draw its part of other batches.
    if jax.process_count() > 1 and not same_on_all(loader.plan.settings):
        loader.close()
        raise DeepGenError("hosts have read different data; give every host the same files and settings")
    return loader


def index_words(batch: Batch) -> np.ndarray:
    """High and low half of each sample's place in the global sequence, uint32 [B, 2], as `sample_keys` takes them."""
    index = batch["sample_index"]
    return np.stack([index >> 32, index & 0xFFFFFFFF], axis=1).astype(np.uint32)


def widen(batch: Mapping[str, np.ndarray], length: int, config: DeepGenConfig) -> Text:
    """The prompts of a loader's batch, left-padded to ``length`` tokens (think tokens not counted)."""
    more = length - batch["input_ids"].shape[1]

    def pad(name: str, value: int) -> Any:
        array = batch[name]
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(more, 0)], constant_values=value)

    return Text(
        pad("input_ids", config.text.pad_token_id),
        pad("position_ids", 1),
        pad("real", False),
        pad("visible", False),
        pad("image_index", -1),
    )


def _features(batch: Batch, share: Any) -> Features | None:
    """Cached features of a batch; None if it holds pictures."""
    stored = batch.get("features")
    if stored is None:
        return None
    references = tuple(Moments(*map(share, moments)) for moments in stored["references"])
    return Features(Moments(*map(share, stored["target"])), references, share(stored["image_tokens"]))


def _tokens(sizes: Sequence[tuple[int, int]], unit: int) -> int:
    return sum((width // unit) * (height // unit) for width, height in sizes)


def _split_batches(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
    """Keeps every array split over the batch, its dimension ``axis`` (one further for position ids)."""

    def constrain(path: Any, x: jax.Array) -> jax.Array:
        late = any(getattr(entry, "name", None) == "position_ids" for entry in path)
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh, x.ndim, axis + late))

    return jax.tree_util.tree_map_with_path(constrain, tree)


@partial(device_jit, static_argnames=("model", "mesh", "targets"))
def encode_images(
    model: DeepGen,
    mesh: Mesh,
    frozen: Tree,
    target: jax.Array,
    references: tuple[jax.Array, ...],
    targets: bool = True,
) -> Features:
    """Frozen features of a micro-batch of pictures, split over the batch; see ``inputs.encode``."""
    return _split_batches(mesh, encode(model, frozen, target, references, targets))


@partial(jax.jit, static_argnames=("model", "mesh", "budget"))
def _assemble(
    model: DeepGen,
    mesh: Mesh,
    features: Features,
    text: Text,
    negative: Text | None,
    weight: jax.Array,
    index: jax.Array,
    seed: jax.Array,
    budget: TokenBudget,
) -> tuple[MicroBatch, jax.Array]:
    keys = sample_keys(seed, index)
    noise = posterior_noise(keys, Training.TARGET_POSTERIOR, features.target)
    first = Training.REFERENCE_POSTERIOR
    others = [posterior_noise(keys, first + i, moments) for i, moments in enumerate(features.references)]
    micro = assemble(model, features, text, weight, noise, others, budget, negative)
    return _split_batches(mesh, micro), keys


@jax.jit
def _stack_all(items: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *items)


def _stack(items: list[tuple[MicroBatch, jax.Array]]) -> tuple[MicroBatch, jax.Array]:
    return _stack_all(items)
