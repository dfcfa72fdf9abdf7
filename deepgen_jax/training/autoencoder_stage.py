"""Training of the autoencoder as the training loop drives it."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepgen_jax.data.reader import Batch
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models import flops
from deepgen_jax.models.attention import choose_kernel
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel.mesh import replicated, to_global
from deepgen_jax.training import autoencoder
from deepgen_jax.training.autoencoder import Objective, Sums
from deepgen_jax.training.inputs import REFERENCE_POSTERIOR, TARGET_POSTERIOR, sample_keys
from deepgen_jax.training.optimizer import learning_rate, make_optimizer
from deepgen_jax.training.run_config import AutoencoderConfig
from deepgen_jax.training.stage import LoaderStage, StepReport, check_micro_batch, shardings_of, start_state
from deepgen_jax.training.step_batches import index_words, open_loader
from deepgen_jax.training.supervised import TrainState
from deepgen_jax.training.trees import Tree
from deepgen_jax.training.weights import load_start


class AutoencoderStage(LoaderStage):
    """Learns to reconstruct all pictures of the data; see `deepgen_jax.training.stage.Stage`."""

    _config: AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, mesh: Mesh) -> None:
        """Loads the weights onto the mesh and opens the data.

        Raises:
          DeepGenError: weights or data cannot be used, or the micro-batch does not fit the mesh.
        """
        check_micro_batch("data.micro_batch", config.data.micro_batch, mesh)
        if cached := [source.name for source in config.data.sources if source.kind == "features"]:
            raise DeepGenError(f"source {cached[0]} holds cached features of a VAE; name the pictures they came from")
        self._config, self._mesh = config, mesh
        self._weights = load_start(config, mesh)
        optimizer = make_optimizer(config.optimizer, config.steps)
        if config.decoder_only:
            optimizer = autoencoder.decoder_alone(optimizer)
        self.state = start_state(optimizer, self._weights, mesh, ema=config.ema_decay is not None)
        # The state takes the weights over: what it was made from is donated.
        self._weights = self._weights._replace(trainable={})
        self._loader = open_loader(config, config.data, self._weights, mesh)
        self._model = DeepGen(
            self._weights.config,
            dtype=jnp.dtype(config.dtype),
            attention=choose_kernel(mesh, config.dtype, gradients=True),
        )
        objective = Objective(config.loss, config.kl_weight, config.decoder_only, config.latent_noise)
        rate = learning_rate(config.optimizer, config.steps)
        everywhere = replicated(mesh)
        layout = shardings_of(self.state)
        shardings: Any = (layout.trainable, everywhere, everywhere)
        gathered = Sums(*shardings)

        def add(
            trainable: Tree, sums: Sums, pictures: jax.Array, words: jax.Array, purpose: jax.Array, weight: jax.Array
        ) -> Sums:
            vae = self._weights.config.vae
            size = (*(side // vae.downscale for side in pictures.shape[1:3]), vae.latent_channels)
            keys = sample_keys(config.seed, words)
            noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, purpose), size, jnp.float32))(keys)
            return autoencoder.accumulate(self._model, objective, trainable, sums, pictures, noise, weight)

        def update(state: TrainState, sums: Sums) -> tuple[TrainState, dict[str, Any]]:
            new, metrics = autoencoder.update(optimizer, config.ema_decay, state, sums)
            return new, metrics | {"learning_rate": rate(state.step)}

        self._start = jax.jit(autoencoder.start_sums, out_shardings=gathered)
        self._add = jax.jit(add, donate_argnums=1, out_shardings=gathered)
        self._update = jax.jit(update, donate_argnums=0, out_shardings=(layout, everywhere))

    def step(self) -> StepReport:
        """Takes one optimiser step."""
        start = time.perf_counter()
        batches = [next(self._loader) for _ in range(self._config.accumulation)]
        waited = {"data": time.perf_counter() - start}
        share = partial(to_global, self._mesh)
        sums = self._start(self.state.trainable)
        for batch in batches:
            words, weight = share(index_words(batch)), share(batch["weight"])
            for purpose, pictures in _pictures(batch):
                sums = self._add(self.state.trainable, sums, share(pictures), words, np.int32(purpose), weight)
        self.state, metrics = self._update(self.state, sums)
        tokens, operations = self._count(batches)
        ids = [str(name) for batch in batches for name in batch["sample_ids"] if name]
        samples = self._config.accumulation * self._config.data.micro_batch
        return StepReport(metrics, samples, tokens, operations, ids, waited)

    def facts(self) -> list[str]:
        """What trains, and the shapes that batches have."""
        vae = self.state.trainable["params"]["vae"]
        name, trained = ("decoder of the vae", vae["decoder"]) if self._config.decoder_only else ("vae", vae)
        count = sum(x.size for x in jax.tree.leaves(trained))
        samples = self._config.accumulation * self._config.data.micro_batch
        buckets = ", ".join(str(bucket) for bucket in self._loader.buckets)
        return [
            f"trains {name} {count:,} parameters; {samples} samples a step, targets and references",
            f"{len(self._loader.buckets)} buckets: {buckets}",
        ]

    def _count(self, batches: list[Batch]) -> tuple[int, float]:
        """Tokens that the MMDiT would see of the pictures, and operations, over all hosts."""
        config = self._weights.config
        tokens, operations = 0, 0.0
        for target, references in (batch["bucket"] for batch in batches):
            for width, height in (target, *references):
                tokens += width * height // (config.vae.downscale * config.mmdit.patch_size) ** 2
                encoding = flops.vae_encoder(config.vae, height, width)
                decoding = flops.vae_decoder(config.vae, height, width)
                # Forward alone, or forward and backward for data and weights.
                operations += (1 if self._config.decoder_only else 3) * encoding + 3 * decoding
        samples = self._config.data.micro_batch
        return samples * tokens, samples * operations


def _pictures(batch: Batch) -> list[tuple[int, np.ndarray]]:
    """Target and references of a batch, uint8 [B, H, W, 3], each with what its noise is drawn for."""
    references = [(REFERENCE_POSTERIOR + i, pictures) for i, pictures in enumerate(batch["references"])]
    return [(TARGET_POSTERIOR, batch["target"]), *references]
