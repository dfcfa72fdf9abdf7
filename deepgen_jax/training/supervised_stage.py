"""Stages 1 and 2 as the training loop drives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deepgen_jax.config import DeepGenConfig, SchedulerConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models.attention import choose_kernel
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel.jit_options import tuned_jit
from deepgen_jax.parallel.mesh import replicated
from deepgen_jax.parallel.rules import gathered_shardings
from deepgen_jax.training.optimizer import learning_rate, make_optimizer
from deepgen_jax.training.run_config import SupervisedConfig
from deepgen_jax.training.stage import LoaderStage, StepReport, check_micro_batch, shardings_of, start_state
from deepgen_jax.training.step_batches import Feed, open_loader
from deepgen_jax.training.supervised import StepSettings, TrainState, parts, train_step
from deepgen_jax.training.trees import Tree
from deepgen_jax.training.weights import load_start

#: Parts of the model that a step runs.
STEP_PARTS = ("text", "bridge", "mmdit")

Step = Callable[[TrainState, Tree, Any, Any], tuple[TrainState, dict[str, Any]]]


def step_model(config: SupervisedConfig, model: DeepGenConfig, mesh: Mesh) -> DeepGen:
    """The network as a step runs it on a mesh, without dropout."""
    attention = choose_kernel(mesh, config.dtype, gradients=True)
    return DeepGen(model, dtype=jnp.dtype(config.dtype), remat=config.remat, attention=attention)


def training_schedule(config: SupervisedConfig, scheduler: SchedulerConfig) -> SchedulerConfig:
    """The schedule that noise levels are drawn from: the model's, with the shift of the configuration if it has one.

    Raises:
      DeepGenError: a shift is given, but the model's schedule shifts by image size.
    """
    if config.noise_shift is None:
        return scheduler
    if scheduler.use_dynamic_shifting:
        raise DeepGenError("noise_shift does not go with a scheduler that shifts by image size; leave it out")
    return dataclasses.replace(scheduler, shift=config.noise_shift)


def make_step(
    config: SupervisedConfig,
    model: DeepGen,
    optimizer: optax.GradientTransformation,
    scheduler: SchedulerConfig,
    lora_scale: float,
) -> Step:
    """A step as the stage jits it: (state, frozen, micro-batches, keys) -> (state, metrics)."""
    schedule = training_schedule(config, scheduler)
    settings = StepSettings(schedule, lora_scale, config.weighting, config.ema_decay, config.merge)
    rate = learning_rate(config.optimizer, config.steps)
    trained = model.clone(lora_dropout=config.lora.dropout if "lora" in config.trains else 0.0)

    def step(state: TrainState, frozen: Tree, micro_batches: Any, keys: Any) -> tuple[TrainState, dict[str, Any]]:
        new, metrics = train_step(trained, optimizer, settings, state, frozen, micro_batches, keys)
        sums, counts = metrics.pop("loss_bin_sums"), metrics.pop("loss_bin_counts")
        return new, metrics | {"loss_by_sigma": sums / counts, "learning_rate": rate(state.step)}

    return step


def _gathered(text: Tree, mesh: Mesh) -> Tree:
    """The language model with its layers whole on every device, but for a "tensor" axis."""
    gathered: Tree = jax.jit(lambda tree: tree, out_shardings=gathered_shardings(text, mesh, "text"))(text)
    return gathered


class SupervisedStage(LoaderStage):
    """Flow matching on pictures with texts; see `deepgen_jax.training.stage.Stage`."""

    _config: SupervisedConfig

    def __init__(self, config: SupervisedConfig, mesh: Mesh) -> None:
        """Loads the weights onto the mesh and opens the data.

        Raises:
          DeepGenError: weights or data cannot be used, or the micro-batch does not fit the mesh.
        """
        check_micro_batch("data.micro_batch", config.data.micro_batch, mesh)
        if others := [name for name in ("vae", "text", "vision") if name in config.trains]:
            raise DeepGenError(f"trains: this stage does not train the {others[0]}; leave it out")
        self._config, self._mesh = config, mesh
        self._weights = load_start(config, mesh)
        if config.gather_frozen:
            text = _gathered(self._weights.frozen["text"], mesh)
            self._weights = self._weights._replace(frozen={**self._weights.frozen, "text": text})
        optimizer = make_optimizer(config.optimizer, config.steps)
        self.state = start_state(optimizer, self._weights, mesh, ema=config.ema_decay is not None)
        # The state takes the weights over: what it was made from is donated.
        self._weights = self._weights._replace(trainable={})
        self._loader = open_loader(config, config.data, self._weights, mesh)
        model = step_model(config, self._weights.config, mesh)
        self._feed = Feed(
            self._loader,
            model,
            self._weights.frozen,
            mesh,
            accumulation=config.accumulation,
            seed=config.seed,
            trains=config.trains,
        )
        # The feed's VAE and vision tower take no part in the step.
        self._frozen = {part: tree for part, tree in self._weights.frozen.items() if part in STEP_PARTS}
        step = make_step(config, model, optimizer, self._weights.scheduler, self._weights.lora_scale)
        layout = (shardings_of(self.state), replicated(mesh))
        self._step = tuned_jit(step, gathers_ahead=True, donate_argnums=0, out_shardings=layout)

    def step(self) -> StepReport:
        """Takes one optimiser step."""
        batch = next(self._feed)
        self.state, metrics = self._step(self.state, self._frozen, batch.micro_batches, batch.keys)
        waited = {"data": batch.seconds}
        return StepReport(metrics, batch.samples, batch.tokens, batch.flops, batch.sample_ids, waited)

    def facts(self) -> list[str]:
        """What trains, and the shapes that batches have."""
        trees = parts(self.state.trainable)
        trained = ", ".join(f"{name} {sum(x.size for x in jax.tree.leaves(tree)):,}" for name, tree in trees.items())
        samples = self._config.accumulation * self._config.data.micro_batch
        buckets = ", ".join(str(bucket) for bucket in self._loader.buckets)
        return [
            f"trains {trained} parameters; {samples} samples a step in {self._config.accumulation} micro-batches",
            f"{len(self._loader.buckets)} buckets: {buckets}",
        ]
