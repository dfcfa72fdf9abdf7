"""Several rewards of the same images, computed in the background while the next images are sampled."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

import numpy as np

from deepgen_jax.errors import DeepGenError, did_you_mean
from deepgen_jax.rewards.background import BackgroundLoop
from deepgen_jax.rewards.base import (
    Missing,
    Reward,
    RewardSample,
    Scores,
    failure_place,
    failure_reason,
    is_expected,
)
from deepgen_jax.rewards.registry import RewardConfig, canonical, make
from deepgen_jax.rewards.result import RewardResult, concatenate
from deepgen_jax.user_warnings import warn_user


class RewardMixture:
    """The rewards of a run; a context manager.

    A training step submits each micro-batch, samples the next one meanwhile, and collects at the end::

        futures = [mixture.submit(samples, weights) for ... in micro_batches]
        result = mixture.collect(futures)

    A reward that fails is missing, never zero.

    Attributes:
      names: of the rewards, in the order of the columns of results.
    """

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        *,
        group_size: int | None = None,
        required_share: float = 0.8,
        retries: int = 2,
        retry_seconds: float = 10.0,
    ) -> None:
        """Makes the rewards; a model that one of them needs is loaded here.

        Args:
          rewards: what to compute; names must differ.
          group_size: images of a group. If given, rewards that compare the images of a group refuse groups of another
            size instead of scoring a part of a group.
          required_share: of the samples that want a reward, the smallest share that must have it at the end of a step.
          retries: most times that a step's missing rewards are computed again if the share is smaller.
          retry_seconds: wait before the first such retry; doubles with every further one.

        Raises:
          DeepGenError: a reward cannot be made, or a value is out of range.
        """
        self.names = tuple(canonical(config.name) for config in rewards)
        double = sorted(name for name, count in Counter(self.names).items() if count > 1)
        if not rewards or double:
            raise DeepGenError(f"reward {double[0]} is listed twice" if double else "no rewards; list at least one")
        if not 0 <= required_share <= 1 or retries < 0 or retry_seconds < 0:
            raise DeepGenError("required_share must be from 0 to 1, retries and retry_seconds at least 0")
        self._group_size, self._required_share = group_size, required_share
        self._retries, self._retry_seconds = retries, retry_seconds
        self._rewards: tuple[Reward, ...] = tuple(make(config) for config in rewards)
        self._background = BackgroundLoop("rewards")
        self._closed = False

    def check(self, wanted: Iterable[str]) -> None:
        """Raises a DeepGenError unless the run has all ``wanted`` rewards."""
        for name in wanted:
            if canonical(name) not in self.names:
                raise DeepGenError(
                    f"a data set wants the reward {name!r}, which is not among the run's"
                    f"{did_you_mean(canonical(name), self.names)}"
                )

    def unused(self, wanted: Iterable[str]) -> list[str]:
        """The run's rewards that are not ``wanted``."""
        return [name for name in self.names if name not in {canonical(name) for name in wanted}]

    def submit(
        self, samples: Sequence[RewardSample], weights: Sequence[Mapping[str, float]]
    ) -> concurrent.futures.Future[RewardResult]:
        """Starts scoring a micro-batch and returns at once.

        Args:
          samples: N images; groups may be spread over micro-batches only where no reward compares their images.
          weights: N, by reward; one that is absent or 0 is not computed.

        Returns:
          a future of the rewards, which `collect` takes.

        Raises:
          DeepGenError: a weight names no reward of the run or is no number, or a group is not whole.
        """
        samples = tuple(samples)
        return self._background.submit(self._score(samples, self._weight_matrix(samples, weights)))

    def collect(self, futures: Sequence[concurrent.futures.Future[RewardResult]]) -> RewardResult:
        """Waits for the micro-batches of a step; computes missing rewards again if there are too many.

        Returns:
          their rewards, in their order.

        Raises:
          DeepGenError: fewer than the required share of the samples have a reward after all retries, or a reward failed
            by a programming error.
        """
        result = concatenate([future.result() for future in futures])
        for attempt in range(self._retries):
            if not (short := self._short(result)):
                return result
            wait = self._retry_seconds * 2**attempt
            warn_user(f"too few rewards ({', '.join(short)}); retrying in {wait:g} s")
            time.sleep(wait)
            result = self._background.submit(self._retry(result)).result()
        if short := self._short(result):
            reasons = "; ".join(_explain(result, name) for name in short)
            raise DeepGenError(
                f"too few rewards after {self._retries} retries: {reasons}; "
                "repair the service and resume the run, or lower required_reward_share"
            )
        return result

    def counts(self) -> dict[str, int]:
        """Events since the start by "reward/event", such as "preference/retries"."""
        return {
            f"{name}/{event}": count
            for name, reward in zip(self.names, self._rewards, strict=True)
            for event, count in sorted(reward.counts().items())
        }

    def close(self) -> None:
        """Cancels rewards in progress; closes connections and threads."""
        if not self._closed:
            self._closed = True
            self._background.submit(self._close_all()).result()
            self._background.close()

    def __enter__(self) -> RewardMixture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _weight_matrix(self, samples: Sequence[RewardSample], weights: Sequence[Mapping[str, float]]) -> np.ndarray:
        if len(samples) != len(weights) or not samples:
            raise DeepGenError(f"{len(samples)} samples with {len(weights)} weights; give one each, at least one")
        matrix = np.zeros((len(samples), len(self.names)), np.float32)
        for row, wanted in enumerate(weights):
            self.check(wanted)
            for name, weight in wanted.items():
                if not math.isfinite(weight):
                    raise DeepGenError(f"the weight of reward {name} is {weight}; it must be finite")
                matrix[row, self.names.index(canonical(name))] = weight
        if self._group_size is not None:
            for column, (name, reward) in enumerate(zip(self.names, self._rewards, strict=True)):
                if reward.needs_group:
                    self._check_groups(name, samples, matrix[:, column] != 0)
        return matrix

    def _check_groups(self, name: str, samples: Sequence[RewardSample], wanted: np.ndarray) -> None:
        sizes = Counter(sample.group for sample, want in zip(samples, wanted, strict=True) if want)
        for group, size in sizes.items():
            if size != self._group_size:
                raise DeepGenError(
                    f"reward {name} compares whole groups of {self._group_size}, but got {size} images of group "
                    f"{group}; submit whole groups"
                )

    async def _score(self, samples: tuple[RewardSample, ...], weights: np.ndarray) -> RewardResult:
        columns = range(len(self.names))
        scored = await asyncio.gather(*(self._column(k, samples, np.flatnonzero(weights[:, k])) for k in columns))
        rewards = np.full(weights.shape, np.nan, np.float32)
        missing: dict[tuple[int, int], Missing] = {}
        notes: Counter[tuple[str, str]] = Counter()
        for k, (scores, _) in zip(columns, scored, strict=True):
            rows = np.flatnonzero(weights[:, k])
            rewards[rows, k] = scores.values
            missing |= {(int(rows[place]), k): entry for place, entry in scores.missing.items()}
            notes.update({(self.names[k], text): count for text, count in scores.notes.items()})
        seconds = {name: spent for name, (_, spent) in zip(self.names, scored, strict=True)}
        return RewardResult(self.names, samples, rewards, weights, missing, notes, seconds)

    async def _column(self, k: int, samples: Sequence[RewardSample], rows: np.ndarray) -> tuple[Scores, float]:
        if not rows.size:
            return Scores.of([]), 0.0
        start = time.monotonic()
        try:
            scores = await self._rewards[k].score([samples[row] for row in rows])
        except DeepGenError as error:
            raise DeepGenError(f"reward {self.names[k]}: {error}") from error
        except Exception as error:  # Rewards run code of others; what is not expected ends the run.
            if not is_expected(error):
                raise DeepGenError(
                    f"reward {self.names[k]} failed with {failure_reason(error)} ({failure_place(error)}); correct the "
                    "reward and resume the run"
                ) from error
            scores = Scores.of([Missing(failure_reason(error))] * len(rows))
        if len(scores.values) != len(rows):
            raise DeepGenError(f"reward {self.names[k]} gave {len(scores.values)} scores of {len(rows)} images")
        return scores, time.monotonic() - start

    async def _retry(self, result: RewardResult) -> RewardResult:
        """Computes missing rewards again; for whole groups if a reward compares them."""
        again = np.zeros(result.weights.shape, bool)
        for (row, column), entry in result.missing.items():
            again[row, column] = not entry.permanent
        groups = np.array([sample.group for sample in result.samples])
        for column, reward in enumerate(self._rewards):
            if reward.needs_group:
                again[:, column] = np.isin(groups, groups[again[:, column]]) & (result.weights[:, column] != 0)
        rows = np.flatnonzero(again.any(axis=1))
        weights = np.where(again, result.weights, 0)[rows]
        new = await self._score(tuple(result.samples[row] for row in rows), weights)

        rewards, missing = result.rewards.copy(), dict(result.missing)
        for place, row in enumerate(rows.tolist()):
            for column in np.flatnonzero(again[row]).tolist():
                if (place, column) not in new.missing:
                    rewards[row, column] = new.rewards[place, column]
                    missing.pop((row, column), None)
                elif (row, column) in missing:
                    missing[row, column] = new.missing[place, column]
        seconds = {name: result.seconds[name] + new.seconds[name] for name in self.names}
        return dataclasses.replace(
            result, rewards=rewards, missing=missing, notes=result.notes + new.notes, seconds=seconds
        )

    def _short(self, result: RewardResult) -> list[str]:
        return [name for name, share in result.present_share().items() if share < self._required_share]

    async def _close_all(self) -> None:
        await asyncio.gather(*(reward.close() for reward in self._rewards))


def _explain(result: RewardResult, name: str) -> str:
    failures = [(count, reason) for (reward, reason), count in result.failures.most_common() if reward == name]
    reasons = ", ".join(f"{count} x {reason}" for count, reason in failures)
    return f"{name} has {result.present_share()[name]:.0%} of its rewards ({reasons})"
