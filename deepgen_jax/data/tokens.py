"""Prompts to tokens: templates, tokenisation, M-RoPE indices and left-padded batches. Runs on the host, without JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.errors import DeepGenError

Padding = Literal["reference", "batch", "masked"]

#: Ends a question in the text of a sample; what follows is the answer (`deepgen_jax.training.language`).
QUESTION_END = "?"

_TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_GENERATE = "Generate an image: {}"
_IMAGE = "<|vision_start|>{}<|vision_end|>"
_IMAGE_PAD = "<|image_pad|>"
_RESERVED = (_IMAGE_PAD, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


class TokenizedPrompt(NamedTuple):
    """One prompt in its template.

    Attributes:
      input_ids: int32 [L].
      position_ids: int32 [3, L + think tokens], M-RoPE (time, height, width) indices.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray

    def last(self, tokens: int) -> TokenizedPrompt:
        """The prompt cut from the left to its last ``tokens`` tokens; rotary positions stay as they were."""
        cut = max(len(self.input_ids) - tokens, 0)
        return TokenizedPrompt(self.input_ids[cut:], self.position_ids[:, cut:])


def format_prompt(text: str, image_tokens: Sequence[int] | None = None) -> str:
    """The template of the released system: text-to-image without images, editing with them.

    Args:
      text: the user's words.
      image_tokens: number of VLM tokens of each reference image; None for text-to-image.
    """
    if image_tokens is None:
        return _TURN.format(_GENERATE.format(text))
    images = "".join(_IMAGE.format(_IMAGE_PAD * count) for count in image_tokens)
    return _TURN.format(f"{images}\n{text}")


def rope_positions(
    input_ids: np.ndarray, grids: Sequence[tuple[int, int]], image_token_id: int, num_queries: int
) -> np.ndarray:
    """M-RoPE indices of one prompt (Qwen2-VL, section 2.1).

    Text advances all three indices together. Tokens of an image share a time index and count rows and columns from the
    end of the text before it; text continues after the largest index used. Think tokens count as text.

    Args:
      input_ids: int [L]; runs of ``image_token_id`` belong to the images in order.
      grids: (rows, columns) of VLM tokens of each image.
      image_token_id: id of the image placeholder.
      num_queries: think tokens that follow the prompt.

    Returns:
      int32 [3, L + num_queries].
    """
    pieces: list[np.ndarray] = []
    position = index = 0
    placeholders = np.flatnonzero(input_ids == image_token_id)

    def text(length: int) -> np.ndarray:
        return np.broadcast_to(position + np.arange(length), (3, length))

    for rows, columns in grids:
        start = int(placeholders[0])
        pieces.append(text(start - index))
        position += start - index
        row, column = np.divmod(np.arange(rows * columns), columns)
        pieces.append(position + np.stack([np.zeros_like(row), row, column]))
        position += max(rows, columns)
        index = start + rows * columns
        placeholders = placeholders[rows * columns :]
    pieces.append(text(len(input_ids) + num_queries - index))
    return np.concatenate(pieces, axis=1).astype(np.int32)


class PromptTokenizer:
    """Turns a user's text and the sizes of its reference images into :class:`TokenizedPrompt`."""

    def __init__(self, folder: Path, config: DeepGenConfig) -> None:
        """Loads ``tokenizer.json`` of ``folder``.

        Raises:
          DeepGenError: the file is missing or no tokenizer.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DeepGenError(f"{path} is missing; convert the model again, or copy the tokenizer's files there")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise DeepGenError(f"{path} is not a readable tokenizer ({error}); convert the model again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = config

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, special tokens recognised, none added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Characters [start, end) of ``text`` of each of its tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).offsets)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included; bytes that are no whole character become U+FFFD."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def __call__(
        self, text: str, image_sizes: Sequence[tuple[int, int]] | None = None, max_tokens: int | None = None
    ) -> TokenizedPrompt:
        """Tokenises one prompt.

        Args:
          text: the user's words.
          image_sizes: (width, height) in pixels of each reference, multiples of ``config.image_multiple``; None for
            text-to-image.
          max_tokens: longest prompt accepted, image tokens not counted; None for no limit.

        Raises:
          DeepGenError: the text holds a reserved token or no valid Unicode, or is longer than ``max_tokens``.
        """
        config = self._config
        for token in _RESERVED:
            if token in text:
                raise DeepGenError(f"the prompt holds the reserved token {token}; write it another way")
        try:
            # Half a surrogate pair, as JSON may hold, is no text to the tokenizer.
            text.encode()
        except UnicodeEncodeError as error:
            raise DeepGenError(f"the prompt holds no valid Unicode ({error.reason}); take that out") from None
        grids = None if image_sizes is None else [self.image_grid(*size) for size in image_sizes]
        counts = None if grids is None else [rows * columns for rows, columns in grids]
        ids = np.asarray(self.encode(format_prompt(text, counts)), np.int32)
        words = len(ids) - sum(counts or ())
        if max_tokens is not None and words > max_tokens:
            raise DeepGenError(f"the prompt is {words} tokens long, the model reads {max_tokens}; shorten it")
        positions = rope_positions(ids, grids or (), config.text.image_token_id, config.bridge.num_queries)
        return TokenizedPrompt(ids, positions)

    def image_grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of VLM tokens of a reference image of this size in pixels.

        Raises:
          DeepGenError: a side is no multiple of ``config.image_multiple``.
        """
        unit = self._config.image_multiple
        if width % unit or height % unit or not width or not height:
            raise DeepGenError(f"a reference image is {width}x{height} pixels; its sides must be multiples of {unit}")
        return height // unit, width // unit


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts, think tokens included (at the end of every row).

    Attributes:
      input_ids: int32 [B, L], prompts only, pads hold the pad token.
      position_ids: int32 [3, B, L + Q], pads hold 1.
      real: bool [B, L + Q], True on the prompt and the think tokens.
      visible: bool [B, L + Q], True where the condition may depend on the token: real tokens and visible pads.
      image_slots: int32 [B, L], for image placeholders the running number of the placeholder in its row, else -1.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    real: np.ndarray
    visible: np.ndarray
    image_slots: np.ndarray


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def visible_lengths(lengths: Sequence[int], padding: Padding, pair_with: Sequence[int] | None = None) -> list[int]:
    """Visible length of each left-padded prompt, from the lengths of all prompts.

    Args:
      lengths: tokens of each prompt.
      padding: "reference" pads each to the longer of its guidance pair (the released system's result for that prompt
        run alone), "batch" pads all to the longest (the released system's batch), "masked" shows no pads.
      pair_with: tokens of each prompt's guidance partner.
    """
    partners = list(lengths) if pair_with is None else list(pair_with)
    if padding == "masked":
        return list(lengths)
    if padding == "batch":
        return [max([*lengths, *partners])] * len(lengths)
    if padding == "reference":
        return [max(pair) for pair in zip(lengths, partners, strict=True)]
    raise DeepGenError(f"padding is {padding!r}; choose reference, batch or masked")


def pad_prompts(
    prompts: Sequence[TokenizedPrompt],
    visible: Sequence[int],
    config: DeepGenConfig,
    *,
    multiple: int = 1,
) -> PromptBatch:
    """Left-pads prompts to one length.

    Args:
      prompts: B tokenised prompts.
      visible: length that each prompt is to look (see :func:`visible_lengths`); pads beyond it are invisible.
      config: gives the pad token and the number of think tokens.
      multiple: the total length, think tokens included, is rounded up to a multiple of this (a bucket).
    """
    queries = config.bridge.num_queries
    total = round_up(max(visible) + queries, multiple)
    length = total - queries
    shape = (len(prompts), total)
    ids = np.full((len(prompts), length), config.text.pad_token_id, np.int32)
    positions = np.ones((3, *shape), np.int32)
    real, seen = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    for row, (prompt, shown) in enumerate(zip(prompts, visible, strict=True)):
        start = length - len(prompt.input_ids)
        ids[row, start:] = prompt.input_ids
        positions[:, row, start:] = prompt.position_ids
        real[row, start:] = True
        seen[row, length - shown :] = True
    is_image = ids == config.text.image_token_id
    slots = np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1).astype(np.int32)
    return PromptBatch(ids, positions, real, seen, slots)
