"""Training of the vision-language model as the training loop drives it."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deepgen_jax.data.reader import Batch
from deepgen_jax.data.tokens import QUESTION_END, PromptTokenizer
from deepgen_jax.data.vision_inputs import patch_grid
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models import flops
from deepgen_jax.models.attention import choose_kernel
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel.mesh import replicated, to_global
from deepgen_jax.training import language
from deepgen_jax.training.inputs import Text
from deepgen_jax.training.language import Sums
from deepgen_jax.training.optimizer import learning_rate, make_optimizer
from deepgen_jax.training.run_config import LanguageConfig
from deepgen_jax.training.stage import LoaderStage, StepReport, check_micro_batch, shardings_of, start_state
from deepgen_jax.training.step_batches import open_loader, widen
from deepgen_jax.training.supervised import TrainState
from deepgen_jax.training.trees import Tree
from deepgen_jax.training.weights import load_start


class LanguageStage(LoaderStage):
    """Learns the texts of the data, given their references; see `deepgen_jax.training.stage.Stage`."""

    _config: LanguageConfig

    def __init__(self, config: LanguageConfig, mesh: Mesh) -> None:
        """Loads the weights onto the mesh and opens the data.

        Raises:
          DeepGenError: weights or data cannot be used, or the micro-batch does not fit the mesh.
        """
        check_micro_batch("data.micro_batch", config.data.micro_batch, mesh)
        if cached := [source.name for source in config.data.sources if source.kind == "features"]:
            raise DeepGenError(
                f"source {cached[0]} holds cached features of a vision tower; name the pictures they came from"
            )
        self._config, self._mesh = config, mesh
        self._weights = load_start(config, mesh)
        optimizer = make_optimizer(config.optimizer, config.steps)
        self.state = start_state(optimizer, self._weights, mesh, ema=config.ema_decay is not None)
        # The state takes the weights over: what it was made from is donated.
        self._weights = self._weights._replace(trainable={})
        self._loader = open_loader(config, config.data, self._weights, mesh)
        model_config = self._weights.config
        self._model = DeepGen(
            model_config,
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
            attention=choose_kernel(mesh, config.dtype, gradients=True),
        )
        self._frozen = {"bridge": self._weights.frozen["bridge"]}
        (mark,) = PromptTokenizer(self._weights.tokenizer, model_config).encode(QUESTION_END)
        rate = learning_rate(config.optimizer, config.steps)
        everywhere = replicated(mesh)
        layout = shardings_of(self.state)
        shardings: Any = (layout.trainable, everywhere)
        gathered = Sums(*shardings)

        def add(
            trainable: Tree, frozen: Tree, sums: Sums, text: Text, references: tuple[jax.Array, ...], weight: jax.Array
        ) -> Sums:
            return language.accumulate(self._model, mark, trainable, frozen, sums, text, references, weight)

        def update(state: TrainState, sums: Sums) -> tuple[TrainState, dict[str, Any]]:
            new, metrics = language.update(optimizer, config.ema_decay, state, sums)
            return new, metrics | {"learning_rate": rate(state.step)}

        self._start = jax.jit(language.start_sums, out_shardings=gathered)
        self._add = jax.jit(add, donate_argnums=2, out_shardings=gathered)
        self._update = jax.jit(update, donate_argnums=0, out_shardings=(layout, everywhere))

    def step(self) -> StepReport:
        """Takes one optimiser step."""
        start = time.perf_counter()
        batches = [next(self._loader) for _ in range(self._config.accumulation)]
        waited = {"data": time.perf_counter() - start}
        share = partial(to_global, self._mesh)
        sums = self._start(self.state.trainable)
        for batch in batches:
            local: Any = widen(batch, batch["input_ids"].shape[1], self._weights.config)
            text = Text(share(local[0]), share(local[1], axis=1), *map(share, local[2:]))
            pictures = tuple(map(share, batch["references"]))
            weight = share(batch["weight"])
            sums = self._add(self.state.trainable, self._frozen, sums, text, pictures, weight)
        self.state, metrics = self._update(self.state, sums)
        tokens, operations = self._count(batches)
        ids = [str(name) for batch in batches for name in batch["sample_ids"] if name]
        samples = self._config.accumulation * self._config.data.micro_batch
        return StepReport(metrics, samples, tokens, operations, ids, waited)

    def facts(self) -> list[str]:
        """What trains, and the shapes that batches have."""
        params = self.state.trainable["params"]
        trained = ", ".join(f"{name} {sum(x.size for x in jax.tree.leaves(tree)):,}" for name, tree in params.items())
        samples = self._config.accumulation * self._config.data.micro_batch
        buckets = ", ".join(str(bucket) for bucket in self._loader.buckets)
        return [
            f"trains {trained} parameters; {samples} samples a step in {self._config.accumulation} micro-batches",
            f"{len(self._loader.buckets)} buckets: {buckets}",
        ]

    def _count(self, batches: list[Batch]) -> tuple[int, float]:
        """Tokens that are no padding, and operations, over all hosts, from this host's share."""
        config, samples = self._weights.config, self._config.data.micro_batch
        tokens, operations = 0, 0.0
        for batch in batches:
            length = round(float(batch["real"].sum(axis=1).mean()))
            tokens += samples * length
            operations += 3 * samples * flops.text(config.text, length)
            for width, height in batch["bucket"][1]:
                down, across = patch_grid((height, width), config.vision)
                operations += 3 * samples * flops.vision(config.vision, down * across)
        return tokens, operations
