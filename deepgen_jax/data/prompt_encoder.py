"""Tokens of training prompts: their number for the index, ids and positions for the batch; long ones are cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.sources import BadSample
from deepgen_jax.data.tokens import PromptTokenizer, TokenizedPrompt, format_prompt, rope_positions


class PromptEncoder:
    """Tokenises the texts of samples; picklable, so that workers get one each."""

    def __init__(self, tokenizer: Path, model: DeepGenConfig) -> None:
        """Loads a tokenizer.

        Args:
          tokenizer: folder with ``tokenizer.json``.
          model: gives special tokens, think tokens and the longest prompt.

        Raises:
          DeepGenError: there is no readable tokenizer.
        """
        self.model = model
        self._tokenizer = PromptTokenizer(tokenizer, model)
        #: Tokens of the empty text-to-image prompt.
        self.empty = self.length("", None)
        #: Of the tokenizer's file.
        self.digest = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()

    def length(self, text: str, references: int | None) -> int:
        """Tokens of a prompt in its template, image tokens not counted, before any cut.

        Args:
          text: the user's words.
          references: number of reference images; None for text-to-image.

        Raises:
          BadSample: the text holds a token that is reserved for images, or no valid Unicode.
        """
        counts = None if references is None else [1] * references
        try:
            # Half a surrogate pair, as JSON may hold, is no text to the tokenizer.
            text.encode()
        except UnicodeEncodeError as error:
            raise BadSample("wrong text", f"{text[:80]!r}: {error}") from error
        ids = self._tokenizer.encode(format_prompt(text, counts))
        config = self.model.text
        images = references or 0
        reserved = (config.image_token_id, config.vision_start_token_id, config.vision_end_token_id)
        if any(ids.count(token) != images for token in reserved) or config.video_token_id in ids:
            raise BadSample("reserved token in text", text[:80])
        return len(ids) - images

    def kept(self, lengths: np.ndarray) -> np.ndarray:
        """Lengths after the cut."""
        return np.minimum(lengths, self.model.max_prompt_tokens)

    def __call__(self, text: str, references: Sequence[tuple[int, int]] | None, length: int) -> TokenizedPrompt:
        """The tokens of a prompt, cut from the left to ``max_prompt_tokens`` and the image tokens.

        The template of an edit starts with its images: there the cut takes the first tokens after them, so that
        all image tokens are kept.

        Args:
          text: the user's words.
          references: (width, height) of each reference image at its bucket's size; None for text-to-image.
          length: what `length` gave when the text was indexed.

        Raises:
          BadSample: the text has another length now.
        """
        prompt = self._tokenizer(text, references)
        grids = [self._tokenizer.image_grid(*size) for size in references or ()]
        if len(prompt.input_ids) - sum(rows * columns for rows, columns in grids) != length:
            raise BadSample("changed since indexed", "the text has another length")
        if length <= self.model.max_prompt_tokens:
            return prompt
        if not grids:
            return prompt.last(self.model.max_prompt_tokens)
        config, excess = self.model.text, length - self.model.max_prompt_tokens
        images_end = int(np.flatnonzero(prompt.input_ids == config.vision_end_token_id)[-1]) + 1
        ids = np.delete(prompt.input_ids, slice(images_end, images_end + excess))
        return TokenizedPrompt(ids, rope_positions(ids, grids, config.image_token_id, self.model.bridge.num_queries))
