"""The programs of training, reinforcement learning and inference, with arguments that are shapes alone.

They are those that the stages and the pipeline run, traced for the sizes that a configuration gives: pictures of
``data.image_size`` squared, one reference of the same size in editing, prompts of a given length rounded up to
``data.token_multiple``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from deepgen_jax.aot.abstract import (
    Program,
    Subject,
    array,
    condition_of,
    image_tokens,
    largest_batch,
    lora_of,
    placed,
    prompt_length,
    state_memory,
    step_batch,
    weights_of,
    with_batch,
)
from deepgen_jax.aot.rl_programs import rollout_program, update_program
from deepgen_jax.config import SchedulerConfig
from deepgen_jax.data.vision_inputs import patch_grid
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference import programs
from deepgen_jax.inference.loading import part_dtypes
from deepgen_jax.models import flops
from deepgen_jax.models.attention import choose_kernel, implementation_of
from deepgen_jax.models.deepgen import DeepGen, abstract_params
from deepgen_jax.parallel.mesh import batch_size_multiple
from deepgen_jax.parallel.rules import gathered_shardings
from deepgen_jax.rl.rl_config import GRPOConfig
from deepgen_jax.training.optimizer import make_optimizer
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.run_config import RunConfig, SupervisedConfig
from deepgen_jax.training.stage import check_micro_batch
from deepgen_jax.training.state import TrainState, abstract_state
from deepgen_jax.training.supervised import STEP_PARTS, jit_step, step_model


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
        "update": update_program,
        "rollout": rollout_program,
        "inference": _inference,
    }
    if name not in (known := names_of(subject.config)):
        raise DeepGenError(f"--program {name!r} is none of this configuration's; choose one of {', '.join(known)}")
    return makers[name](subject, batch)


def micro_batches(config: RunConfig, name: str) -> int:
    """Micro-batches of one run of a program."""
    if name == "step" and isinstance(config, SupervisedConfig):
        return config.accumulation
    if name == "update" and isinstance(config, GRPOConfig):
        return config.prompts_per_step * config.rollout.group_size // config.policy.micro_batch
    return 1


def _supervised(subject: Subject, batch: int | None) -> Program:
    config, mesh = subject.config, subject.mesh
    assert isinstance(config, SupervisedConfig)
    if batch is not None:
        config = with_batch(config, batch)
        assert isinstance(config, SupervisedConfig)
    optimizer, state, frozen = _trained(subject, config)
    used = {part: tree for part, tree in frozen.items() if part in STEP_PARTS}
    model = step_model(config, subject.model, mesh)
    kernel = implementation_of(model.attention)
    lora = lora_of(config)
    jitted = jit_step(config, model, optimizer, SchedulerConfig(), lora.scale if lora else 0.0, state, mesh)
    micro, keys, operations, facts = step_batch(
        subject, model, config.data, config.accumulation, config.merge
    )
    return Program(
        "step",
        "samples",
        config.accumulation * config.data.micro_batch,
        largest_batch(config),
        lambda: jitted.lower(state, used, micro, keys),
        (state, used, micro, keys),
        {**state_memory(state), "frozen weights": frozen, "batch": (micro, keys)},
        operations,
        (*facts, f"trains {', '.join(config.trains)}; remat {config.remat}; attention {kernel}"),
        True,
        latency_hiding=True,
    )


def _trained(
    subject: Subject, config: SupervisedConfig
) -> tuple[optax.GradientTransformation, TrainState, Tree]:
    """Optimiser, its state and the frozen weights, which all lie on the devices throughout a run."""
    trainable, frozen = weights_of(subject)
    if config.gather_frozen:
        where = gathered_shardings(frozen["text"], subject.mesh, "text")
        frozen = {**frozen, "text": jax.tree.map(lambda x, s: x.update(sharding=s), frozen["text"], where)}
    optimizer = make_optimizer(config.optimizer, config.steps)
    return optimizer, abstract_state(optimizer, trainable, subject.mesh, ema=config.ema_decay is not None), frozen


def _encoders(subject: Subject, batch: int | None) -> Program:
    """VAE and vision tower over one micro-batch of edits, as the feed runs them before each step."""
    from deepgen_jax.training.step_batches import encode_images

    config, mesh = subject.config, subject.mesh
    assert isinstance(config, SupervisedConfig)
    size, side = batch or config.data.micro_batch, config.data.image_size
    check_micro_batch("--batch", size, mesh)
    _, state, frozen = _trained(subject, config)
    used = {part: frozen[part] for part in ("vae", "vision")}
    model = step_model(config, subject.model, mesh)
    picture = array(mesh, size, side, side, 3, dtype=jnp.uint8, axis=0)
    rows, columns = patch_grid((side, side), subject.model.vision)
    one = 2 * flops.vae_encoder(subject.model.vae, side, side) + flops.vision(subject.model.vision, rows * columns)
    return Program(
        "encoders",
        "samples",
        size,
        size,
        lambda: encode_images.lower(model, mesh, used, picture, (picture,)),
        (used, picture, picture),
        {**state_memory(state), "frozen weights": frozen, "batch": (picture, picture)},
        float(size * one),
        (f"{size} targets and references of {side}x{side}", f"attention {implementation_of(model.attention)}"),
        False,
    )


def _inference(subject: Subject, batch: int | None) -> Program:
    """The guided sampler of the pipeline, on pictures of the size that the configuration samples."""
    mesh, config = subject.mesh, subject.config
    size = batch or batch_size_multiple(mesh)
    check_micro_batch("--batch", size, mesh)
    dtype = jnp.dtype(config.dtype)
    model = DeepGen(subject.model, dtype=dtype, attention=choose_kernel(mesh, dtype))
    params = {part: placed({part: tree}, mesh, part_dtypes(subject.model, dtype)[part])[part]
              for part, tree in abstract_params(subject.model).items()}  # fmt: skip
    side = config.samples.size
    tokens, length = image_tokens(subject.model, side), prompt_length(subject)
    edge, steps = side // subject.model.vae.downscale, config.samples.num_inference_steps
    noise = array(mesh, size, subject.model.mmdit.in_channels, edge, edge, axis=0)
    condition = condition_of(subject, 2 * size, dtype, length, 0)
    arguments = ({"mmdit": params["mmdit"]}, noise, None, condition, array(mesh, steps + 1), array(mesh))
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
         f"attention {implementation_of(model.attention)}"),
        False,
    )  # fmt: skip
