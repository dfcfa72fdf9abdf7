"""Logit lens: decodes hidden states of the think tokens to words of the language model's vocabulary.

Applies the final norm and the output embedding to each selected hidden state, as if it were the last (nostalgebraist
2020). DeepGen does not use the final norm, so it is loaded from the folder's unused parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.models.quantized import WEIGHT_SCALE, dequantize
from deepgen_jax.models.qwen_text import selected_layers
from deepgen_jax.stores import model_folder


class Reading(NamedTuple):
    """The most likely words at one think token after one layer, with their probabilities."""

    layer: int
    token: int
    words: tuple[str, ...]
    probabilities: tuple[float, ...]


def logit_lens(
    pipe: DeepGenPipeline, folder: Path, prompt: str, images: Sequence[Image.Image] = (), *, top: int = 3
) -> list[Reading]:
    """The ``top`` most likely words at every think token, deepest layer first.

    Raises:
      DeepGenError: the folder lacks the final norm, or the embeddings are not tied.
    """
    config = pipe.config
    if not config.bridge.num_queries:
        return []
    if not config.text.tie_word_embeddings:
        raise DeepGenError("the logit lens needs tied embeddings, which this language model lacks; use --no-lens")
    norm = _final_norm(folder)
    embedding = pipe.params["text"]["embed_tokens"]
    table = np.asarray(embedding["embedding"], np.float32)
    if WEIGHT_SCALE in embedding:
        table = dequantize("embed_tokens/embedding", table, np.asarray(embedding[WEIGHT_SCALE]))
    states = pipe.hidden_states(prompt, list(images) or None)[:, -config.bridge.num_queries :]
    layers = selected_layers(config.text.num_layers, config.bridge.selection_stride)
    readings = []
    for layer, state in zip(layers, states, strict=True):
        scale = np.sqrt(np.mean(state**2, axis=-1, keepdims=True) + config.text.rms_norm_eps)
        logits = (state / scale * norm) @ table.T
        logits -= logits.max(axis=-1, keepdims=True)
        chances = np.exp(logits)
        chances /= chances.sum(axis=-1, keepdims=True)
        for token, row in enumerate(chances):
            best = np.argsort(-row)[:top]
            words = tuple(pipe.tokenizer.decode([i]) for i in best)
            readings.append(Reading(layer, token, words, tuple(float(row[i]) for i in best)))
    return readings


def _final_norm(folder: Path) -> np.ndarray:
    try:
        unused = model_folder.load_params(folder, ("unused",))["unused"]
        return np.asarray(unused["text"]["norm"]["scale"], np.float32)
    except (DeepGenError, KeyError):
        raise DeepGenError(
            f"{folder} lacks the final norm of the language model, which the logit lens needs; convert the model from "
            "a release that has it, or use --no-lens"
        ) from None
