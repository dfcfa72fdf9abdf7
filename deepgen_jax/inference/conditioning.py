"""Prompts and reference pictures of a batch -> condition of the MMDiT, through padded buckets."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from deepgen_jax.data.tokens import (
    Padding,
    PromptBatch,
    PromptTokenizer,
    TokenizedPrompt,
    pad_prompts,
    round_up,
    visible_lengths,
)
from deepgen_jax.data.vision_inputs import batch_images, to_pixels
from deepgen_jax.inference import programs
from deepgen_jax.inference.programs import Condition, Params
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel.mesh import batch_sharding, batch_size_multiple, replicated, to_host

Images = Sequence[Image.Image]

#: Sequence lengths (prompt and think tokens) are rounded up to a multiple of this, and images to this many VLM tokens.
SEQUENCE_BUCKET = 64
IMAGE_BUCKET = 64


@dataclass(frozen=True)
class PromptEncoder:
    """The VLM and the bridge: tokenises, pads to buckets, runs the programs on the mesh."""

    model: DeepGen
    params: Params
    tokenizer: PromptTokenizer
    mesh: Mesh
    # Tokenizers refuse concurrent calls.
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def tokenize(self, prompt: str, image_sizes: Sequence[tuple[int, int]] | None = None) -> TokenizedPrompt:
        """One prompt in its template; longer prompts than the model reads are refused."""
        with self._lock:
            return self.tokenizer(prompt, image_sizes, self.model.config.max_prompt_tokens)

    def padded_length(self, prompts: Sequence[str], images: Sequence[Images | None]) -> int:
        """Length of the condition of prompts with these pictures, think tokens included.

        Args:
          prompts: the users' words, and the negative prompts where there is guidance.
          images: reference pictures of each prompt, repeated for the negative prompts.
        """
        sizes = [_sizes(refs) for refs in images]
        longest = max(len(self.tokenize(text, sizes[row % len(sizes)]).input_ids) for row, text in enumerate(prompts))
        return round_up(longest + self.model.config.bridge.num_queries, SEQUENCE_BUCKET)

    def encode_images(self, images: Images) -> tuple[jax.Array, tuple[int, ...]]:
        """VLM tokens of pictures: [M', N, hidden] (M' and N padded), and how many tokens each picture has."""
        rows = round_up(len(images), batch_size_multiple(self.mesh))
        pixels = [to_pixels(image) for image in images]
        batch = batch_images(pixels, self.model.config.vision, multiple=IMAGE_BUCKET, rows=rows)
        arrays = (batch.patches, batch.rows, batch.columns, batch.windows)
        return programs.encode_images(self.model, self._part("vision"), *map(self._split, arrays)), batch.tokens

    def hidden_states(self, prompt: str, images: Images | None) -> np.ndarray:
        """Selected hidden states of one prompt, [n, L + think tokens, hidden] float32, deepest first."""
        tokens = self.tokenize(prompt, _sizes(images))
        copies = batch_size_multiple(self.mesh)
        batch, *arrays = self._batch([tokens] * copies, [len(tokens.input_ids)] * copies, [images] * copies)
        states = programs.hidden_states(self.model, self._part("text", "bridge"), *self._inputs(batch), *arrays)
        return to_host(states)[:, 0].astype(np.float32)[:, batch.visible[0]]

    def condition(
        self,
        prompts: Sequence[str],
        images: Sequence[Images | None],
        padding: Padding,
        pair_with: Sequence[str] | None = None,
    ) -> Condition:
        """Condition of B prompts; B must be a multiple of the mesh's batch axes.

        Args:
          prompts: the users' words.
          images: reference pictures of each prompt, None for text-to-image.
          padding: see :func:`deepgen_jax.data.tokens.visible_lengths`.
          pair_with: the other prompt of each guidance pair, with the same pictures.
        """
        tokens = [self.tokenize(text, _sizes(refs)) for text, refs in zip(prompts, images, strict=True)]
        partners = None
        if pair_with is not None:
            pairs = zip(pair_with, images, strict=True)
            partners = [len(self.tokenize(text, _sizes(refs)).input_ids) for text, refs in pairs]
        visible = visible_lengths([len(prompt.input_ids) for prompt in tokens], padding, partners)
        batch, *arrays = self._batch(tokens, visible, images)
        mask = self._split(batch.visible)
        inputs = (*self._inputs(batch), mask, *arrays)
        pooled, sequence = programs.condition(self.model, self._part("text", "bridge"), *inputs)
        return Condition(pooled, sequence, mask)

    def _batch(
        self, tokens: Sequence[TokenizedPrompt], visible: Sequence[int], images: Sequence[Images | None]
    ) -> tuple[Any, ...]:
        """The padded prompts, and with reference pictures where each VLM token goes and the tokens themselves."""
        batch = pad_prompts(tokens, visible, self.model.config, multiple=SEQUENCE_BUCKET)
        distinct = {id(image): image for refs in images for image in refs or ()}
        if not distinct:
            return (batch,)
        vlm_tokens, counts = self.encode_images(list(distinct.values()))
        length = vlm_tokens.shape[1]
        place = {key: row * length + np.arange(counts[row]) for row, key in enumerate(distinct)}
        index = np.full(batch.image_slots.shape, -1, np.int32)
        for row, refs in enumerate(images):
            if refs:
                rows = np.concatenate([place[id(image)] for image in refs])
                slots = batch.image_slots[row]
                index[row] = np.where(slots >= 0, rows[slots], -1)
        flat = vlm_tokens.reshape(-1, vlm_tokens.shape[-1])
        return batch, self._split(index), jax.device_put(flat, replicated(self.mesh))

    def _inputs(self, batch: PromptBatch) -> tuple[jax.Array, ...]:
        return self._split(batch.input_ids), self._split(batch.position_ids, axis=1), self._split(batch.real)

    def _split(self, array: np.ndarray, axis: int = 0) -> jax.Array:
        return jax.device_put(array, batch_sharding(self.mesh, array.ndim, axis))

    def _part(self, *names: str) -> Params:
        return {name: self.params[name] for name in names}


def _sizes(images: Images | None) -> list[tuple[int, int]] | None:
    return None if images is None else [image.size for image in images]
