"""Rewards of a micro-batch or a step, with the reasons of missing ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.base import Missing, RewardSample


@dataclass(frozen=True, eq=False)
class RewardResult:
    """Rewards of N samples by K rewards.

    Attributes:
      names: of the rewards, in the order of the columns.
      samples: the N scored images.
      rewards: float32 [N, K], NaN where a reward is missing: not wanted by the sample's data set, or failed.
      weights: float32 [N, K], as the data sets give them, 0 for a reward that is not wanted. Missing rewards keep
        theirs: advantages leave out NaN.
      missing: reason of each missing reward that is wanted, by (row, column).
      notes: counts by (reward, text) of events that did not cost a reward, such as unreadable comparisons.
      seconds: from submission to the last score, by reward, summed over micro-batches.
    """

    names: tuple[str, ...]
    samples: tuple[RewardSample, ...]
    rewards: np.ndarray
    weights: np.ndarray
    missing: dict[tuple[int, int], Missing]
    notes: Counter[tuple[str, str]]
    seconds: dict[str, float]

    @property
    def failures(self) -> Counter[tuple[str, str]]:
        """Number of samples by (reward, reason) for which a reward failed, without those it does not apply to."""
        return self._counted(permanent=False)

    @property
    def inapplicable(self) -> Counter[tuple[str, str]]:
        """Number of samples by (reward, reason) to which a wanted reward does not apply."""
        return self._counted(permanent=True)

    def present_share(self) -> dict[str, float]:
        """By reward, the share of samples that have it among those that want it and to which it applies; 1 of none."""
        failed = Counter(column for (_, column), entry in self.missing.items() if not entry.permanent)
        present = (np.isfinite(self.rewards) & (self.weights != 0)).sum(axis=0)
        wanted = {column: int(present[column]) + failed[column] for column in range(len(self.names))}
        return {name: float(present[k]) / wanted[k] if wanted[k] else 1.0 for k, name in enumerate(self.names)}

    def _counted(self, permanent: bool) -> Counter[tuple[str, str]]:
        return Counter(
            (self.names[column], entry.reason)
            for (_, column), entry in self.missing.items()
            if entry.permanent == permanent
        )


def empty_result(names: tuple[str, ...]) -> RewardResult:
    """The result of a host without images to score."""
    none = np.zeros((0, len(names)), np.float32)
    return RewardResult(names, (), none, none, {}, Counter(), dict.fromkeys(names, 0.0))


def concatenate(results: Sequence[RewardResult]) -> RewardResult:
    """The results of several micro-batches as one, in their order.

    Raises:
      DeepGenError: there are none.
    """
    if not results:
        raise DeepGenError("no micro-batch was submitted, so there are no rewards to collect")
    missing: dict[tuple[int, int], Missing] = {}
    start = 0
    for result in results:
        missing |= {(start + row, column): entry for (row, column), entry in result.missing.items()}
        start += len(result.samples)
    names = results[0].names
    return RewardResult(
        names,
        tuple(sample for result in results for sample in result.samples),
        np.concatenate([result.rewards for result in results]),
        np.concatenate([result.weights for result in results]),
        missing,
        sum((result.notes for result in results), Counter()),
        {name: sum(result.seconds[name] for result in results) for name in names},
    )
