"""A run as shapes: its weights, its batches, and what it keeps on devices, without files or devices.

Stages make their jitted programs from arrays or from shapes with the same functions, and list those that
``deepgen compile`` offers as ``abstract_programs``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.data.mixture import task_at
from deepgen_jax.data.tokens import round_up
from deepgen_jax.data.vision_inputs import patch_grid
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.abstract import AbstractImages, image_tokens
from deepgen_jax.inference.defaults import resolve_sampling
from deepgen_jax.models import flops
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel.abstract import AbstractProgram, abstract_array, key_dtype
from deepgen_jax.parallel.mesh import batch_size_multiple, check_batch
from deepgen_jax.training.inputs import MicroBatch, Text, TokenBudget
from deepgen_jax.training.run_config import RunConfig
from deepgen_jax.training.state import TrainState
from deepgen_jax.training.step_batches import token_budget
from deepgen_jax.training.weights import Weights, abstract_start

#: Default length of a prompt with its template, in tokens; most captions are shorter.
PROMPT_TOKENS = 100


@dataclass(frozen=True)
class AbstractRun:
    """A run whose programs are compiled ahead of time.

    Attributes:
      config: of the run.
      model: sizes of the model.
      mesh: of devices that need not exist.
      prompt_tokens: length of prompts with the template, without think tokens.
      batch: samples or images of one run of a program, over all devices; None for what the configuration says.
      stacked: inference keeps layers stacked where the pipeline would split them.
    """

    config: Any
    model: DeepGenConfig
    mesh: Mesh
    prompt_tokens: int
    batch: int | None = None
    stacked: bool = False

    @cached_property
    def weights(self) -> Weights:
        """Shapes of the weights that the run starts from."""
        return abstract_start(self.config, self.model, self.mesh)

    def array(self, *shape: int, dtype: DTypeLike = jnp.float32, axis: int | None = None) -> Any:
        """A shape on the mesh, split over the batch axes along ``axis``, replicated for None."""
        return abstract_array(self.mesh, *shape, dtype=dtype, axis=axis)


@dataclass(frozen=True)
class Compilable:
    """A program that ``deepgen compile`` offers.

    Attributes:
      make: the program of a run; raises a DeepGenError where the batch does not fit the configuration or the mesh.
      smallest_batch: (configuration, pieces that the mesh splits batches into) -> batch with one sample a piece in each
        micro-batch.
    """

    make: Callable[[AbstractRun], AbstractProgram]
    smallest_batch: Callable[[Any, int], int]


def state_memory(state: TrainState) -> dict[str, Any]:
    """Trees of a state by kind of memory."""
    return {
        "trainable weights": state.trainable,
        "moving average": state.ema,
        "optimiser": (state.opt_state, state.step, state.skipped),
    }


def with_batch(config: Any, batch: int | None) -> Any:
    """A stage's configuration, its micro-batches sized for ``batch`` samples a step; unchanged for None.

    Raises:
      DeepGenError: the batch does not divide into the micro-batches of a step.
    """
    if batch is None:
        return config
    size, rest = divmod(batch, config.accumulation)
    if rest or not size:
        raise DeepGenError(
            f"--batch {batch} does not divide into accumulation={config.accumulation} micro-batches; change either"
        )
    return replace(config, data=replace(config.data, micro_batch=size))


class AbstractStepBatch(NamedTuple):
    """Shapes of a `deepgen_jax.training.step_batches.StepBatch`.

    Attributes:
      micro_batches: task -> stacked micro-batches.
      keys: task -> keys [A, B].
      flops: of the forward and backward passes, over all devices.
      summary: a line for each task.
    """

    micro_batches: dict[str, MicroBatch]
    keys: dict[str, Any]
    flops: float
    summary: tuple[str, ...]


def abstract_step_batch(
    run: AbstractRun,
    model: DeepGen,
    data: DataConfig,
    accumulation: int,
    merged: Callable[[int], int] = lambda _: 1,
    *,
    operations: Callable[[int, int, int], float] | None = None,
    negative: bool = False,
) -> AbstractStepBatch:
    """The batch of one step: square images of ``data.image_size``, one reference of that size in editing.

    Args:
      run: gives mesh, model and prompts.
      model: of the step.
      data: micro-batches and mixture.
      accumulation: micro-batches of a step.
      merged: micro-batches of a task -> how many of them the step joins, for the summary.
      operations: as for ``step_batches.StepBatches``; by default those of ``flops.training``.
      negative: samples come with their empty prompt.
    """
    check_batch("data.micro_batch", data.micro_batch, run.mesh)
    tokens, lengths = image_tokens(run.model, data.image_size), sequence_lengths(run.model, data, run.prompt_tokens)
    micro: dict[str, MicroBatch] = {}
    keys: dict[str, Any] = {}
    each = operations or partial(flops.training, run.model, run.config.trains)
    total, summary = 0.0, []
    for task, count in sorted(task_counts(data, accumulation).items()):
        references, length = tokens if task == "edit" else 0, lengths[task]
        budget = token_budget(run.model, tokens, references)
        micro[task], keys[task] = abstract_micro_batches(
            model, run.mesh, count, data.micro_batch, length, budget, negative
        )
        total += count * data.micro_batch * each(tokens, length, references)
        joined = f" ({merged(count)} at once)" if merged(count) > 1 else ""
        images = f"{tokens} target + {references} reference tokens"
        summary.append(f"{count} x {data.micro_batch} {task}{joined}: {images}, sequence {length}")
    return AbstractStepBatch(micro, keys, total, tuple(summary))


def task_counts(data: DataConfig, accumulation: int) -> Counter[str]:
    """Number of micro-batches of each task in a step."""
    return Counter(task_at(data.mixture, position)[0] for position in range(accumulation))


def sequence_lengths(model: DeepGenConfig, data: DataConfig, prompt_tokens: int) -> dict[str, int]:
    """Sequence length by task: prompt, think tokens, and in editing the reference's tokens in the language model."""
    rows, columns = patch_grid((data.image_size, data.image_size), model.vision)
    image = rows * columns // model.vision.spatial_merge_size**2
    text = prompt_tokens + model.bridge.num_queries
    return {task: round_up(length, data.token_multiple) for task, length in (("t2i", text), ("edit", text + image))}


def abstract_micro_batches(
    model: DeepGen, mesh: Mesh, count: int, size: int, length: int, budget: TokenBudget, negative: bool = False
) -> tuple[MicroBatch, jax.Array]:
    """One task of an :class:`AbstractStepBatch`: stacked micro-batches and their keys.

    Args:
      model: of the step.
      mesh: batches are split over it.
      count: micro-batches A of the task in a step.
      size: samples B of a micro-batch.
      length: of prompts, think tokens included.
      budget: sizes that images are padded to.
      negative: samples come with their empty prompt.
    """
    config, queries = model.config, model.config.bridge.num_queries
    channels, patch = config.mmdit.in_channels, config.mmdit.patch_size

    def array(*shape: int, dtype: DTypeLike = jnp.float32, axis: int = 1) -> Any:
        return abstract_array(mesh, *shape, dtype=dtype, axis=axis)

    def tokens(number: int) -> tuple[Any, Any, Any]:
        rows = (count, size, number)
        return array(*rows, channels * patch**2), array(*rows, dtype=jnp.int32), array(*rows, dtype=jnp.bool_)

    rows, prompt = (count, size, length), (count, size, length - queries)
    text = Text(
        array(*prompt, dtype=jnp.int32),
        array(count, 3, size, length, dtype=jnp.int32, axis=2),
        array(*rows, dtype=jnp.bool_),
        array(*rows, dtype=jnp.bool_),
        array(*prompt, dtype=jnp.int32),
    )
    images = array(count, size, budget.image_tokens, config.vision.out_hidden_size, dtype=model.dtype)
    empty = text if negative else None
    micro = MicroBatch(
        *tokens(budget.target), *tokens(budget.references), images, array(count, size), text, empty
    )
    return micro, array(count, size, dtype=key_dtype())


def _images(run: AbstractRun) -> AbstractImages:
    """Images as the configuration samples them, by default one a piece of the mesh."""
    config: RunConfig = run.config
    batch = run.batch or batch_size_multiple(run.mesh)
    check_batch("--batch", batch, run.mesh)
    samples = config.samples
    sampling = resolve_sampling(run.model, samples.num_inference_steps, samples.guidance_scale, samples.sampler)
    return AbstractImages(
        run.model,
        run.mesh,
        config.dtype,
        batch=batch,
        side=samples.size,
        steps=sampling.steps,
        sampler=sampling.sampler,
        guided=sampling.guidance != 1,
        prompt_tokens=run.prompt_tokens,
        stacked=run.stacked,
    )


#: Programs of every stage that samples images: the sampler, the prompts before it and the decoder after it.
INFERENCE: Mapping[str, Compilable] = {
    "inference": Compilable(lambda run: _images(run).denoising(), lambda config, pieces: pieces),
    "prompts": Compilable(lambda run: _images(run).prompts(), lambda config, pieces: pieces),
    "decoder": Compilable(lambda run: _images(run).decoding(), lambda config, pieces: pieces),
}
