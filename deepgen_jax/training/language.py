"""Training the vision-language model itself: the next token of texts about pictures.

DeepGen starts from Qwen2.5-VL, which understands pictures already. A model of other sizes has to learn that first.
Words are read off the deepest hidden state that DeepGen uses, through the embedding, so that what is learned is in the
layers that the bridge sees.

A step is several calls of :func:`accumulate`, one for every batch, and one of :func:`update`. All are pure functions of
global arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepgen_jax.data.vision_inputs import patch_grid, patchify_for_vlm
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.qwen_vision import patch_layout
from deepgen_jax.training.inputs import Text
from deepgen_jax.training.supervised import TrainState, apply_gradients
from deepgen_jax.training.trees import Tree, join


class Sums(NamedTuple):
    """What a step has gathered, summed over tokens or answers.

    Attributes:
      gradients: of the summed loss, like ``TrainState.trainable``.
      totals: float32 scalars: "loss" over "tokens", "right" answers of all "answers".
    """

    gradients: Tree
    totals: dict[str, jax.Array]


def start_sums(trainable: Tree) -> Sums:
    """Sums over nothing."""
    names = ("loss", "tokens", "right", "answers")
    return Sums(jax.tree.map(jnp.zeros_like, trainable), dict.fromkeys(names, jnp.float32(0)))


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
    """Adds a batch.

    Args:
      model: static.
      mark: the token that ends a question; static.
      trainable: {"params": {"text": ..., "vision": ...}, ...}.
      frozen: holds the think tokens, which no token before them sees.
      sums: so far.
      text: prompts, questions with their answers.
      references: uint8 [B, H, W, 3] each.
      weight: [B]; 0 leaves a sample out.
    """

    def total(trainable: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = {"params": join(frozen, trainable["params"])}
        tokens = [jnp.zeros((len(weight), 0, model.config.vision.out_hidden_size), model.dtype)]
        tokens += [_image_tokens(model, params, image) for image in references]
        pictures = jnp.concatenate(tokens, axis=1)
        batch, slots, hidden = pictures.shape
        rows = jnp.arange(batch)[:, None] * slots
        index = jnp.where(text.image_index >= 0, text.image_index + rows, -1) if slots else None
        states: Any = model.apply(params, *text[:3], index, pictures.reshape(-1, hidden), method="hidden_states")
        length = text.input_ids.shape[1]
        logits = _logits(states[0][:, : length - 1], trainable["params"]["text"]["embed_tokens"]["embedding"])
        each = _measure(logits, text, mark, model.config.text.eos_token_id)
        totals = {name: jnp.sum(weight * values) for name, values in each.items()}
        return totals["loss"], totals

    (_, totals), gradients = jax.value_and_grad(total, has_aux=True)(trainable)
    return jax.tree.map(jnp.add, sums, Sums(gradients, totals))


def update(
    optimizer: optax.GradientTransformation, ema_decay: float | None, state: TrainState, sums: Sums
) -> tuple[TrainState, dict[str, Any]]:
    """One optimiser step on the mean loss over tokens; metrics as `supervised.train_step` gives them.

    ``answers_right`` is the share of answers of which every token was the likeliest after those before it.
    """
    totals = sums.totals
    gradients = jax.tree.map(lambda x: x / totals["tokens"], sums.gradients)
    loss = totals["loss"] / totals["tokens"]
    new_state, norms = apply_gradients(optimizer, ema_decay, state, gradients, loss)
    return new_state, {"loss": loss, "answers_right": totals["right"] / jnp.maximum(totals["answers"], 1), **norms}


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
    """Sums over each sample's tokens, [B]; answers stand between the tokens ``mark`` and ``end``."""
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
