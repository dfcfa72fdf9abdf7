"""The interface of rewards: a reward scores a batch of images, and gives the reason where it has no score."""

from __future__ import annotations

import abc
import asyncio
import http.client
import json
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from deepgen_jax.errors import DeepGenError


@dataclass(frozen=True, eq=False)
class RewardSample:
    """One generated image.

    Attributes:
      image: uint8 [H, W, 3], RGB.
      prompt: what it was generated from.
      group: number of its group; images of one prompt that are compared with each other share it.
      metadata: further fields of the prompt's record.
    """

    image: np.ndarray
    prompt: str
    group: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[-1] != 3:
            raise DeepGenError(f"a reward's image is {self.image.dtype} {self.image.shape}; give uint8 [H, W, 3]")


@dataclass(frozen=True)
class Missing:
    """Stands in place of a score.

    Attributes:
      reason: a few words, the same for all failures of a kind, because they are counted by it.
      permanent: trying again cannot help; the reward does not apply to the sample.
    """

    reason: str
    permanent: bool = False


class ScoringFailed(Exception):
    """A failure to be expected, such as of a service; its text is the reason by which missing scores are counted."""


@dataclass(frozen=True)
class Scores:
    """Scores of a batch.

    Attributes:
      values: float32 [N], NaN where there is no score.
      missing: why, for every NaN, by its place in the batch.
      notes: counts of events that did not cost a score, such as unreadable comparisons.
    """

    values: np.ndarray
    missing: Mapping[int, Missing] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, results: Sequence[float | Missing], notes: Counter[str] | None = None) -> Scores:
        """Scores from one result a sample; a value that is not finite in float32 is missing, too."""
        with np.errstate(over="ignore"):
            checked = [
                r if isinstance(r, Missing) or np.isfinite(np.float32(r)) else Missing("the score is not finite")
                for r in results
            ]
        values = np.array([math.nan if isinstance(r, Missing) else r for r in checked], np.float32)
        missing = {i: r for i, r in enumerate(checked) if isinstance(r, Missing)}
        return cls(values, missing, Counter() if notes is None else notes)

    @property
    def failures(self) -> Counter[str]:
        """Number of samples without a score by reason."""
        return Counter(entry.reason for entry in self.missing.values())


class Reward(abc.ABC):
    """Scores images; the higher the better.

    Attributes:
      needs_group: a sample's score depends on the other images of its group, so that ``score`` must see whole groups.
    """

    needs_group: bool = False

    @abc.abstractmethod
    async def score(self, samples: Sequence[RewardSample]) -> Scores:
        """Scores a batch.

        A sample that cannot be scored is `Missing` and costs no other sample its score. Called on an event loop, which
        long computations must not block.

        Raises:
          DeepGenError: the reward cannot work at all, for example because a package is not installed.
          Exception: an error that `is_expected` makes all scores of the batch missing; any other ends the run.
        """

    def counts(self) -> Counter[str]:
        """Events since the start, such as requests, retries and failures by reason."""
        return Counter()

    async def close(self) -> None:  # noqa: B027 - optional to implement
        """Closes connections and threads."""


class LocalReward(Reward):
    """A reward computed image by image in threads of this process.

    Attributes:
      executor: runs `score_one`; None for asyncio's default pool of threads.
    """

    executor: Executor | None = None

    @abc.abstractmethod
    def score_one(self, sample: RewardSample) -> float | Missing:
        """The score of one image; called from several threads at once.

        Raises:
          Exception: an error that `is_expected` makes this score missing; any other ends the run.
        """

    async def score(self, samples: Sequence[RewardSample]) -> Scores:
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(self.executor, guarded, self.score_one, sample) for sample in samples]
        return Scores.of(await asyncio.gather(*jobs))


def guarded(function: Callable[[RewardSample], float | Missing], sample: RewardSample) -> float | Missing:
    """``function(sample)``; `Missing` where it fails in a way that is to be expected."""
    try:
        return function(sample)
    except Exception as error:  # Rewards run code of others; what is not expected is raised again.
        if not is_expected(error):
            raise
        return Missing(failure_reason(error))


def is_expected(error: BaseException) -> bool:
    """Whether an error comes from the outside, rather than from a mistake in a reward's code.

    Such are `ScoringFailed`, errors of files and networks (OSError, which time-outs belong to, and those of HTTP
    clients), and data that cannot be decoded as text, JSON or an image.
    """
    kinds: list[type[BaseException]] = [
        ScoringFailed,
        OSError,
        TimeoutError,
        EOFError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        http.client.HTTPException,
        Image.DecompressionBombError,
    ]
    if "httpx" in sys.modules:
        kinds.append(sys.modules["httpx"].HTTPError)
    return isinstance(error, tuple(kinds))


def failure_reason(error: BaseException) -> str:
    """An error in one short line."""
    text = " ".join(str(error).split())[:120]
    if isinstance(error, ScoringFailed) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def failure_place(error: BaseException) -> str:
    """File, line and function in which an error was raised, such as "reward.py, line 12, in score_one"."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name}" if frames else "an unknown place"
