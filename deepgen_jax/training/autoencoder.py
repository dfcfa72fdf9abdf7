"""Training the autoencoder itself: reconstruction, and a divergence that gives latents their statistics.

DeepGen keeps the VAE of Stable Diffusion 3.5 frozen. A model of other sizes needs its own, trained before everything
else, as the MMDiT learns in its latents. A decoder may also train alone on a frozen encoder: latents do not change, so
that the other parts of the model stay valid.

Pictures of a step may differ in size, so a step is several calls of :func:`accumulate`, one for every batch of equal
pictures, and one of :func:`update`. Both are pure functions of global arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from deepgen_jax.config import VAEConfig
from deepgen_jax.data.reader import Batch
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models import flops
from deepgen_jax.models.deepgen import DeepGen, make_network
from deepgen_jax.models.vae import normalise, sample_posterior
from deepgen_jax.parallel.mesh import to_global
from deepgen_jax.random_keys import Training
from deepgen_jax.training.accumulation import Sums, add_batch, mean_step
from deepgen_jax.training.inputs import Moments, sample_keys
from deepgen_jax.training.optimizer import make_optimizer
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.run_config import AutoencoderConfig
from deepgen_jax.training.stage import AccumulatingStage
from deepgen_jax.training.state import TrainState
from deepgen_jax.training.step_batches import index_words

#: What a step sums over its pictures; "pictures" is their number.
TOTALS = ("loss", "loss/reconstruction", "loss/kl", "latent_mean", "latent_square", "pictures")
#: How pixels are compared: mean absolute or mean squared difference.
Reconstruction = Literal["l1", "l2"]


@dataclass(frozen=True)
class Objective:
    """What is learned; the settings of `AutoencoderConfig` of the same names."""

    loss: Reconstruction
    kl_weight: float
    decoder_only: bool
    latent_noise: float


def divergence(moments: Moments, config: VAEConfig) -> jax.Array:
    """Kullback-Leibler divergence of posteriors from the statistics that the MMDiT counts on, float32 [B].

    The prior is normal with mean ``shift_factor`` and standard deviation ``1 / scaling_factor``, that is, standard
    normal once normalised. In nats, the mean over a picture's latent values.
    """
    mean = normalise(moments.mean, config)
    variance = jnp.exp(moments.logvar) * config.scaling_factor**2
    return 0.5 * jnp.mean(jnp.square(mean) + variance - 1 - jnp.log(variance), axis=(1, 2, 3))


def picture_losses(
    model: DeepGen, objective: Objective, trainable: Tree, pictures: jax.Array, noise: jax.Array
) -> dict[str, jax.Array]:
    """The loss of each picture and what it is made of, float32 [B] by the names of :data:`TOTALS`.

    Args:
      model, objective: static.
      trainable: {"params": {"vae": ...}, ...}.
      pictures: uint8 [B, H, W, 3].
      noise: of the posterior, standard normal [B, H / f, W / f, C].
    """
    params = {"params": trainable["params"]}
    pixels = pictures.astype(jnp.float32) / 127.5 - 1
    moments = Moments(*model.apply(params, pixels, method="vae_encode"))
    if objective.decoder_only:
        moments = jax.lax.stop_gradient(moments)
    z = sample_posterior(moments.mean, _widened(moments.logvar, objective.latent_noise, model.config.vae), noise)
    decoded: Any = model.apply(params, z, method="vae_decode")
    errors = decoded - pixels
    latents = normalise(z, model.config.vae)
    reconstruction = jnp.mean(jnp.abs(errors) if objective.loss == "l1" else jnp.square(errors), axis=(1, 2, 3))
    kl = divergence(moments, model.config.vae)
    return {
        "loss": reconstruction + objective.kl_weight * kl,
        "loss/reconstruction": reconstruction,
        "loss/kl": kl,
        "latent_mean": jnp.mean(latents, axis=(1, 2, 3)),
        "latent_square": jnp.mean(jnp.square(latents), axis=(1, 2, 3)),
        "pictures": jnp.ones(len(pictures)),
    }


def accumulate(
    model: DeepGen,
    objective: Objective,
    trainable: Tree,
    sums: Sums,
    pictures: jax.Array,
    noise: jax.Array,
    weight: jax.Array,
) -> Sums:
    """Adds pictures of one size to the sums of a step; ``weight`` [B] is 0 for those left out."""
    losses = partial(picture_losses, model, objective, pictures=pictures, noise=noise)
    return add_batch(losses, trainable, sums, weight)


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

    ``latent_mean`` and ``latent_std`` are those of normalised latents and should be near 0 and 1.
    """
    new_state, metrics = mean_step(optimizer, ema_decay, state, sums, "pictures")
    means = {name: total / sums.totals["pictures"] for name, total in sums.totals.items()}
    for name in ("loss/reconstruction", "loss/kl", "latent_mean"):
        metrics[name] = means[name]
    metrics["latent_std"] = jnp.sqrt(means["latent_square"] - jnp.square(means["latent_mean"]))
    return new_state, metrics


class AutoencoderStage(AccumulatingStage):
    """Learns to reconstruct all pictures of the data; see `deepgen_jax.training.stage.Stage`."""

    _config: AutoencoderConfig
    _totals = TOTALS

    def __init__(self, config: AutoencoderConfig, mesh: Mesh) -> None:
        """Loads the weights onto the mesh and opens the data.

        Raises:
          DeepGenError: weights or data cannot be used, or the micro-batch does not fit the mesh.
        """
        if cached := [source.name for source in config.data.sources if source.kind == "features"]:
            raise DeepGenError(f"source {cached[0]} holds cached features of a VAE; name the pictures they came from")
        optimizer = make_optimizer(config.optimizer, config.steps)
        if config.decoder_only:
            optimizer = decoder_alone(optimizer)
        super().__init__(config, config.data, config.accumulation, mesh, optimizer)
        model = make_network(self._weights.config, mesh, config.dtype)
        objective = Objective(config.loss, config.kl_weight, config.decoder_only, config.latent_noise)
        vae = model.config.vae

        def add(
            trainable: Tree, sums: Sums, pictures: jax.Array, words: jax.Array, purpose: jax.Array, weight: jax.Array
        ) -> Sums:
            size = (*(side // vae.downscale for side in pictures.shape[1:3]), vae.latent_channels)
            keys = sample_keys(config.seed, words)
            noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, purpose), size, jnp.float32))(keys)
            return accumulate(model, objective, trainable, sums, pictures, noise, weight)

        self._compile(partial(update, optimizer, config.ema_decay))
        self._add_pictures = jax.jit(add, donate_argnums=1, out_shardings=self._sums_layout)

    def _add(self, sums: Sums, batch: Batch) -> Sums:
        share = partial(to_global, self._mesh)
        words, weight = share(index_words(batch)), share(batch["weight"])
        for purpose, pictures in _pictures(batch):
            sums = self._add_pictures(self.state.trainable, sums, share(pictures), words, np.int32(purpose), weight)
        return sums

    def _trained(self) -> str:
        if not self._config.decoder_only:
            return super()._trained()
        decoder = self.state.trainable["params"]["vae"]["decoder"]
        return f"decoder of the vae {sum(x.size for x in jax.tree.leaves(decoder)):,}"

    def _count(self, batches: list[Batch]) -> tuple[int, float]:
        """Tokens of the pictures in the MMDiT, and operations of the VAE, over all hosts."""
        config = self._weights.config
        tokens, operations = 0, 0.0
        for target, references in (batch["bucket"] for batch in batches):
            for width, height in (target, *references):
                tokens += width * height // (config.vae.downscale * config.mmdit.patch_size) ** 2
                encoding = flops.vae_encoder(config.vae, height, width)
                decoding = flops.vae_decoder(config.vae, height, width)
                # Forward only, or forward and backward for data and weights.
                operations += (1 if self._config.decoder_only else 3) * encoding + 3 * decoding
        samples = self._config.data.micro_batch
        return samples * tokens, samples * operations


def _pictures(batch: Batch) -> list[tuple[int, np.ndarray]]:
    """Target and references of a batch, uint8 [B, H, W, 3], each with the purpose of its noise."""
    references = [(Training.REFERENCE_POSTERIOR + i, pictures) for i, pictures in enumerate(batch["references"])]
    return [(Training.TARGET_POSTERIOR, batch["target"]), *references]
