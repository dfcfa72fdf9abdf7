"""Training the vision-language model itself: the next token of texts about pictures.

DeepGen starts from Qwen2.5-VL, which understands pictures already. A model of other sizes has to learn that first.
Logits are read off the deepest hidden state that DeepGen uses, through the embedding, so that what is learned is in the
layers that the bridge sees.

A step is several calls of :func:`accumulate`, one for every batch, and one of :func:`update`. Both are pure functions
of global arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deepgen_jax.data.reader import Batch
from deepgen_jax.data.tokens import QUESTION_END, PromptTokenizer
from deepgen_jax.data.vision_inputs import patch_grid, patchify_for_vlm
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models import flops
from deepgen_jax.models.deepgen import DeepGen, make_network
from deepgen_jax.models.qwen_vision import patch_layout
from deepgen_jax.parallel.mesh import to_global
from deepgen_jax.training.accumulation import Sums, add_batch, mean_step
from deepgen_jax.training.inputs import Text
from deepgen_jax.training.optimizer import make_optimizer
from deepgen_jax.training.partition import Tree, join
from deepgen_jax.training.run_config import LanguageConfig
from deepgen_jax.training.stage import AccumulatingStage
from deepgen_jax.training.state import TrainState
from deepgen_jax.training.step_batches import widen

#: What a step sums: the loss over tokens, and right answers of all answers.
TOTALS = ("loss", "tokens", "right", "answers")


def text_losses(
    model: DeepGen, mark: int, trainable: Tree, frozen: Tree, text: Text, references: Sequence[jax.Array]
) -> dict[str, jax.Array]:
    """The summed loss of each sample's tokens and their number, its right answers, float32 [B] by :data:`TOTALS`.

    Args:
      model: static.
      mark: the token that ends a question; static.
      trainable: {"params": {"text": ..., "vision": ...}, ...}.
      frozen: holds the think tokens, which no token before them sees.
      text: prompts, questions with their answers.
      references: uint8 [B, H, W, 3] each.
    """
    params = {"params": join(frozen, trainable["params"])}
    batch, length = text.input_ids.shape
    tokens = [jnp.zeros((batch, 0, model.config.vision.out_hidden_size), model.dtype)]
    tokens += [_image_tokens(model, params, image) for image in references]
    pictures = jnp.concatenate(tokens, axis=1)
    _, slots, hidden = pictures.shape
    rows = jnp.arange(batch)[:, None] * slots
    index = jnp.where(text.image_index >= 0, text.image_index + rows, -1) if slots else None
    states: Any = model.apply(params, *text[:3], index, pictures.reshape(-1, hidden), method="hidden_states")
    logits = _logits(states[0][:, : length - 1], trainable["params"]["text"]["embed_tokens"]["embedding"])
    return _measure(logits, text, mark, model.config.text.eos_token_id)


def accumulate(
    model: DeepGen,
    mark: int,
    trainable: Tree,
    frozen: Tree,
    sums: Sums,
    text: Text,
    references: Sequence[jax.Array],
    weight: jax.Array,
) -> Sums:
    """Adds a batch to the sums of a step; ``weight`` [B] is 0 for samples left out."""

    def losses(trainable: Tree) -> dict[str, jax.Array]:
        return text_losses(model, mark, trainable, frozen, text, references)

    return add_batch(losses, trainable, sums, weight)


def update(
    optimizer: optax.GradientTransformation, ema_decay: float | None, state: TrainState, sums: Sums
) -> tuple[TrainState, dict[str, Any]]:
    """One optimiser step on the mean loss over tokens; metrics as `supervised.train_step` gives them.

    ``answers_right`` is the share of answers whose every token was the most likely one.
    """
    new_state, metrics = mean_step(optimizer, ema_decay, state, sums, "tokens")
    totals = sums.totals
    return new_state, metrics | {"answers_right": totals["right"] / jnp.maximum(totals["answers"], 1)}


class LanguageStage(AccumulatingStage):
    """Learns the texts of the data, given their references; see `deepgen_jax.training.stage.Stage`."""

    _config: LanguageConfig
    _totals = TOTALS

    def __init__(self, config: LanguageConfig, mesh: Mesh) -> None:
        """Loads the weights onto the mesh and opens the data.

        Raises:
          DeepGenError: weights or data cannot be used, or the micro-batch does not fit the mesh.
        """
        if cached := [source.name for source in config.data.sources if source.kind == "features"]:
            raise DeepGenError(
                f"source {cached[0]} holds cached features of a vision tower; name the pictures they came from"
            )
        optimizer = make_optimizer(config.optimizer, config.steps)
        super().__init__(config, config.data, config.accumulation, mesh, optimizer)
        weights = self._weights
        (mark,) = PromptTokenizer(weights.tokenizer, weights.config).encode(QUESTION_END)
        model = make_network(weights.config, mesh, config.dtype, remat=config.chosen_remat)
        self._frozen = {"bridge": weights.frozen["bridge"]}
        self._compile(partial(update, optimizer, config.ema_decay))
        add = partial(accumulate, model, mark)
        self._add_texts = jax.jit(add, donate_argnums=2, out_shardings=self._sums_layout)

    def _add(self, sums: Sums, batch: Batch) -> Sums:
        share = partial(to_global, self._mesh)
        local: Any = widen(batch, batch["input_ids"].shape[1], self._weights.config)
        text = Text(share(local[0]), share(local[1], axis=1), *map(share, local[2:]))
        pictures = tuple(map(share, batch["references"]))
        return self._add_texts(self.state.trainable, self._frozen, sums, text, pictures, share(batch["weight"]))

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


def _image_tokens(model: DeepGen, params: Tree, image: jax.Array) -> jax.Array:
    config = model.config.vision
    grid = patch_grid(image.shape[1:3], config)
    layout = (jnp.broadcast_to(x, (image.shape[0], x.size)) for x in patch_layout(*grid, config))
    with jax.default_matmul_precision("highest"):
        patches = jax.vmap(lambda x: patchify_for_vlm(x, config))(image.astype(jnp.float32) / 127.5 - 1)
    tokens: Any = model.apply(params, patches, *layout, method="encode_images")
    return tokens


def _logits(states: jax.Array, embedding: jax.Array) -> jax.Array:
    """Float32 [B, L, V] from hidden states whose scale is taken out."""
    states = states.astype(jnp.float32)
    states = states * jax.lax.rsqrt(jnp.mean(jnp.square(states), axis=-1, keepdims=True) + 1e-6)
    # As with small initial embeddings: logits of order one.
    return states @ embedding.astype(jnp.float32).T * embedding.shape[-1] ** -0.5


def _measure(logits: jax.Array, text: Text, mark: int, end: int) -> dict[str, jax.Array]:
    """Sums over each sample's tokens, [B]; answers are between the tokens ``mark`` and ``end``."""
    wanted = text.input_ids[:, 1:]
    real = text.real[:, : text.input_ids.shape[1]]
    read = real[:, :-1] & real[:, 1:] & (text.image_index[:, 1:] < 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    ended = jnp.cumsum(wanted == end, axis=1) > 0
    asked = jnp.cumsum(text.input_ids[:, :-1] == mark, axis=1) > 0
    answer = read & asked & ~ended
    right = jnp.all(~answer | (jnp.argmax(logits, axis=-1) == wanted), axis=1)
    there = jnp.any(answer, axis=1)
    return {
        "loss": jnp.sum(losses * read, axis=1),
        "tokens": jnp.sum(read, axis=1),
        "right": (right & there).astype(jnp.float32),
        "answers": there.astype(jnp.float32),
    }
