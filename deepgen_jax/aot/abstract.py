"""What programs take, as shapes on a mesh: weights, states, micro-batches, conditions."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from deepgen_jax.config import DeepGenConfig, LoRAConfig
from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.data.mixture import task_at
from deepgen_jax.data.tokens import round_up
from deepgen_jax.data.vision_inputs import patch_grid
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference import programs
from deepgen_jax.inference.conditioning import SEQUENCE_BUCKET
from deepgen_jax.inference.loading import part_dtypes
from deepgen_jax.models import flops
from deepgen_jax.models.deepgen import DeepGen, abstract_params
from deepgen_jax.parallel import rules
from deepgen_jax.parallel.mesh import batch_sharding, replicated
from deepgen_jax.rl.rl_config import GRPOConfig
from deepgen_jax.stores import model_folder
from deepgen_jax.stores.lineage import ADAPTED
from deepgen_jax.training.partition import Tree, init_lora, split
from deepgen_jax.training.run_config import RunConfig, SupervisedConfig
from deepgen_jax.training.stage import check_micro_batch
from deepgen_jax.training.step_batches import abstract_micro_batches, token_budget
from deepgen_jax.training.supervised import at_once


@dataclass(frozen=True)
class Program:
    """One program on one mesh.

    Attributes:
      name: as asked for by ``--program``.
      unit: what a batch is counted in.
      batch: samples or images of one run of the program, over all devices.
      micro_batch: of which the network sees so many at once.
      lower: () -> the lowered program.
      arguments: what it takes.
      memory: kind -> tree of what lies on the devices while it runs, with what a run's other programs keep there.
      flops: operations of the model in one run, over all devices; what is computed again is not counted.
      facts: lines about shapes.
      trains: it ends in an optimiser step.
      latency_hiding: as for `deepgen_jax.parallel.jit_options`.
    """

    name: str
    unit: str
    batch: int
    micro_batch: int
    lower: Callable[[], Any]
    arguments: Any
    memory: dict[str, Any]
    flops: float
    facts: tuple[str, ...]
    trains: bool
    latency_hiding: bool = False


@dataclass(frozen=True)
class Subject:
    """What is compiled, and for which devices.

    Attributes:
      config: of the run.
      model: sizes of the model.
      mesh: of devices that need not be there.
      prompt_tokens: of the user's words and the template around them.
    """

    config: RunConfig
    model: DeepGenConfig
    mesh: Mesh
    prompt_tokens: int


def model_sizes(config: RunConfig) -> tuple[DeepGenConfig, str]:
    """Sizes of the model that a run starts from, and a line that tells whose they are."""
    folder = config.model_folder
    if config.model and folder.is_dir():
        return dataclasses.replace(model_folder.read_manifest(folder).config, lora=None), f"model {folder}"
    return DeepGenConfig(), f"model {config.model!r} is no folder here; sizes are those of the released model"


def array(mesh: Mesh, *shape: int, dtype: Any = jnp.float32, axis: int | None = None) -> Any:
    """A shape on the mesh, split over the batch along ``axis``, whole without one."""
    where = replicated(mesh) if axis is None else batch_sharding(mesh, len(shape), axis)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def key_type() -> Any:
    """Dtype of JAX's typed random keys."""
    return jax.eval_shape(lambda: jax.random.key(0)).dtype


def placed(tree: Tree, mesh: Mesh, dtype: Any) -> Tree:
    """Shapes of a parameter tree, laid out by the sharding table."""
    def place(x: Any, where: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=where)

    return jax.tree.map(place, tree, rules.shardings(tree, mesh)) if tree else {}


def weights_of(subject: Subject) -> tuple[Tree, Tree]:
    """Trainable and frozen weights as ``deepgen_jax.training.weights.load_start`` lays them out."""
    config, mesh = subject.config, subject.mesh
    shapes = abstract_params(subject.model)
    params: Tree = {}
    for part, dtype in part_dtypes(subject.model, jnp.dtype(config.dtype)).items():
        wanted = jnp.float32 if part in config.trains else dtype
        params |= placed({part: shapes[part]}, mesh, wanted)
    trainable, frozen = split(params, config.trains)
    adapters: Tree = {}
    for part in (part for name, part in ADAPTED.items() if name in config.trains):
        fresh = jax.eval_shape(
            lambda part=part: init_lora(shapes[part], config.lora.rank, jax.random.key(0), part)  # type: ignore[misc]
        )
        adapters |= placed(fresh, mesh, jnp.float32)
    return {"params": trainable, "lora": adapters}, frozen


def lora_of(config: RunConfig) -> LoRAConfig | None:
    """Adapters that a run trains."""
    adapted = any(name in config.trains for name in ADAPTED)
    return LoRAConfig(config.lora.rank, config.lora.alpha) if adapted else None


def image_tokens(model: DeepGenConfig, side: int) -> int:
    """MMDiT tokens of a square picture of ``side`` pixels."""
    unit = model.vae.downscale * model.mmdit.patch_size
    if side % unit:
        raise DeepGenError(f"pictures of {side} pixels do not divide into patches of {unit}; change data.image_size")
    return (side // unit) ** 2


def _lengths(subject: Subject, data: DataConfig) -> dict[str, int]:
    """Sequence length of each task: prompt, think tokens, and the reference's VLM tokens in editing."""
    rows, columns = patch_grid((data.image_size, data.image_size), subject.model.vision)
    pictures = rows * columns // subject.model.vision.spatial_merge_size**2
    words = subject.prompt_tokens + subject.model.bridge.num_queries
    lengths = {"t2i": words, "edit": words + pictures}
    return {task: round_up(length, data.token_multiple) for task, length in lengths.items()}


def step_batch(
    subject: Subject, model: DeepGen, data: DataConfig, accumulation: int, merge: int = 1
) -> tuple[dict[str, Any], dict[str, Any], float, tuple[str, ...]]:
    """What a feed gives for one step: micro-batches, keys, operations and lines about the shapes.

    ``merge`` only shows in the lines: the step itself merges what it is given.
    """
    check_micro_batch("data.micro_batch", data.micro_batch, subject.mesh)
    tokens, lengths = image_tokens(subject.model, data.image_size), _lengths(subject, data)
    micro: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    operations, facts = 0.0, []
    for task, count in sorted(_micro_batches(data, accumulation).items()):
        references, length = tokens if task == "edit" else 0, lengths[task]
        budget = token_budget(subject.model, tokens, references)
        micro[task], keys[task] = abstract_micro_batches(
            model, subject.mesh, count, data.micro_batch, length, budget
        )
        one = flops.training(subject.model, subject.config.trains, tokens, length, references)
        operations += count * data.micro_batch * one
        together = at_once(count, merge)
        merging = f" ({together} at once)" if together > 1 else ""
        images = f"{tokens} target + {references} reference tokens"
        facts.append(f"{count} x {data.micro_batch} {task}{merging}: {images}, sequence {length}")
    return micro, keys, operations, tuple(facts)


def largest_batch(config: SupervisedConfig) -> int:
    """Samples that the network sees at once, at most."""
    counts = _micro_batches(config.data, config.accumulation).values()
    return config.data.micro_batch * max(at_once(count, config.merge) for count in counts)


def _micro_batches(data: DataConfig, accumulation: int) -> Counter[str]:
    """How many micro-batches of each task a step has."""
    return Counter(task_at(data.mixture, position)[0] for position in range(accumulation))


def state_memory(state: Any) -> dict[str, Any]:
    """What a ``TrainState`` holds, by the kind of memory."""
    return {
        "trainable weights": state.trainable,
        "moving average": state.ema,
        "optimiser": (state.opt_state, state.step, state.skipped),
    }


def condition_of(subject: Subject, rows: int, dtype: Any, length: int, axis: int | None) -> programs.Condition:
    """A condition of so many rows, split over the batch along ``axis``."""
    mmdit = subject.model.mmdit
    return programs.Condition(
        array(subject.mesh, rows, mmdit.pooled_projection_dim, dtype=dtype, axis=axis),
        array(subject.mesh, rows, length, mmdit.joint_attention_dim, dtype=dtype, axis=axis),
        array(subject.mesh, rows, length, dtype=jnp.bool_, axis=axis),
    )


def prompt_length(subject: Subject) -> int:
    """Sequence of a prompt that the pipeline encodes, think tokens included."""
    return round_up(subject.prompt_tokens + subject.model.bridge.num_queries, SEQUENCE_BUCKET)


def with_batch(config: RunConfig, batch: int) -> RunConfig:
    """A configuration whose optimiser step takes ``batch`` samples (or images), in as many micro-batches as before.

    Raises:
      DeepGenError: the number of micro-batches does not divide it.
    """
    if isinstance(config, SupervisedConfig):
        size, rest = divmod(batch, config.accumulation)
        if rest or not size:
            raise DeepGenError(
                f"--batch {batch} does not divide into accumulation={config.accumulation} micro-batches; change either"
            )
        return _with_data(config, size)
    assert isinstance(config, GRPOConfig)
    prompts, rest = divmod(batch, config.rollout.group_size)
    if rest or not prompts:
        raise DeepGenError(f"--batch {batch} does not divide into groups of {config.rollout.group_size} images")
    count = config.prompts_per_step * config.rollout.group_size // config.policy.micro_batch
    policy = dataclasses.replace(config.policy, micro_batch=max(batch // count, 1))
    rollout_config = dataclasses.replace(config.rollout, micro_batch=math.gcd(batch, config.rollout.micro_batch))
    return dataclasses.replace(config, prompts_per_step=prompts, policy=policy, rollout=rollout_config)


def _with_data(config: SupervisedConfig, micro_batch: int) -> SupervisedConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch=micro_batch))
