"""Streams interleaved in fixed proportions, evenly spread; every position is computable without its past."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepgen_jax.data.data_config import MixtureConfig

#: Rates are integers that sum to about this, so that the arithmetic is exact: positions up to 2^33 fit into int64.
_TOTAL = 2**30


def integer_rates(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Positive weights as int64 rates in nearly their proportions, none of them zero."""
    shares = np.asarray(weights, np.float64)
    return np.maximum(np.rint(shares / shares.sum() * _TOTAL).astype(np.int64), 1)


def interleave(rates: np.ndarray, position: int) -> tuple[np.ndarray, int]:
    """The stream at a position when streams of the given rates are interleaved.

    Event i of stream b is due at time ((i + 1) * sum(rates)) // rates[b]; events come in order of time, those of one
    time in order of their streams. So a stream is never more than two events behind its share, nor more than two and
    its share of n ahead, while rare ones have yet to come; one that is due at 1 in n positions first comes when about n
    have passed.

    Args:
      rates: int64 [n], positive.
      position: of the event, from 0.

    Returns:
      int64 [n], events of each stream before the position; and the stream of the event at the position.
    """
    total = int(rates.sum())

    def before(time: int) -> np.ndarray:
        return np.maximum((time * rates - 1) // total, 0)

    # The last time up to which no more than `position` events have come.
    low, high = position, position + len(rates) + 2
    while high - low > 1:
        middle = (low + high) // 2
        if before(middle).sum() <= position:
            low = middle
        else:
            high = middle
    counts = before(low)
    due = np.flatnonzero((counts + 1) * total // rates == low)
    passed = position - int(counts.sum())
    counts[due[:passed]] += 1
    return counts, int(due[passed])


def task_at(config: MixtureConfig, position: int) -> tuple[str, int]:
    """The task of a micro-batch, and how many micro-batches of that task come before it."""
    if config.cycle:
        rounds, place = divmod(position, len(config.cycle))
        task = config.cycle[place]
        return task, rounds * config.cycle.count(task) + config.cycle[:place].count(task)
    tasks, weights = zip(*config.weights, strict=True)
    counts, stream = interleave(integer_rates(weights), position)
    return tasks[stream], int(counts[stream])
