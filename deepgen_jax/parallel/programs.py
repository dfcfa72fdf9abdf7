"""The programs of training, reinforcement learning and inference, with arguments that are shapes alone.

They are those that the stages and the pipeline run, traced for the sizes that a configuration gives: pictures of
``data.image_size`` squared, one reference of the same size in editing, prompts of a given length rounded up to
``data.token_multiple``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from deepgen_jax import model_folder
from deepgen_jax.config import DeepGenConfig, LoRAConfig, SchedulerConfig
from deepgen_jax.data.config import DataConfig
from deepgen_jax.data.mixture import task_at
from deepgen_jax.data.tokens import round_up
from deepgen_jax.data.vision_inputs import patch_grid
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference import programs
from deepgen_jax.inference.conditioning import SEQUENCE_BUCKET
from deepgen_jax.inference.loading import part_dtypes
from deepgen_jax.models import flops
from deepgen_jax.models.attention import Kernel, choose_kernel
from deepgen_jax.models.deepgen import DeepGen, abstract_params
from deepgen_jax.parallel import rules
from deepgen_jax.parallel.mesh import batch_sharding, batch_size_multiple, replicated
from deepgen_jax.rl.algorithms import ALGORITHMS
from deepgen_jax.rl.config import GRPOConfig
from deepgen_jax.rl.policy import policy_variables
from deepgen_jax.rl.rollout import Trajectory, rollout
from deepgen_jax.rl.step import (
    canvas_of,
    guidance_scale,
    make_update,
    policy_model,
    rollout_settings,
    run_optimizer,
)
from deepgen_jax.rl.update import UpdateKeys
from deepgen_jax.training.config import RunConfig, SupervisedConfig
from deepgen_jax.training.feed import abstract_micro_batches, token_budget
from deepgen_jax.training.optimizer import make_optimizer
from deepgen_jax.training.origin import ADAPTED
from deepgen_jax.training.stage import abstract_state, check_micro_batch, shardings_of
from deepgen_jax.training.supervised_stage import STEP_PARTS, make_step, step_model
from deepgen_jax.training.trees import Tree, init_lora, split


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
      memory: kind -> tree of what lies on the devices while it runs, by the account of memory.
      flops: operations of the model in one run, over all devices; what is computed again is not counted.
      facts: lines about shapes.
      trains: it ends in an optimiser step.
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
    folder = Path(config.model)
    if config.model and folder.is_dir():
        return dataclasses.replace(model_folder.read_manifest(folder).config, lora=None), f"model {folder}"
    return DeepGenConfig(), f"model {config.model!r} is no folder here; sizes are those of the released model"


def names_of(config: RunConfig) -> tuple[str, ...]:
    """Programs of a configuration, the one that is compiled unless another is named first."""
    if isinstance(config, GRPOConfig):
        return ("update", "rollout", "inference")
    if isinstance(config, SupervisedConfig):
        return ("step", "encoders", "inference")
    raise DeepGenError(f"a {type(config).__name__} has no programs here; name a configuration of stage 1, 2 or 3")


def make_program(subject: Subject, name: str, batch: int | None = None) -> Program:
    """A program by name.

    Args:
      subject: what it is of.
      name: one of :func:`names_of`.
      batch: samples of an optimiser step, or images of a rollout or of inference, over all devices; None as the
        configuration says (inference: one image a piece of the mesh).

    Raises:
      DeepGenError: an unknown name, or a batch that does not split over the mesh.
    """
    makers = {
        "step": _supervised,
        "encoders": _encoders,
        "update": _update,
        "rollout": _rollout,
        "inference": _inference,
    }
    if name not in (known := names_of(subject.config)):
        raise DeepGenError(f"--program {name!r} is none of this configuration's; choose one of {', '.join(known)}")
    return makers[name](subject, batch)


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


def micro_batches(config: RunConfig, name: str) -> int:
    """Micro-batches of one run of a program."""
    if name == "step" and isinstance(config, SupervisedConfig):
        return config.accumulation
    if name == "update" and isinstance(config, GRPOConfig):
        return config.prompts_per_step * config.rollout.group_size // config.policy.micro_batch
    return 1


def _with_data(config: SupervisedConfig, micro_batch: int) -> SupervisedConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch=micro_batch))


def _array(mesh: Mesh, *shape: int, dtype: Any = jnp.float32, axis: int | None = None) -> Any:
    """A shape on the mesh, split over the batch along ``axis``, whole without one."""
    where = replicated(mesh) if axis is None else batch_sharding(mesh, len(shape), axis)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _kernel(model: DeepGen) -> str:
    attention = model.attention
    return attention.implementation if isinstance(attention, Kernel) else attention


def _key_type() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0)).dtype


def _placed(tree: Tree, mesh: Mesh, dtype: Any) -> Tree:
    def place(x: Any, where: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=where)

    return jax.tree.map(place, tree, rules.shardings(tree, mesh)) if tree else {}


def _weights(subject: Subject) -> tuple[Tree, Tree]:
    """Trainable and frozen weights as ``deepgen_jax.training.weights.load_start`` lays them out."""
    config, mesh = subject.config, subject.mesh
    shapes = abstract_params(subject.model)
    params: Tree = {}
    for part, dtype in part_dtypes(subject.model, jnp.dtype(config.dtype)).items():
        wanted = jnp.float32 if part in config.trains else dtype
        params |= _placed({part: shapes[part]}, mesh, wanted)
    trainable, frozen = split(params, config.trains)
    adapters: Tree = {}
    for part in (part for name, part in ADAPTED.items() if name in config.trains):
        fresh = jax.eval_shape(
            lambda part=part: init_lora(shapes[part], config.lora.rank, jax.random.key(0), part)  # type: ignore[misc]
        )
        adapters |= _placed(fresh, mesh, jnp.float32)
    return {"params": trainable, "lora": adapters}, frozen


def _lora(config: RunConfig) -> LoRAConfig | None:
    adapted = any(name in config.trains for name in ADAPTED)
    return LoRAConfig(config.lora.rank, config.lora.alpha) if adapted else None


def _image_tokens(model: DeepGenConfig, side: int) -> int:
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


def _micro_batches(
    subject: Subject, model: DeepGen, data: DataConfig, accumulation: int
) -> tuple[dict[str, Any], dict[str, Any], float, tuple[str, ...]]:
    """What a feed gives for one step: micro-batches, keys, operations and lines about the shapes."""
    check_micro_batch("data.micro_batch", data.micro_batch, subject.mesh)
    tokens, lengths = _image_tokens(subject.model, data.image_size), _lengths(subject, data)
    tasks = [task_at(data.mixture, position)[0] for position in range(accumulation)]
    micro: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    operations, facts = 0.0, []
    for task in sorted(set(tasks)):
        references = tokens if task == "edit" else 0
        count, length = tasks.count(task), lengths[task]
        budget = token_budget(subject.model, tokens, references)
        micro[task], keys[task] = abstract_micro_batches(
            model, subject.mesh, count, data.micro_batch, length, budget
        )
        one = flops.training(subject.model, subject.config.trains, tokens, length, references)
        operations += count * data.micro_batch * one
        facts.append(
            f"{count} x {data.micro_batch} {task}: {tokens} target + {references} reference tokens, sequence {length}"
        )
    return micro, keys, operations, tuple(facts)


def _state_memory(state: Any) -> dict[str, Any]:
    return {
        "trainable weights": state.trainable,
        "moving average": state.ema,
        "optimiser": (state.opt_state, state.step, state.skipped),
    }


def _supervised(subject: Subject, batch: int | None) -> Program:
    config, mesh = subject.config, subject.mesh
    assert isinstance(config, SupervisedConfig)
    if batch is not None:
        config = with_batch(config, batch)
        assert isinstance(config, SupervisedConfig)
    trainable, frozen = _weights(subject)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = abstract_state(optimizer, trainable, mesh, ema=config.ema_decay is not None)
    frozen = {part: tree for part, tree in frozen.items() if part in STEP_PARTS}
    model = step_model(config, subject.model, mesh)
    lora = _lora(config)
    step = make_step(config, model, optimizer, SchedulerConfig(), lora.scale if lora else 0.0)
    micro, keys, operations, facts = _micro_batches(subject, model, config.data, config.accumulation)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(state), replicated(mesh)))
    return Program(
        "step",
        "samples",
        config.accumulation * config.data.micro_batch,
        config.data.micro_batch,
        lambda: jitted.lower(state, frozen, micro, keys),
        (state, frozen, micro, keys),
        {**_state_memory(state), "frozen weights": frozen, "batch": (micro, keys)},
        operations,
        (*facts, f"trains {', '.join(config.trains)}; remat {config.remat}; attention {_kernel(model)}"),
        True,
    )


def _encoders(subject: Subject, batch: int | None) -> Program:
    """VAE and vision tower over one micro-batch of edits, as the feed runs them before each step."""
    from deepgen_jax.training.feed import encode_images

    config, mesh = subject.config, subject.mesh
    assert isinstance(config, SupervisedConfig)
    size, side = batch or config.data.micro_batch, config.data.image_size
    check_micro_batch("--batch", size, mesh)
    _, frozen = _weights(subject)
    frozen = {part: frozen[part] for part in ("vae", "vision")}
    model = step_model(config, subject.model, mesh)
    picture = _array(mesh, size, side, side, 3, dtype=jnp.uint8, axis=0)
    rows, columns = patch_grid((side, side), subject.model.vision)
    one = 2 * flops.vae_encoder(subject.model.vae, side, side) + flops.vision(subject.model.vision, rows * columns)
    return Program(
        "encoders",
        "samples",
        size,
        size,
        lambda: encode_images.lower(model, mesh, frozen, picture, (picture,)),
        (frozen, picture, picture),
        {"frozen weights": frozen, "batch": (picture, picture)},
        float(size * one),
        (f"{size} targets and references of {side}x{side}", f"attention {_kernel(model)}"),
        False,
    )


def _rl_parts(subject: Subject, batch: int | None) -> tuple[GRPOConfig, DeepGen, Any, Tree, Tree, Any]:
    config = subject.config if batch is None else with_batch(subject.config, batch)
    assert isinstance(config, GRPOConfig)
    trainable, frozen = _weights(subject)
    optimizer = run_optimizer(config)
    algorithm = ALGORITHMS[config.policy.algorithm]
    state = abstract_state(
        optimizer, trainable, subject.mesh, ema=config.ema_decay is not None or algorithm.old_policy
    )
    frozen = {part: tree for part, tree in frozen.items() if part not in ("vae", "vision")}
    return config, policy_model(config, subject.model, subject.mesh), state, trainable, frozen, optimizer


def _condition(subject: Subject, rows: int, dtype: Any, length: int, axis: int | None) -> programs.Condition:
    mmdit = subject.model.mmdit
    return programs.Condition(
        _array(subject.mesh, rows, mmdit.pooled_projection_dim, dtype=dtype, axis=axis),
        _array(subject.mesh, rows, length, mmdit.joint_attention_dim, dtype=dtype, axis=axis),
        _array(subject.mesh, rows, length, dtype=jnp.bool_, axis=axis),
    )


def _rollout_length(subject: Subject) -> int:
    return round_up(subject.prompt_tokens + subject.model.bridge.num_queries, SEQUENCE_BUCKET)


def _rollout(subject: Subject, batch: int | None) -> Program:
    """One micro-batch of a rollout; ``batch`` is the micro-batch."""
    mesh = subject.mesh
    config, model, state, _, frozen, _ = _rl_parts(subject, None)
    size, group = batch or config.rollout.micro_batch, config.rollout.group_size
    check_micro_batch("rollout.micro_batch", size, mesh)
    if size % group:
        raise DeepGenError(f"--batch {size} does not divide into groups of {group} images")
    canvas, scale = canvas_of(config, subject.model, mesh), guidance_scale(config)
    settings = rollout_settings(config, canvas)
    lora = _lora(config)
    policy = state.ema if ALGORITHMS[config.policy.algorithm].old_policy else state.trainable
    variables = jax.eval_shape(lambda f, p: policy_variables(f, p, lora.scale if lora else 0.0), frozen, policy)
    variables = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), variables, {
        name: rules.shardings(tree, mesh) for name, tree in variables.items()
    })
    sides, tokens = (1 if scale is None else 2), _image_tokens(subject.model, config.rollout.size)
    length, width = _rollout_length(subject), subject.model.mmdit.in_channels * subject.model.mmdit.patch_size**2
    condition = _condition(subject, size // group * sides, model.dtype, length, None)
    noise = _array(mesh, size, tokens, width, axis=0)
    sigmas, keys = _array(mesh, config.rollout.steps + 1), _array(mesh, size, dtype=_key_type())
    operations = size * sides * config.rollout.steps * flops.mmdit(subject.model.mmdit, tokens, length)
    arguments = (model, settings, variables, noise, condition, sigmas, config.rollout.eta, keys, scale)
    # The optimiser's state and the parts that only other programs run stay on the devices meanwhile.
    resident = {**_state_memory(state), "frozen weights": frozen}
    return Program(
        "rollout",
        "images",
        size,
        size,
        lambda: rollout.lower(*arguments),
        (variables, noise, condition, sigmas, keys),
        {**resident, "batch": (noise, condition, sigmas, keys)},
        float(operations),
        (
            f"{size} images of {config.rollout.size}x{config.rollout.size}, {config.rollout.steps} steps of "
            f"{config.rollout.sampler}, guidance {scale or 'none'}, sequence {length}",
            f"attention {_kernel(model)}",
        ),
        False,
    )


def _update(subject: Subject, batch: int | None) -> Program:
    """One optimiser update from a whole rollout."""
    mesh = subject.mesh
    config, model, state, trainable, frozen, optimizer = _rl_parts(subject, batch)
    check_micro_batch("policy.micro_batch", config.policy.micro_batch, mesh)
    if not ALGORITHMS[config.policy.algorithm].trajectory:
        raise DeepGenError("policy.algorithm=nft has no trajectories, and its update is not compiled here; choose grpo")
    canvas, scale, lora = canvas_of(config, subject.model, mesh), guidance_scale(config), _lora(config)
    sides, tokens = (1 if scale is None else 2), _image_tokens(subject.model, config.rollout.size)
    length, width = _rollout_length(subject), subject.model.mmdit.in_channels * subject.model.mmdit.patch_size**2
    images, steps = config.prompts_per_step * config.rollout.group_size, config.rollout.steps
    step = make_update(config, model, optimizer, SchedulerConfig(), lora.scale if lora else 0.0, canvas)
    reference = None
    if config.policy.beta and trainable["params"]:
        reference = _placed(trainable["params"], mesh, jnp.dtype(config.dtype))
    latents = _array(mesh, steps + 1, images, tokens, width, dtype=jnp.dtype(config.rollout.dtype), axis=1)
    trajectory = Trajectory(
        latents,
        _array(mesh, steps, images, axis=1),
        _array(mesh, steps + 1),
        _array(mesh, images, dtype=_key_type()),
    )
    condition = _condition(subject, config.prompts_per_step * sides, model.dtype, length, None)
    micro: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    operations, facts = 0.0, tuple[str, ...]()
    if config.data is not None and config.policy.sft_weight:
        micro, keys, operations, facts = _micro_batches(subject, model, config.data, 1)
    learned = min(max(int(config.policy.timestep_fraction * steps), 1), steps - 1)
    passes = learned * (3 + bool(config.policy.beta)) / config.policy.updates_per_rollout
    operations += images * sides * passes * flops.mmdit(subject.model.mmdit, tokens, length)
    arguments = (
        state, frozen, reference, trajectory, condition, _array(mesh, images), micro,
        UpdateKeys(_array(mesh, dtype=_key_type()), keys), _array(mesh, dtype=jnp.int32),
    )  # fmt: skip
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(state), replicated(mesh)))
    return Program(
        "update",
        "images",
        images // config.policy.updates_per_rollout,
        config.policy.micro_batch,
        lambda: jitted.lower(*arguments),
        arguments,
        {
            **_state_memory(state),
            "frozen weights": (frozen, reference),
            "batch": (trajectory, condition, micro, keys),
        },
        operations,
        (
            f"{images} images x {learned} of {steps} steps in micro-batches of {config.policy.micro_batch}, sequence "
            f"{length}",
            *facts,
            f"trains {', '.join(config.trains)}; remat {config.remat}; attention {_kernel(model)}",
        ),
        True,
    )


def _inference(subject: Subject, batch: int | None) -> Program:
    """The guided sampler of the pipeline, on pictures of the size that the configuration samples."""
    mesh, config = subject.mesh, subject.config
    size = batch or batch_size_multiple(mesh)
    check_micro_batch("--batch", size, mesh)
    dtype = jnp.dtype(config.dtype)
    model = DeepGen(subject.model, dtype=dtype, attention=choose_kernel(mesh, dtype))
    params = {part: _placed({part: tree}, mesh, part_dtypes(subject.model, dtype)[part])[part]
              for part, tree in abstract_params(subject.model).items()}  # fmt: skip
    side = config.samples.size
    tokens, length = _image_tokens(subject.model, side), _rollout_length(subject)
    edge, steps = side // subject.model.vae.downscale, config.samples.num_inference_steps
    noise = _array(mesh, size, subject.model.mmdit.in_channels, edge, edge, axis=0)
    condition = _condition(subject, 2 * size, dtype, length, 0)
    arguments = ({"mmdit": params["mmdit"]}, noise, None, condition, _array(mesh, steps + 1), _array(mesh))
    return Program(
        "inference",
        "images",
        size,
        size,
        lambda: programs.denoise.lower(model, *arguments),
        arguments,
        {"frozen weights": params, "batch": (noise, condition)},
        float(2 * size * steps * flops.mmdit(subject.model.mmdit, tokens, length)),
        (f"{size} images of {side}x{side}, {steps} guided Euler steps, sequence {length}",
         f"attention {_kernel(model)}"),
        False,
    )  # fmt: skip

