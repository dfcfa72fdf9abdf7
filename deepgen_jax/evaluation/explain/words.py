"""Words of a prompt and their condition tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from deepgen_jax.data.tokens import PromptTokenizer, format_prompt

# Runs of letters and digits; in Chinese and Japanese, which have no spaces, each character is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class Word:
    """A word of the prompt.

    Attributes:
      text: the word as written.
      tokens: positions in the condition, think tokens last.
    """

    text: str
    tokens: tuple[int, ...]


def words_of(
    tokenizer: PromptTokenizer, prompt: str, image_tokens: Sequence[int] | None = None
) -> tuple[tuple[Word, ...], int]:
    """Words of a prompt with their tokens in its template, and the template's number of tokens.

    Args:
      tokenizer: tokenizer of the model.
      prompt: the user's text.
      image_tokens: number of VLM tokens of each reference; None for text-to-image.
    """
    template = format_prompt(prompt, image_tokens)
    spans = tokenizer.spans(template)
    # The user's text precedes the template's last <|im_end|>, even if the text contains special tokens.
    start = template.rindex(prompt, 0, template.rindex("<|im_end|>")) if prompt else 0
    words = []
    for match in _WORD.finditer(prompt):
        first, last = match.start() + start, match.end() + start
        tokens = tuple(i for i, (begin, end) in enumerate(spans) if begin < last and end > first)
        words.append(Word(match[0], tokens))
    return tuple(words), len(spans)
