"""Distillation to a few-step model: the student's weights, the programs, and the stage.

The loss and the step are in `deepgen_jax.training.distillation`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.abstract import image_tokens
from deepgen_jax.inference.defaults import guidance_or_none
from deepgen_jax.models import flops
from deepgen_jax.models.deepgen import make_network
from deepgen_jax.parallel import rules
from deepgen_jax.parallel.abstract import AbstractProgram, is_abstract, map_arrays
from deepgen_jax.parallel.jit_options import device_jit
from deepgen_jax.parallel.mesh import replicated
from deepgen_jax.stores.lineage import changed
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
from deepgen_jax.training.distill_config import DistillConfig
from deepgen_jax.training.distillation import DistillSettings, Networks, distill_step
from deepgen_jax.training.memory_model import Passes, Workload
from deepgen_jax.training.optimizer import learning_rate, make_optimizer
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.stage import LoaderStage, StepReport
from deepgen_jax.training.state import TrainState, shardings_of, start_state
from deepgen_jax.training.step_batches import StepBatches
from deepgen_jax.training.weights import STEP_PARTS, Weights, load_start

_HEAD = "proj_out"


def student_config(config: DistillConfig, model: DeepGenConfig) -> DeepGenConfig:
    """The student's configuration, from the teacher's."""
    return changed(model, config.model_changes, "the student's configuration")


def make_student(config: DistillConfig, weights: Weights, mesh: Mesh) -> tuple[Weights, Tree]:
    """The student's weights, and what of the MMDiT only the teacher has; from arrays, or from shapes with shardings.

    The student's head holds N copies of the teacher's, so that its policy is constant and begins as Euler's method over
    the segments. With adapters, all layers but the head are shared.

    Args:
      config: of the run.
      weights: that the run starts from: the teacher.
      mesh: of the run.

    Raises:
      DeepGenError: the run would continue adapters of an earlier one.
    """
    if weights.adapters_begun:
        raise DeepGenError(
            f"{config.start} trained mmdit_lora, which belong to the teacher now; run `deepgen export {config.start} "
            "--format model --out FOLDER`, and give model=FOLDER start=, or trains=mmdit"
        )
    frozen, trainable = dict(weights.frozen), dict(weights.trainable["params"])
    adapters = dict(weights.trainable["lora"])
    if "mmdit" in trainable:
        dtype = jnp.dtype(config.dtype)
        teacher = {"mmdit": map_arrays(lambda x: jnp.copy(x).astype(dtype), trainable["mmdit"])}
        head = trainable["mmdit"][_HEAD]
        trainable["mmdit"] = {**trainable["mmdit"], _HEAD: _tiled(head, config.estimates, mesh)}
    else:
        head = frozen["mmdit"][_HEAD]
        teacher = {"mmdit": {_HEAD: head}}
        trainable["mmdit"] = {_HEAD: _tiled(head, config.estimates, mesh)}
        frozen["mmdit"] = {name: tree for name, tree in frozen["mmdit"].items() if name != _HEAD}
        adapters["mmdit"] = {name: tree for name, tree in adapters["mmdit"].items() if name != _HEAD}
    student = weights._replace(
        config=student_config(config, weights.config), trainable={"params": trainable, "lora": adapters}, frozen=frozen
    )
    return student, teacher


def _tiled(head: Tree, count: int, mesh: Mesh) -> Tree:
    """Kernel and bias of the output head, ``count`` times side by side, float32."""

    def tile(head: Tree) -> Tree:
        return {name: jnp.tile(x.astype(jnp.float32), count) for name, x in head.items()}

    shapes = jax.eval_shape(tile, head)
    layout = rules.shardings(shapes, mesh, f"mmdit/{_HEAD}")
    if is_abstract(head):
        abstract: Tree = jax.tree.map(lambda x, where: x.update(sharding=where), shapes, layout)
        return abstract
    made: Tree = jax.jit(tile, out_shardings=layout)(head)
    return made


class DistillProgram(NamedTuple):
    """The jitted step of a run.

    Attributes:
      nets: student and teacher.
      settings: of the step.
      frozen: language model, bridge, and what of the MMDiT both share.
      teacher: what only the teacher has.
      jitted: (state, frozen, teacher, micro-batches, keys) -> (state, metrics); the state is donated.
    """

    nets: Networks
    settings: DistillSettings
    frozen: Tree
    teacher: Tree
    jitted: device_jit


def make_program(
    config: DistillConfig,
    optimizer: optax.GradientTransformation,
    weights: Weights,
    teacher: Tree,
    teacher_config: DeepGenConfig,
    state: TrainState,
    mesh: Mesh,
) -> DistillProgram:
    """The step of a run, from arrays or from shapes with shardings.

    Args:
      config: of the run.
      optimizer: of the run.
      weights, teacher: of :func:`make_student`.
      teacher_config: of the teacher.
      state: as `deepgen_jax.training.state.start_state` gives it; the new state is sharded alike.
      mesh: metrics are replicated on it.
    """
    nets = Networks(
        make_network(weights.config, mesh, config.dtype, remat=config.chosen_remat),
        make_network(teacher_config, mesh, config.dtype),
    )
    settings = DistillSettings(
        weights.scheduler,
        config.evaluations,
        config.targets,
        guidance_or_none(teacher_config.guidance(config.guidance_scale)),
        config.window,
        noised=config.states == "data",
        one=config.segments == "one",
        lora_scale=weights.lora_scale,
        ema_decay=config.ema_decay,
    )
    rate = learning_rate(config.optimizer, config.steps)

    def step(state: TrainState, *inputs: Any) -> tuple[TrainState, dict[str, Any]]:
        new, metrics = distill_step(nets, optimizer, settings, state, *inputs)
        return new, metrics | {"learning_rate": rate(state.step)}

    layout = (shardings_of(state), replicated(mesh))
    frozen = {part: weights.frozen[part] for part in STEP_PARTS}
    jitted = device_jit(step, latency_hiding=True, gradients=True, donate_argnums=0, out_shardings=layout)
    return DistillProgram(nets, settings, frozen, teacher, jitted)


def operations_of(config: DistillConfig, student: DeepGenConfig, guided: bool) -> Callable[[int, int, int], float]:
    """Operations of a step for one sample; see ``step_batches.StepBatches``."""
    learned = config.evaluations if config.segments == "all" else 1
    rolled_out = 0.0
    if config.segments == "one" and config.states == "noise":
        rolled_out = (config.evaluations - 1) / 2
    return partial(
        flops.distillation, student, config.trains, guided, rolled_out, learned, learned * config.targets
    )


def abstract_step(run: AbstractRun) -> AbstractProgram:
    """The training step."""
    config: DistillConfig = with_batch(run.config, run.batch)
    optimizer = make_optimizer(config.optimizer, config.steps)
    weights, teacher = make_student(config, run.weights, run.mesh)
    state = start_state(optimizer, weights.trainable, run.mesh, ema=config.ema_decay is not None)
    program = make_program(config, optimizer, weights, teacher, run.weights.config, state, run.mesh)
    guided = program.settings.guidance is not None
    batch = abstract_step_batch(
        run,
        program.nets.student,
        config.data,
        config.accumulation,
        operations=operations_of(config, weights.config, guided),
        negative=guided,
    )
    arguments = (state, program.frozen, program.teacher, batch.micro_batches, batch.keys)
    size = config.data.micro_batch
    return AbstractProgram(
        name="step",
        unit="samples",
        batch=config.accumulation * size,
        micro_batch=size,
        lower=lambda: program.jitted.lower(*arguments),
        arguments=arguments,
        memory={
            **state_memory(state),
            "frozen weights": (weights.frozen, program.teacher),
            "batch": (batch.micro_batches, batch.keys),
        },
        flops=batch.flops,
        summary=(
            *batch.summary,
            f"{config.evaluations} evaluations, {config.estimates} estimates and {config.targets} targets each; "
            f"teacher {'guided' if guided else 'without guidance'}; remat {config.remat}; attention "
            f"{program.nets.student.plan.kernel}",
        ),
        trains=True,
        latency_hiding=True,
        half_batch=f"accumulation={2 * config.accumulation} data.micro_batch={size // 2}, the same batch",
    )


def workload(config: DistillConfig, model: DeepGenConfig) -> Workload:
    """Passes of a step for the memory model, with shapes as in :func:`abstract_step`: one of the student a segment."""
    data = config.data
    tokens, lengths = image_tokens(model, data.image_size), sequence_lengths(model, data, PROMPT_TOKENS)
    segments = config.evaluations if config.segments == "all" else 1
    counts = task_counts(data, config.accumulation)
    passes = tuple(
        Passes(
            data.micro_batch,
            tokens * (2 if task == "edit" else 1),
            lengths[task],
            runs_text=False,
            loops=count * segments,
        )
        for task, count in sorted(counts.items())
    )
    return Workload(
        passes,
        (data.micro_batch,),
        step_samples=data.micro_batch * config.accumulation,
        encoded=(data.micro_batch, data.image_size**2) if "edit" in counts or config.states == "data" else (0, 0),
        average=config.ema_decay is not None,
        reference="mmdit" in config.trains,
    )


def _of_student(program: Compilable) -> Compilable:
    """A program of generation, with the student."""

    def make(run: AbstractRun) -> AbstractProgram:
        return program.make(dataclasses.replace(run, model=student_config(run.config, run.model)))

    return Compilable(make, program.smallest_batch)


class DistillStage(LoaderStage):
    """Distillation to a few-step policy; see `deepgen_jax.training.stage.Stage`."""

    abstract_programs: ClassVar[Mapping[str, Compilable]] = {
        "step": Compilable(abstract_step, lambda config, pieces: pieces * config.accumulation),
        **{name: _of_student(program) for name, program in INFERENCE.items()},
    }

    workload = staticmethod(workload)

    _config: DistillConfig

    def __init__(self, config: DistillConfig, mesh: Mesh) -> None:
        """Loads the teacher onto the mesh, makes the student, and opens the data.

        Raises:
          DeepGenError: weights or data cannot be used, or the micro-batch does not fit the mesh.
        """
        optimizer = make_optimizer(config.optimizer, config.steps)
        start = load_start(config, mesh)
        weights, teacher = make_student(config, start, mesh)
        super().__init__(
            config, config.data, config.accumulation, mesh, optimizer, weights, images=config.states == "data"
        )
        self._program = make_program(config, optimizer, weights, teacher, start.config, self.state, mesh)
        guided = self._program.settings.guidance is not None
        self._batches = StepBatches(
            self._loader,
            self._program.nets.teacher,
            weights.frozen,
            mesh,
            accumulation=config.accumulation,
            seed=config.seed,
            operations=operations_of(config, weights.config, guided),
            targets=config.states == "data",
            negative=guided,
        )

    def step(self) -> StepReport:
        """Takes one optimiser step."""
        batch, program = next(self._batches), self._program
        self.state, metrics = program.jitted(
            self.state, program.frozen, program.teacher, batch.micro_batches, batch.keys
        )
        waited = {"data": batch.seconds}
        return StepReport(metrics, batch.samples, batch.tokens, batch.flops, batch.sample_ids, waited)

    def summary(self) -> list[str]:
        """Summary of trained parameters, the policy and batch shapes."""
        config, guidance = self._config, self._program.settings.guidance
        teacher = "without guidance" if guidance is None else f"at guidance {guidance:g}"
        each = "each segment" if config.segments == "all" else "one segment"
        return [
            *super().summary(),
            f"distils the teacher {teacher} to {config.evaluations} evaluations of {config.estimates} estimates; "
            f"{config.targets} targets in {each}, from {config.states}",
        ]
