"""Parts of a judge's reply: its reasoning, its ``<answer>`` and plain text without markup. All in linear time."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ANSWER_TAG = re.compile(r"<(/?)answer\s*>", re.IGNORECASE | re.ASCII)
_THINK_TAG = re.compile(r"<(/?)think(?:ing)?\s*>", re.IGNORECASE | re.ASCII)
#: Characters kept from the start and from the end of a long text: verdicts are in its first or last sentences.
_HEAD = _TAIL = 2048
#: Answers of a reply that are read, the last ones.
_ANSWERS = 16

_HTML = re.compile(r"</?(?:b|i|u|p|br|em|strong|span|div|h[1-6])\s*/?>", re.IGNORECASE | re.ASCII)
_LATEX = re.compile(r"\\(?:boxed|textbf|text|mathbf)\b", re.IGNORECASE)
_MARKUP = str.maketrans(dict.fromkeys('*`~#"“”„«»「」『』{}[]()\\', " ") | {"\u200b": None, "\ufeff": None})
#: Markup leaves a space where it ended, as in ``**Image 1**, not``.
_SPACED_COMMA = re.compile(r" (?=[,;](?:\s|$))")
_PUNCTUATION = str.maketrans(
    {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # full-width forms of ASCII
    | {"。": ".", "、": ",", "’": "'", "‘": "'", "–": "-", "—": "-", "−": "-", "\u3000": " ", "\u00a0": " ", "_": " "}
)


def find_answers(text: str | None) -> list[str]:
    """The text inside each ``<answer>...</answer>`` of a reply."""
    return _scan(text or "")[0]


def _scan(text: str) -> tuple[list[str], str | None, str]:
    """Answers, the one that is not closed, and the text outside of them."""
    answers: list[str] = []
    outside: list[str] = []
    position, is_open = 0, False
    for tag in _ANSWER_TAG.finditer(text):
        closes = bool(tag[1])
        if is_open and not closes:
            continue  # an <answer> inside another is text
        (answers if is_open else outside).append(text[position : tag.start()])
        position, is_open = tag.end(), not closes
    if is_open:
        return answers, text[position:], "\n".join(outside)
    return answers, None, "\n".join([*outside, text[position:]])


@dataclass(frozen=True)
class ReplyParts:
    """A judge's reply in parts.

    Attributes:
      answers: the text inside each ``<answer>...</answer>``, of the last 16.
      unfinished: the text after an ``<answer>`` that is not closed, as by a stop sequence; None without one.
      rest: text outside ``<answer>`` and ``<think>``.
      cut_off: the reply ends inside ``<think>``.
    """

    answers: tuple[str, ...]
    unfinished: str | None
    rest: str
    cut_off: bool


def split_reply(text: str | None) -> ReplyParts:
    """Splits a reply; ``<answer>`` inside the reasoning counts only if none follows it."""
    text = text or ""
    visible, cut_off = _without_reasoning(text)
    answers, unfinished, rest = _scan(visible)
    if not answers and not visible.strip():
        answers = find_answers(text)
    return ReplyParts(tuple(answers[-_ANSWERS:]), unfinished, rest, cut_off)


def single_answer(text: str | None) -> str | None:
    """The text inside the only ``<answer>`` of a reply; None if there is none, or more than one."""
    answers = split_reply(text).answers
    return answers[0].strip() if len(answers) == 1 else None


def _without_reasoning(text: str) -> tuple[str, bool]:
    """Text after the last ``</think>``, up to an unclosed ``<think>``; and whether there is one."""
    start, end = 0, len(text)
    for tag in _THINK_TAG.finditer(text):
        if tag[1]:
            start, end = tag.end(), len(text)
        elif end == len(text):
            end = tag.start()
    return text[start:end], end < len(text)


def excerpt(text: str) -> str:
    """The part of a reply that a cache keeps: its ``<answer>`` parts, or its start and end if it has none."""
    parts = split_reply(text)
    if parts.answers:
        return "".join(f"<answer>{shortened(answer)}</answer>" for answer in parts.answers)
    return shortened(parts.rest.strip()) if parts.unfinished is None else f"<answer>{shortened(parts.unfinished)}"


def shortened(text: str) -> str:
    """The first and last 2048 characters of a text, or all of a shorter one."""
    return text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]}\n{text[-_TAIL:]}"


def plain_text(text: str) -> str:
    """Text without Markdown, HTML, LaTeX, quotes and brackets, with ASCII punctuation, shortened; lines are kept."""
    text = _LATEX.sub(" ", _HTML.sub(" ", shortened(text))).translate(_PUNCTUATION).translate(_MARKUP)
    lines = (_SPACED_COMMA.sub("", " ".join(line.split())) for line in text.splitlines())
    return "\n".join(filter(None, lines))
