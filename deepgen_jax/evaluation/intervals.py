"""Confidence intervals."""

from __future__ import annotations

import math

#: Two-sided 95% of the normal distribution.
_Z = 1.959964


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, of which ``right`` of ``count`` were seen (Wilson, 1927)."""
    if not count:
        return 0.0, 1.0
    share, square = right / count, _Z**2 / count
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)
