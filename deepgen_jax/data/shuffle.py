"""Random numbers by (seed, purpose, index), and permutations that are computed place by place."""

from __future__ import annotations

import zlib

import numpy as np

#: Rounds of the Feistel network; four make a pseudo-random permutation (Luby and Rackoff, 1988).
_ROUNDS = 6
#: Up to this size a table is cheap, and its permutations are exactly uniform.
_TABLE = 1024


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A generator that depends only on its arguments, not on earlier draws."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, indices)))


def permuted(places: np.ndarray, size: int, seed: int, purpose: str, *indices: int) -> np.ndarray:
    """Images of ``places`` under a pseudo-random permutation of ``range(size)``, without a table in memory.

    A Feistel network over the smallest even number of bits, applied again to what falls beyond ``size``; small
    permutations are drawn as tables.

    Args:
      places: int64, 0 <= places < size.
      size: at most 2^62.
      seed, purpose, indices: choose the permutation.

    Returns:
      int64, shaped as ``places``, all different if ``places`` are.
    """
    if size <= _TABLE:
        return generator(seed, purpose, *indices).permutation(size)[places]
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = _sequence(seed, purpose, indices).generate_state(_ROUNDS, np.uint64)
    out = places.astype(np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        left, right = out[todo] >> shift, out[todo] & low
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & low)
        out[todo] = left << shift | right
        todo = todo[out[todo] >= np.uint64(size)]
    return out.astype(np.int64)


def _sequence(seed: int, purpose: str, indices: tuple[int, ...]) -> np.random.SeedSequence:
    # As a spawn key, because entropy alone is padded with zeros: (seed, 0) would equal (seed,).
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), *indices))


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of the input moves every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
