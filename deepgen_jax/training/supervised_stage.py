"""Stages 1 and 2 as runs of the training loop: the jitted step, its shapes for `deepgen compile`, and the stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deepgen_jax.config import DeepGenConfig, SchedulerConfig
from deepgen_jax.data.vision_inputs import patch_grid
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.abstract import image_tokens
from deepgen_jax.models import flops
from deepgen_jax.models.deepgen import DeepGen, make_network
from deepgen_jax.parallel.abstract import AbstractProgram, reshard
from deepgen_jax.parallel.jit_options import device_jit
from deepgen_jax.parallel.mesh import check_batch, replicated
from deepgen_jax.parallel.rules import gathered_shardings
from deepgen_jax.training.abstract_run import (
    INFERENCE,
    PROMPT_TOKENS,
    AbstractRun,
    Compilable,
    abstract_step_batch,
    sequence_lengths,
    state_memory,
    task_counts,
    with_batch,
)
from deepgen_jax.training.memory_model import Passes, Workload
from deepgen_jax.training.optimizer import learning_rate, make_optimizer
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.run_config import SupervisedConfig
from deepgen_jax.training.stage import LoaderStage, StepReport
from deepgen_jax.training.state import TrainState, shardings_of, start_state
from deepgen_jax.training.step_batches import StepBatches, encode_images
from deepgen_jax.training.supervised import StepSettings, at_once, train_step
from deepgen_jax.training.weights import STEP_PARTS, Weights


def training_schedule(config: SupervisedConfig, scheduler: SchedulerConfig) -> SchedulerConfig:
    """The schedule that noise levels are drawn from: the model's, with the shift of the configuration if it has one.

    Raises:
      DeepGenError: a shift is given, but the model's schedule shifts by image size.
    """
    if config.noise_shift is None:
        return scheduler
    if scheduler.use_dynamic_shifting:
        raise DeepGenError("noise_shift cannot be combined with a scheduler that shifts by image size; leave it out")
    return dataclasses.replace(scheduler, shift=config.noise_shift)


class StepProgram(NamedTuple):
    """The jitted step of a run.

    Attributes:
      model: the network, without dropout.
      frozen: weights that do not train, sharded as the step takes them.
      jitted: (state, :attr:`inputs`, micro-batches, keys) -> (state, metrics); the state is donated.
    """

    model: DeepGen
    frozen: Tree
    jitted: device_jit

    @property
    def inputs(self) -> Tree:
        """The frozen weights that the step takes."""
        return {part: tree for part, tree in self.frozen.items() if part in STEP_PARTS}


def make_step(
    config: SupervisedConfig,
    optimizer: optax.GradientTransformation,
    weights: Weights,
    state: TrainState,
    mesh: Mesh,
) -> StepProgram:
    """The step of a run, from arrays or from shapes with shardings.

    Args:
      config: of the run.
      optimizer: of the run.
      weights: of the run; :attr:`Weights.trainable` is not used.
      state: as `deepgen_jax.training.state.start_state` gives it; the new state is sharded alike.
      mesh: metrics are replicated on it.
    """
    frozen = weights.frozen
    if config.gather_frozen is True:
        # Layers are replicated except along a "tensor" axis.
        text = frozen["text"]
        frozen = {**frozen, "text": reshard(text, gathered_shardings(text, mesh, "text"))}
    model = make_network(weights.config, mesh, config.dtype, remat=config.chosen_remat)
    schedule = training_schedule(config, weights.scheduler)
    settings = StepSettings(schedule, weights.lora_scale, config.weighting, config.ema_decay, config.merge)
    rate = learning_rate(config.optimizer, config.steps)
    trained = model.clone(lora_dropout=config.lora.dropout if "lora" in config.trains else 0.0)

    def step(state: TrainState, frozen: Tree, micro_batches: Any, keys: Any) -> tuple[TrainState, dict[str, Any]]:
        new, metrics = train_step(trained, optimizer, settings, state, frozen, micro_batches, keys)
        sums, counts = metrics.pop("loss_bin_sums"), metrics.pop("loss_bin_counts")
        return new, metrics | {"loss_by_sigma": sums / counts, "learning_rate": rate(state.step)}

    layout = (shardings_of(state), replicated(mesh))
    return StepProgram(
        model, frozen, device_jit(step, latency_hiding=True, gradients=True, donate_argnums=0, out_shardings=layout)
    )


def _abstract(run: AbstractRun, config: SupervisedConfig) -> tuple[StepProgram, TrainState]:
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = start_state(optimizer, run.weights.trainable, run.mesh, ema=config.ema_decay is not None)
    return make_step(config, optimizer, run.weights, state, run.mesh), state


def abstract_step(run: AbstractRun) -> AbstractProgram:
    """The training step."""
    config: SupervisedConfig = with_batch(run.config, run.batch)
    program, state = _abstract(run, config)
    merged = partial(at_once, most=config.merge)
    batch = abstract_step_batch(run, program.model, config.data, config.accumulation, merged)
    micro_batches, keys = batch.micro_batches, batch.keys
    size, counts = config.data.micro_batch, task_counts(config.data, config.accumulation)
    together = size * max(map(merged, counts.values()))
    advice = []
    if config.gather_frozen is True:
        advice.append("gather_frozen=false, which splits the language model, too, and gathers its layers")
    if config.merge > 1:
        advice.append("merge=1, which takes the micro-batches of a task one after another")
    return AbstractProgram(
        name="step",
        unit="samples",
        batch=config.accumulation * size,
        micro_batch=together,
        lower=lambda: program.jitted.lower(state, program.inputs, micro_batches, keys),
        arguments=(state, program.inputs, micro_batches, keys),
        memory={**state_memory(state), "frozen weights": program.frozen, "batch": (micro_batches, keys)},
        flops=batch.flops,
        summary=(
            *batch.summary,
            f"trains {', '.join(config.trains)}; remat {config.remat}; attention {program.model.plan.kernel}",
        ),
        trains=True,
        latency_hiding=True,
        advice=tuple(advice),
        half_batch=f"accumulation={2 * config.accumulation} data.micro_batch={size // 2}, the same batch",
    )


def workload(config: SupervisedConfig, model: DeepGenConfig) -> Workload:
    """Passes of a step for the memory model, with shapes as in :func:`abstract_step`."""
    data, learns = config.data, "lora" in config.trains
    tokens, lengths = image_tokens(model, data.image_size), sequence_lengths(model, data, PROMPT_TOKENS)
    passes = []
    for task, count in sorted(task_counts(data, config.accumulation).items()):
        joined = at_once(count, config.merge)
        passes.append(
            Passes(
                data.micro_batch * joined,
                tokens * (2 if task == "edit" else 1),
                lengths[task],
                trains_text=learns,
                loops=count // joined,
            )
        )
    return Workload(
        tuple(passes),
        (data.micro_batch,),
        step_samples=data.micro_batch * config.accumulation,
        encoded=(data.micro_batch, data.image_size**2),
        average=config.ema_decay is not None,
    )


def abstract_encoders(run: AbstractRun) -> AbstractProgram:
    """VAE and vision tower over one micro-batch of edits, as they run before each step."""
    config, model = run.config, run.model
    size, side = run.batch or config.data.micro_batch, config.data.image_size
    check_batch("--batch", size, run.mesh)
    program, state = _abstract(run, config)
    used = {part: program.frozen[part] for part in ("vae", "vision")}
    image = run.array(size, side, side, 3, dtype=jnp.uint8, axis=0)
    rows, columns = patch_grid((side, side), model.vision)
    each = 2 * flops.vae_encoder(model.vae, side, side) + flops.vision(model.vision, rows * columns)
    return AbstractProgram(
        name="encoders",
        unit="samples",
        batch=size,
        micro_batch=size,
        lower=lambda: encode_images.lower(program.model, run.mesh, used, image, (image,)),
        arguments=(used, image, image),
        memory={**state_memory(state), "frozen weights": program.frozen, "batch": (image, image)},
        flops=float(size * each),
        summary=(f"{size} targets and references of {side}x{side}", f"attention {program.model.plan.kernel}"),
        half_batch=f"--batch {size // 2}",
    )


class SupervisedStage(LoaderStage):
    """Flow matching on pictures with texts; see `deepgen_jax.training.stage.Stage`."""

    abstract_programs: ClassVar[Mapping[str, Compilable]] = {
        "step": Compilable(abstract_step, lambda config, pieces: pieces * config.accumulation),
        "encoders": Compilable(abstract_encoders, lambda config, pieces: pieces),
        **INFERENCE,
    }
    workload = staticmethod(workload)

    _config: SupervisedConfig

    def __init__(self, config: SupervisedConfig, mesh: Mesh) -> None:
        """Loads the weights onto the mesh and opens the data.

        Raises:
          DeepGenError: weights or data cannot be used, or the micro-batch does not fit the mesh.
        """
        if others := [name for name in ("vae", "text", "vision") if name in config.trains]:
            raise DeepGenError(f"trains: this stage does not train the {others[0]}; leave it out")
        optimizer = make_optimizer(config.optimizer, config.steps)
        super().__init__(config, config.data, config.accumulation, mesh, optimizer)
        self._program = make_step(config, optimizer, self._weights, self.state, mesh)
        self._weights = self._weights._replace(frozen=self._program.frozen)
        self._batches = StepBatches(
            self._loader,
            self._program.model,
            self._program.frozen,
            mesh,
            accumulation=config.accumulation,
            seed=config.seed,
            operations=partial(flops.training, self._weights.config, config.trains),
        )

    def step(self) -> StepReport:
        """Takes one optimiser step."""
        batch = next(self._batches)
        self.state, metrics = self._program.jitted(
            self.state, self._program.inputs, batch.micro_batches, batch.keys
        )
        waited = {"data": batch.seconds}
        return StepReport(metrics, batch.samples, batch.tokens, batch.flops, batch.sample_ids, waited)
