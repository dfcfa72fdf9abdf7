"""DiffusionNFT: policy improvement on the forward process (Zheng et al. 2025, arXiv 2509.16117).

Needs no trajectories and no likelihoods: clean images of any sampler are noised again, and the velocity is moved from
that of the sampling policy towards good images and away from bad ones. With v_old of that policy and r in [0, 1] the
optimality of an image,

  L = r |v+ - v|^2 + (1 - r) |v- - v|^2,  v+ = v_old + beta (v_theta - v_old),  v- = v_old - beta (v_theta - v_old),

where v = e - x_0 is the flow-matching target. The old policy follows the trained one as a moving average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepgen_jax.flow.schedule import sample_u, sigma_from_u
from deepgen_jax.inference.programs import Condition
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.random_keys import ForwardProcess, Update
from deepgen_jax.rl.advantages import CLIP
from deepgen_jax.rl.losses import velocity_kl
from deepgen_jax.rl.rl_config import NFTConfig
from deepgen_jax.rl.update import (
    PolicyGradients,
    UpdateKeys,
    UpdateSettings,
    Velocities,
    VelocityLoss,
    accumulated_gradients,
    draw_images,
    finish,
)
from deepgen_jax.training.inputs import MicroBatch
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.state import TrainState


def optimality(advantages: jax.Array) -> jax.Array:
    """Probability r that an image is a good one: advantages of -5 to 5 mapped to 0 to 1."""
    return 0.5 + 0.5 * jnp.clip(advantages / CLIP, -1, 1)


def contrastive_losses(
    velocity: jax.Array,
    old_velocity: jax.Array,
    clean: jax.Array,
    noisy: jax.Array,
    sigma: jax.Array,
    probability: jax.Array,
    strength: float,
) -> tuple[jax.Array, jax.Array]:
    """Losses of the implicit positive and negative policy, each [b].

    The square is that of the predicted clean image, x_s - s v, divided by its mean absolute error without gradient:
    the paper's adaptive weighting, which weights all noise levels alike.

    Args:
      velocity, old_velocity: of the trained and the old policy at ``noisy``, [b, T, D]; the latter takes no gradient.
      clean, noisy: x_0 and x_s, [b, T, D].
      sigma: s, [b].
      probability: r, [b].
      strength: beta.

    Returns:
      (r times the positive loss, (1 - r) times the negative loss).
    """
    old = jax.lax.stop_gradient(old_velocity)
    s = sigma[:, None, None]

    def loss(v: jax.Array) -> jax.Array:
        error = noisy - s * v - clean
        scale = jnp.maximum(jnp.mean(jnp.abs(error), axis=(1, 2)), 1e-5)
        return jnp.mean(jnp.square(error), axis=(1, 2)) / jax.lax.stop_gradient(scale)

    step = strength * (velocity - old)
    return probability * loss(old + step), (1 - probability) * loss(old - step)


class ForwardStatistics(NamedTuple):
    """Sums over micro-batches; float32 scalars."""

    number: jax.Array
    positive: jax.Array
    negative: jax.Array
    drift: jax.Array

    def merged(self, other: ForwardStatistics) -> ForwardStatistics:
        """Of both."""
        return ForwardStatistics(*map(jnp.add, self, other))

    def metrics(self) -> dict[str, jax.Array]:
        """For the log; ``old_policy_drift`` is the mean square of v - v_old."""
        names = ("loss/positive", "loss/negative", "old_policy_drift")
        return {name: total / self.number for name, total in zip(names, self[1:], strict=True)}


def nft_gradients(
    model: DeepGen,
    settings: UpdateSettings,
    trainable: Tree,
    old: Tree,
    frozen: Tree,
    reference: Tree | None,
    clean: jax.Array,
    condition: Condition,
    advantages: jax.Array,
    image_keys: jax.Array,
    images: jax.Array,
) -> PolicyGradients:
    """Gradient of the loss above and of the KL penalty in velocity space, accumulated over (draw, micro-batch).

    Args:
      old: the policy that sampled, structured as ``trainable``.
      clean: [B, T, D] float32, latents of the sampled images.
      image_keys: [B] of ``rollout.image_keys``; noise levels and noise depend on these alone.
      the others: as in ``update.policy_gradients``.
    """
    policy, scheduler = settings.policy, settings.supervised.scheduler
    velocities = Velocities(model, settings, frozen, condition)
    shape = clean.shape[1:]

    def forward(key: jax.Array, draw: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(key, jnp.uint32(ForwardProcess.DRAWS) + draw)
        u = sample_u(jax.random.fold_in(key, ForwardProcess.NOISE_LEVEL), (), scheduler, settings.supervised.weighting)
        noise = jax.random.normal(jax.random.fold_in(key, ForwardProcess.NOISE), shape, jnp.float32)
        return sigma_from_u(u, scheduler, shape[0]), noise

    def loss_of(draw: jax.Array, micro: jax.Array) -> VelocityLoss:
        sigma, noise = jax.vmap(forward, in_axes=(0, None))(image_keys[micro], draw)
        x0, s = settings.canvas.split(clean[micro]), sigma[:, None, None]
        noisy = (1 - s) * x0 + s * noise
        where = (noisy, sigma, micro)
        old_velocity = jax.lax.stop_gradient(velocities.policy(old, *where))
        probability = optimality(advantages[micro])

        def loss(v: jax.Array) -> tuple[jax.Array, ForwardStatistics]:
            positive, negative = contrastive_losses(v, old_velocity, x0, noisy, sigma, probability, policy.nft.strength)
            drift = jnp.mean(jnp.square(v - old_velocity), axis=(1, 2))
            sums = ForwardStatistics(jnp.float32(micro.size), jnp.sum(positive), jnp.sum(negative), jnp.sum(drift))
            return jnp.mean(positive + negative), sums

        if not policy.beta:
            return VelocityLoss(noisy, sigma, loss, None)
        anchor = velocities.reference(reference, *where)
        return VelocityLoss(noisy, sigma, loss, lambda v: policy.beta * velocity_kl(v, anchor))

    draws = jnp.arange(policy.nft.draws, dtype=jnp.uint32)
    empty = ForwardStatistics(*[jnp.float32(0)] * 4)
    return accumulated_gradients(velocities, loss_of, trainable, draws, images, empty, policy.log_part_norms)


def updated_old_policy(config: NFTConfig, old: Tree, new: Tree, update: jax.Array) -> Tree:
    """decay * old + (1 - decay) * new with decay = min(slope * update, max): on-policy at first, slower later."""
    decay = jnp.minimum(config.decay_slope * update, config.decay_max)
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)


def nft_step(
    model: DeepGen,
    optimizer: optax.GradientTransformation,
    settings: UpdateSettings,
    state: TrainState,
    frozen: Tree,
    reference: Tree | None,
    clean: jax.Array,
    condition: Condition,
    advantages: jax.Array,
    image_keys: jax.Array,
    sft_micro_batches: Mapping[str, MicroBatch],
    keys: UpdateKeys,
    part: jax.Array | int = 0,
) -> tuple[TrainState, dict[str, Any]]:
    """One update of DiffusionNFT from clean images; arguments as in :func:`nft_gradients` and ``update.grpo_step``.

    The old policy is ``state.ema``: rollouts must sample with it, and the step moves it after the last part.
    """
    if state.ema is None or settings.supervised.ema_decay is not None:
        raise ValueError("nft keeps its old policy in state.ema, with no moving average besides")
    images = draw_images(jax.random.fold_in(keys.rollout, Update.PARTS), clean.shape[0], settings.policy, part)
    found = nft_gradients(
        model,
        settings,
        state.trainable,
        state.ema,
        frozen,
        reference,
        clean,
        condition,
        advantages,
        image_keys,
        images,
    )
    new, metrics = finish(model, optimizer, settings, state, frozen, found, sft_micro_batches, keys.sft)
    last = jnp.asarray(part) == settings.policy.updates_per_rollout - 1
    moved = updated_old_policy(settings.policy.nft, state.ema, new.trainable, state.step)
    ema = jax.tree.map(lambda a, b: jnp.where(last, b, a), state.ema, moved)
    return new._replace(ema=ema), metrics
