"""Training the autoencoder itself: reconstruction, and a divergence that gives latents their statistics.

DeepGen keeps the VAE of Stable Diffusion 3.5 frozen. A model of other sizes needs one of its own, and it has to come
before everything else, as the MMDiT learns in its latents.

A decoder may also train alone on an encoder that stays as it is: latents do not change, so that whatever has learned
in them goes on as it was, and only looks better.

Pictures of a step may differ in size, so a step is several calls of :func:`accumulate`, one for every batch of equal
pictures, and one of :func:`update`. All are pure functions of global arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepgen_jax.config import VAEConfig
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.vae import normalise, sample_posterior
from deepgen_jax.training.inputs import Moments
from deepgen_jax.training.supervised import TrainState, apply_gradients
from deepgen_jax.training.trees import Tree

#: How pixels are compared: mean absolute or mean squared difference.
Reconstruction = Literal["l1", "l2"]


@dataclass(frozen=True)
class Objective:
    """What is learned; the settings of `AutoencoderConfig` of the same names."""

    loss: Reconstruction
    kl_weight: float
    decoder_only: bool
    latent_noise: float


class Sums(NamedTuple):
    """What a step has gathered, summed over pictures.

    Attributes:
      gradients: of the loss, like ``TrainState.trainable``.
      totals: float32 scalars by name.
      weight: float32, how many pictures there were.
    """

    gradients: Tree
    totals: dict[str, jax.Array]
    weight: jax.Array


def divergence(moments: Moments, config: VAEConfig) -> jax.Array:
    """Kullback-Leibler divergence of posteriors from the statistics that the MMDiT counts on, float32 [B].

    The prior is normal with mean ``shift_factor`` and standard deviation ``1 / scaling_factor``, that is, standard
    normal once normalised. In nats, the mean over a picture's latent values.
    """
    mean = normalise(moments.mean, config)
    variance = jnp.exp(moments.logvar) * config.scaling_factor**2
    return 0.5 * jnp.mean(jnp.square(mean) + variance - 1 - jnp.log(variance), axis=(1, 2, 3))


def start_sums(trainable: Tree) -> Sums:
    """Sums over no picture."""
    names = ("loss", "loss/reconstruction", "loss/kl", "latent_mean", "latent_square")
    return Sums(jax.tree.map(jnp.zeros_like, trainable), dict.fromkeys(names, jnp.float32(0)), jnp.float32(0))


def accumulate(
    model: DeepGen,
    objective: Objective,
    trainable: Tree,
    sums: Sums,
    pictures: jax.Array,
    noise: jax.Array,
    weight: jax.Array,
) -> Sums:
    """Adds pictures of one size.

    Args:
      model, objective: static.
      trainable: {"params": {"vae": ...}, ...}.
      sums: so far.
      pictures: uint8 [B, H, W, 3].
      noise: of the posterior, standard normal [B, H / f, W / f, C].
      weight: [B]; 0 leaves a picture out.
    """

    def total(trainable: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = {"params": trainable["params"]}
        pixels = pictures.astype(jnp.float32) / 127.5 - 1
        moments = Moments(*model.apply(params, pixels, method="vae_encode"))
        if objective.decoder_only:
            moments = jax.lax.stop_gradient(moments)
        z = sample_posterior(moments.mean, _widened(moments.logvar, objective.latent_noise, model.config.vae), noise)
        decoded: Any = model.apply(params, z, method="vae_decode")
        errors = decoded - pixels
        latents = normalise(z, model.config.vae)
        each = {
            "loss/reconstruction": jnp.mean(
                jnp.abs(errors) if objective.loss == "l1" else jnp.square(errors), axis=(1, 2, 3)
            ),
            "loss/kl": divergence(moments, model.config.vae),
            "latent_mean": jnp.mean(latents, axis=(1, 2, 3)),
            "latent_square": jnp.mean(jnp.square(latents), axis=(1, 2, 3)),
        }
        each["loss"] = each["loss/reconstruction"] + objective.kl_weight * each["loss/kl"]
        totals = {name: jnp.sum(weight * values) for name, values in each.items()}
        return totals["loss"], totals

    (_, totals), gradients = jax.value_and_grad(total, has_aux=True)(trainable)
    return jax.tree.map(jnp.add, sums, Sums(gradients, totals, jnp.sum(weight)))


def _widened(logvar: jax.Array, deviation: float, config: VAEConfig) -> jax.Array:
    """Log variance with that of independent noise besides, whose ``deviation`` is of normalised latents."""
    return jnp.log(jnp.exp(logvar) + (deviation / config.scaling_factor) ** 2) if deviation else logvar


def decoder_alone(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser with no step of the encoder, not even weight decay, for ``TrainState.trainable`` of a VAE."""

    def encoder(trainable: Tree) -> Tree:
        return jax.tree.map_with_path(lambda path, _: jax.tree_util.DictKey("encoder") in path, trainable)

    return optax.chain(optimizer, optax.masked(optax.set_to_zero(), encoder))


def update(
    optimizer: optax.GradientTransformation, ema_decay: float | None, state: TrainState, sums: Sums
) -> tuple[TrainState, dict[str, Any]]:
    """One optimiser step on the mean loss over the pictures; metrics as `supervised.train_step` gives them.

    ``latent_mean`` and ``latent_std`` are those of normalised latents, wanted near 0 and 1.
    """
    gradients, metrics = jax.tree.map(lambda x: x / sums.weight, (sums.gradients, sums.totals))
    new_state, norms = apply_gradients(optimizer, ema_decay, state, gradients, metrics["loss"])
    metrics["latent_std"] = jnp.sqrt(metrics.pop("latent_square") - jnp.square(metrics["latent_mean"]))
    return new_state, metrics | norms
