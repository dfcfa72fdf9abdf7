"""Questions about images, asked to a judge: parsed strictly, asked again a few times, logged so that a run resumes."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepgen_jax.data.images import load_image
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Question
from deepgen_jax.rewards.base import Missing
from deepgen_jax.rewards.cache import AnswerCache
from deepgen_jax.rewards.client import RequestFailed
from deepgen_jax.rewards.judge import Judge
from deepgen_jax.rewards.replies import split_reply
from deepgen_jax.terminal import progress_bar

#: Longer sides of images are reduced to this many pixels before they are sent.
MAX_SIDE = 1024
_WORDS = {"yes": 1, "no": 0}
#: Characters of the longest list of numbers that is read.
_LONGEST = 4096
#: Characters of a reply that the log keeps.
_LOGGED = 400
#: Reasons of `RequestFailed` that, where nothing was answered yet, mean that no question will be.
_HOPELESS = ("connection error", "HTTP 400", "HTTP 401", "HTTP 403", "HTTP 404", "HTTP 405")


@dataclass
class Answered:
    """Answers of a judge.

    Attributes:
      answers: numbers by the question's place in the list that was asked; questions without a readable answer lack.
      unreadable: replies that could not be read, by reason; a question may give several.
      missing: questions without an answer, by the reason of the last try.
      asked, logged: questions, and those of them that the log answered.
    """

    answers: dict[int, list[int]] = field(default_factory=dict)
    unreadable: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    logged: int = 0


def ask_all(judge: Judge, questions: Sequence[Question], log: Path, protocol: str, tries: int = 3) -> Answered:
    """Asks all questions that the log does not answer.

    Args:
      judge: the model that answers; its client bounds requests under way, their time and their retries.
      questions: in any order.
      log: JSON lines of answers, appended to; the key of an answer covers protocol, judge, text and images.
      protocol: of the benchmark.
      tries: how often a question is asked whose reply cannot be read.

    Raises:
      DeepGenError: the judge cannot be reached or refuses, an image cannot be read, or the log cannot be written.
    """
    return asyncio.run(_ask_all(judge, questions, log, protocol, tries))


async def _ask_all(judge: Judge, questions: Sequence[Question], log: Path, protocol: str, tries: int) -> Answered:
    result = Answered(asked=len(questions))
    cache = AnswerCache(str(log))
    slots = asyncio.Semaphore(judge.client.config.concurrency)
    try:
        keys = [_key(question, protocol, judge.model) for question in questions]
        open_ = []
        for place, (question, key) in enumerate(zip(questions, keys, strict=True)):
            known = cache.get(key)
            if isinstance(known, dict) and _fits(known.get("values"), question):
                result.answers[place] = known["values"]
            else:
                open_.append(place)
        result.logged = len(questions) - len(open_)
        with progress_bar(len(questions), result.logged, "questions") as bar:
            bar.set_description_str("", refresh=False)

            async def answer(place: int) -> None:
                async with slots:
                    await _ask(judge, questions[place], keys[place], place, cache, result, tries)
                bar.update()

            if open_:
                # Only the first: if the judge does not answer at all, no other question is sent.
                await answer(open_[0])
                async with asyncio.TaskGroup() as group:
                    for place in open_[1:]:
                        group.create_task(answer(place))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        cache.close()
        await judge.client.close()
    return result


async def _ask(
    judge: Judge, question: Question, key: str, place: int, cache: AnswerCache, result: Answered, tries: int
) -> None:
    urls = [judge.data_url(_pixels(path)) for path in question.images]
    text = f"{question.text}\n{instruction(question)}"
    reason = ""
    for _ in range(tries):
        # A judge at temperature 0 would give the same reply to the same question.
        again = f"\nAn earlier reply could not be read ({reason}); keep to this form." if reason else ""
        try:
            read = await judge.ask(text + again, urls, lambda reply: _read(reply, question))
        except RequestFailed as failure:
            if str(failure) in _HOPELESS and not result.answers:
                raise DeepGenError(f"the judge at {judge.url} gives no answer ({failure}); check --judge") from None
            result.missing[str(failure)] += 1
            return
        if not isinstance(read, Missing):
            result.answers[place] = read["values"]
            cache.put(key, {"question": question.name, "image": question.images[-1].name, "judge": judge.model, **read})
            return
        reason = read.reason
        result.unreadable[reason] += 1
    result.missing[reason] += 1


def instruction(question: Question) -> str:
    """Instructions for answering a question."""
    if question.yes_no:
        return "Reply with yes or no inside <answer></answer>."
    what = "whole number" if question.count == 1 else f"{question.count} whole numbers, separated by commas,"
    return f"Reply with the {what} from {question.low} to {question.high} inside <answer></answer>."


def read_answer(reply: str, question: Question) -> list[int] | Missing:
    """The numbers of a reply, or why there are none.

    Outside its reasoning a reply has one ``<answer>`` with nothing but the numbers in it (brackets around them are let
    pass), or is nothing else as a whole. Anything else is no answer: no number is guessed, and none is taken for 0.
    """
    parts = split_reply(reply)
    if len(parts.answers) > 1:
        return Missing("several answers")
    text = (parts.answers[0] if parts.answers else parts.rest).strip().strip("[]()").strip()
    other = Missing("not in the form asked for" if parts.answers else "no answer")
    if question.yes_no:
        word = text.strip("\"'*.").lower()
        return [_WORDS[word]] if word in _WORDS else other
    if len(text) > _LONGEST or not re.fullmatch(r"\d{1,6}(?:\s*,\s*\d{1,6})*", text):
        return other
    values = [int(part) for part in text.split(",")]
    if len(values) != question.count:
        return Missing("wrong number of values")
    return values if _fits(values, question) else Missing("value out of range")


def _read(reply: str, question: Question) -> dict[str, Any] | Missing:
    """As `read_answer`, with the end of the reply for the log."""
    values = read_answer(reply, question)
    return values if isinstance(values, Missing) else {"values": values, "reply": reply[-_LOGGED:]}


def _fits(values: Any, question: Question) -> bool:
    """Whether these are an answer's numbers."""
    if not isinstance(values, list) or len(values) != question.count:
        return False
    return all(isinstance(value, int) and question.low <= value <= question.high for value in values)


def _key(question: Question, protocol: str, model: str) -> str:
    parts = [protocol, model, question.text, instruction(question), *(_digest(path) for path in question.images)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        status = path.stat()
        return _content_digest(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DeepGenError(f"image {path} cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=65536)
def _content_digest(path: Path, size: int, mtime: int) -> str:
    """SHA-256 of a file; size and time are there for the cache, which must not outlive a change."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pixels(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], at most `MAX_SIDE` a side."""
    image = load_image(path)
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)
