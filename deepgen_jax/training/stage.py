"""What the training loop drives: a stage takes steps; the loop does everything that all stages share."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

import jax
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax.data.tokens import PromptTokenizer
from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel.mesh import batch_size_multiple, replicated
from deepgen_jax.training.run_config import RunConfig
from deepgen_jax.training.supervised import TrainState, init_state
from deepgen_jax.training.trees import Tree
from deepgen_jax.training.weights import Weights, current_params

if TYPE_CHECKING:
    from PIL import Image

    from deepgen_jax.data.loader import Loader
    from deepgen_jax.inference.pipeline import DeepGenPipeline

#: Name of a stage -> module and class of its config, module and class of the stage.
STAGES = {
    "autoencoder": (
        ("deepgen_jax.training.run_config", "AutoencoderConfig"),
        ("deepgen_jax.training.autoencoder_stage", "AutoencoderStage"),
    ),
    "grpo": (("deepgen_jax.rl.rl_config", "GRPOConfig"), ("deepgen_jax.rl.grpo_stage", "GRPOStage")),
    "language": (
        ("deepgen_jax.training.run_config", "LanguageConfig"),
        ("deepgen_jax.training.language_stage", "LanguageStage"),
    ),
    "supervised": (
        ("deepgen_jax.training.run_config", "SupervisedConfig"),
        ("deepgen_jax.training.supervised_stage", "SupervisedStage"),
    ),
}


@dataclass
class StepReport:
    """What a step tells the loop.

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
        """Goes on from a checkpoint."""
        ...

    def pipeline(self) -> DeepGenPipeline:
        """The model as it is now, to make pictures with."""
        ...

    def facts(self) -> list[str]:
        """Lines that a person wants to see before the first step: what trains, shapes in use."""
        ...

    def close(self) -> None:
        """Ends reading ahead."""
        ...


class LoaderStage:
    """What the stages share that learn from one loader: where they stand, going on, and the model as it is."""

    state: TrainState
    _config: RunConfig
    _mesh: Mesh
    _weights: Weights
    _loader: Loader

    def position(self) -> dict[str, Any]:
        """The seed and where the data stand."""
        return {"seed": self._config.seed, "data": self._loader.get_state()}

    def resume(self, state: TrainState, position: dict[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
          DeepGenError: the data or the seed are others than those of the checkpoint.
        """
        if position["seed"] != self._config.seed:
            raise DeepGenError(f"the run began with seed={position['seed']}, now it is {self._config.seed}; restore it")
        self._loader.set_state(position["data"])
        self.state = state

    def pipeline(self) -> DeepGenPipeline:
        """The model as it is now, or its moving average where there is one."""
        return make_pipeline(self._weights, self.state, self._config.dtype, self._mesh)

    def close(self) -> None:
        """Ends reading ahead."""
        self._loader.close()


def make_stage(config: RunConfig, mesh: Mesh) -> Stage:
    """The stage that a config is of, its weights loaded and its data opened."""
    module, name = STAGES[kind_of(config)][1]
    return getattr(importlib.import_module(module), name)(config, mesh)


def kind_of(config: RunConfig) -> str:
    """Name of the stage that a config is of."""
    return next(kind for kind, (owner, _) in STAGES.items() if owner[1] == type(config).__name__)


def check_micro_batch(name: str, size: int, mesh: Mesh) -> None:
    """Raises a DeepGenError where micro-batches cannot be split evenly over the mesh."""
    if size % (pieces := batch_size_multiple(mesh)):
        raise DeepGenError(
            f"{name} is {size}, but the mesh splits batches into {pieces} pieces; make it a multiple of {pieces}"
        )


def abstract_state(
    optimizer: optax.GradientTransformation, trainable: Tree, mesh: Mesh, *, ema: bool
) -> TrainState:
    """Shapes, dtypes and shardings of a state: the optimiser's moments lie like the parameters they belong to.

    Args:
      optimizer: of the run.
      trainable: {"params": ..., "lora": ...}, arrays or ``ShapeDtypeStruct``s, with their shardings.
      mesh: where counters are whole on every device.
      ema: the state holds a moving average.
    """
    shapes = jax.eval_shape(partial(init_state, optimizer, ema=ema), trainable["params"], trainable["lora"])
    layout, everywhere = shardings_of(trainable), replicated(mesh)
    of_parameter = {_names(path): where for path, where in jax.tree_util.tree_leaves_with_path(layout)}
    opt_state = jax.tree_util.tree_map_with_path(
        lambda path, _: of_parameter.get(_names(path), everywhere), shapes.opt_state
    )
    shardings: Any = shapes._replace(
        step=everywhere, trainable=layout, opt_state=opt_state, ema=layout if ema else None, skipped=everywhere
    )
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Keys at the end of a path: moments are in trees like that of the parameters, whatever holds these trees."""
    keys = takewhile(lambda entry: isinstance(entry, jax.tree_util.DictKey), reversed(path))
    return tuple(entry.key for entry in keys)[::-1]


def start_state(
    optimizer: optax.GradientTransformation, weights: Weights, mesh: Mesh, *, ema: bool
) -> TrainState:
    """A state at step 0, laid out on the mesh as :func:`abstract_state` says.

    The arrays of ``weights.trainable`` are donated to it.
    """
    trainable = weights.trainable
    make = partial(init_state, optimizer, ema=ema)
    layout: Any = shardings_of(abstract_state(optimizer, trainable, mesh, ema=ema))
    return jax.jit(make, out_shardings=layout, donate_argnums=(0, 1))(trainable["params"], trainable["lora"])


def make_pipeline(weights: Weights, state: TrainState, dtype: DTypeLike, mesh: Mesh) -> DeepGenPipeline:
    """A pipeline of the weights as they are now, or of their moving average where there is one."""
    from deepgen_jax.inference.pipeline import DeepGenPipeline

    params = current_params(weights, state, dtype, mesh)
    config = replace(weights.config, lora=None)
    tokenizer = PromptTokenizer(weights.tokenizer, config)
    return DeepGenPipeline(config, weights.scheduler, params, tokenizer, mesh, dtype)


def shardings_of(tree: Any) -> Any:
    """The sharding of every array."""
    return jax.tree.map(lambda x: x.sharding, tree)
