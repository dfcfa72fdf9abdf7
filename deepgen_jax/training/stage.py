"""Interface of training stages: a stage takes steps; the loop does everything that all stages share."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import jax
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.data.reader import Batch
from deepgen_jax.data.tokens import PromptTokenizer
from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel.mesh import check_batch, replicated
from deepgen_jax.stores import model_folder
from deepgen_jax.training.accumulation import Sums, start_sums
from deepgen_jax.training.auto_settings import Choice, Devices, choose
from deepgen_jax.training.optimizer import learning_rate
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.run_config import RunConfig
from deepgen_jax.training.state import TrainState, parameter_counts, shardings_of, start_state
from deepgen_jax.training.step_batches import open_loader
from deepgen_jax.training.weights import Weights, current_params, load_start

if TYPE_CHECKING:
    from PIL import Image

    from deepgen_jax.inference.pipeline import DeepGenPipeline

#: Name of a stage -> module and class of its config, module and class of the stage.
STAGES = {
    "autoencoder": (
        ("deepgen_jax.training.run_config", "AutoencoderConfig"),
        ("deepgen_jax.training.autoencoder", "AutoencoderStage"),
    ),
    "distill": (
        ("deepgen_jax.training.distill_config", "DistillConfig"),
        ("deepgen_jax.training.distill", "DistillStage"),
    ),
    "grpo": (("deepgen_jax.rl.rl_config", "GRPOConfig"), ("deepgen_jax.rl.grpo", "GRPOStage")),
    "language": (
        ("deepgen_jax.training.run_config", "LanguageConfig"),
        ("deepgen_jax.training.language", "LanguageStage"),
    ),
    "supervised": (
        ("deepgen_jax.training.run_config", "SupervisedConfig"),
        ("deepgen_jax.training.supervised_stage", "SupervisedStage"),
    ),
}


@dataclass
class StepReport:
    """Report of a step to the loop.

    Attributes:
      metrics: by name; device scalars and vectors are read a step later, so that devices never wait for the host.
      samples, tokens, flops: of the step, over all hosts.
      sample_ids: of this host.
      seconds: host seconds by phase; "data" is waiting for the loader.
      pictures: name -> picture for the log.
    """

    metrics: dict[str, Any]
    samples: int
    tokens: int
    flops: float
    sample_ids: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)


class Stage(Protocol):
    """One kind of training. All that resuming needs is ``state`` (arrays) and ``position()`` (JSON)."""

    state: TrainState

    def step(self) -> StepReport:
        """Takes one optimiser step."""
        ...

    def position(self) -> dict[str, Any]:
        """Everything beside the state that the next step depends on, JSON, the same on every host."""
        ...

    def resume(self, state: TrainState, position: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        ...

    def pipeline(self, average: bool = True) -> DeepGenPipeline:
        """A pipeline of the current weights: of their moving average, if there is one and it is asked for."""
        ...

    def summary(self) -> list[str]:
        """Lines printed before the first step: what trains, on what."""
        ...

    def close(self) -> None:
        """Stops reading ahead."""
        ...


class LoaderStage:
    """A stage that learns from one data loader: its weights, state, data and position."""

    state: TrainState

    def __init__(
        self,
        config: RunConfig,
        data: DataConfig,
        accumulation: int,
        mesh: Mesh,
        optimizer: optax.GradientTransformation,
        weights: Weights | None = None,
        images: bool = True,
    ) -> None:
        """Loads the weights onto the mesh and opens the data.

        Args:
          config: of the run.
          data: what it learns from.
          accumulation: micro-batches of an optimiser step.
          mesh: of all hosts' devices.
          optimizer: of the run.
          weights: loaded before; None loads those that the run starts from.
          images: as for `deepgen_jax.data.loader.Loader`.

        Raises:
          DeepGenError: weights or data cannot be used, or the micro-batch does not fit the mesh.
        """
        check_batch("data.micro_batch", data.micro_batch, mesh)
        self._config, self._data, self._accumulation, self._mesh = config, data, accumulation, mesh
        weights = load_start(config, mesh) if weights is None else weights
        self.state = start_state(optimizer, weights.trainable, mesh, ema=config.ema_decay is not None)
        # What the state was made from was donated to it.
        self._weights = weights._replace(trainable={})
        self._loader = open_loader(config, data, self._weights, mesh, images)

    def position(self) -> dict[str, Any]:
        """The seed and the position in the data."""
        return {"seed": self._config.seed, "data": self._loader.get_state()}

    def resume(self, state: TrainState, position: dict[str, Any]) -> None:
        """Continues from a checkpoint.

        Raises:
          DeepGenError: the data or the seed differ from those of the checkpoint.
        """
        if position["seed"] != self._config.seed:
            raise DeepGenError(f"the run began with seed={position['seed']}, now it is {self._config.seed}; restore it")
        self._loader.set_state(position["data"])
        self.state = state

    def pipeline(self, average: bool = True) -> DeepGenPipeline:
        """A pipeline of the current weights: of their moving average, if there is one and it is asked for."""
        state = self.state if average else self.state._replace(ema=None)
        return make_pipeline(self._weights, state, self._config.dtype, self._mesh)

    def summary(self) -> list[str]:
        """Summary of trained parameters and batch shapes."""
        buckets = ", ".join(str(bucket) for bucket in self._loader.buckets)
        return [
            f"trains {self._trained()} parameters; {self._accumulation * self._data.micro_batch} samples a step in "
            f"{self._accumulation} micro-batches",
            f"{len(self._loader.buckets)} buckets: {buckets}",
        ]

    def close(self) -> None:
        """Stops reading ahead."""
        self._loader.close()

    def _trained(self) -> str:
        """The trained parts with their numbers of parameters."""
        return parameter_counts(self.state.trainable)


class AccumulatingStage(LoaderStage, ABC):
    """A stage whose batches differ in shape, so that a step runs one program a batch and one for the update."""

    #: Names of ``Sums.totals``.
    _totals: tuple[str, ...]

    def _compile(self, update: Any) -> None:
        """Jits the programs around ``update(state, sums) -> (state, metrics)``; :meth:`_add` runs a batch."""
        rate = learning_rate(self._config.optimizer, self._config.steps)
        everywhere, layout = replicated(self._mesh), shardings_of(self.state)
        sharded: Any = (layout.trainable, everywhere)
        self._sums_layout = Sums(*sharded)

        def start(trainable: Tree) -> Sums:
            return start_sums(trainable, self._totals)

        def finish(state: TrainState, sums: Sums) -> tuple[TrainState, dict[str, Any]]:
            new, metrics = update(state, sums)
            return new, metrics | {"learning_rate": rate(state.step)}

        self._start = jax.jit(start, out_shardings=self._sums_layout)
        self._update = jax.jit(finish, donate_argnums=0, out_shardings=(layout, everywhere))

    def step(self) -> StepReport:
        """Takes one optimiser step."""
        start = time.perf_counter()
        batches = [next(self._loader) for _ in range(self._accumulation)]
        waited = {"data": time.perf_counter() - start}
        sums = self._start(self.state.trainable)
        for batch in batches:
            sums = self._add(sums, batch)
        self.state, metrics = self._update(self.state, sums)
        tokens, operations = self._count(batches)
        ids = [str(name) for batch in batches for name in batch["sample_ids"] if name]
        samples = self._accumulation * self._data.micro_batch
        return StepReport(metrics, samples, tokens, operations, ids, waited)

    @abstractmethod
    def _add(self, sums: Sums, batch: Batch) -> Sums:
        """Runs the program of one batch."""

    @abstractmethod
    def _count(self, batches: list[Batch]) -> tuple[int, float]:
        """Tokens and operations of a step, over all hosts."""


def stage_class(config: RunConfig) -> Any:
    """The class of a config's stage."""
    module, name = STAGES[kind_of(config)][1]
    return getattr(importlib.import_module(module), name)


def make_stage(config: RunConfig, mesh: Mesh) -> Stage:
    """The stage of a config, its weights loaded and its data opened; settings left to "auto" are chosen."""
    config = settings_on(config, mesh).applied(config)
    stage: Stage = stage_class(config)(config, mesh)
    return stage


def settings_for(config: RunConfig, devices: Devices, recorded: Mapping[str, Any] | None = None) -> Choice:
    """Mesh, rematerialisation and replication of a run on devices; see `deepgen_jax.training.auto_settings.choose`."""
    workload = getattr(stage_class(config), "workload", None)
    return choose(config, devices, lambda: model_sizes(config)[0], workload, recorded)


def settings_on(config: RunConfig, mesh: Mesh, recorded: Mapping[str, Any] | None = None) -> Choice:
    """The same on a mesh."""
    sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return settings_for(replace(config, mesh=sizes), Devices.of(list(mesh.devices.flat)), recorded)


def model_sizes(config: RunConfig) -> tuple[DeepGenConfig, str]:
    """Sizes of the model that a run starts from, and a line that says where they are from."""
    folder = config.model_folder
    if config.model and folder.is_dir():
        return replace(model_folder.read_manifest(folder).config, lora=None), f"model {folder}"
    return DeepGenConfig(), f"there is no folder {config.model!r}; sizes are those of the released model"


def kind_of(config: RunConfig) -> str:
    """Name of the stage of a config."""
    return next(kind for kind, (owner, _) in STAGES.items() if owner[1] == type(config).__name__)


def make_pipeline(weights: Weights, state: TrainState, dtype: DTypeLike, mesh: Mesh) -> DeepGenPipeline:
    """A pipeline of the current weights, or of their moving average if there is one."""
    from deepgen_jax.inference.pipeline import DeepGenPipeline

    params = current_params(weights, state, dtype, mesh)
    config = replace(weights.config, lora=None)
    tokenizer = PromptTokenizer(weights.tokenizer, config)
    return DeepGenPipeline(config, weights.scheduler, params, tokenizer, mesh, dtype)
