"""Buckets stay near the exact size rule, and are few."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax.data.buckets import choose_buckets, exact_sizes, list_buckets, pixel_difference
from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.data.transforms import target_size

SOURCE = SourceConfig("s", "json", "x")


def config(**options) -> DataConfig:
    return DataConfig((SOURCE,), 8, MixtureConfig(("t2i",)), **options)


def photographs(count: int = 20_000) -> np.ndarray:
    """Sizes as they are found: common cameras, and crops of any aspect."""
    rng = np.random.default_rng(0)
    common = np.array([(1024, 1024), (4032, 3024), (3024, 4032), (6000, 4000), (1920, 1080), (1080, 1920), (512, 768)])
    sizes = common[rng.integers(0, len(common), count)]
    crops = rng.integers(300, 2500, (count, 2))
    return np.where(rng.random(count)[:, None] < 0.5, crops, sizes).reshape(-1, 1, 2)


def bucketed(sizes: np.ndarray, settings: DataConfig):
    keys, entries = exact_sizes(sizes, settings)
    counts = Counter(dict(zip(entries, np.bincount(keys).tolist(), strict=True)))
    return keys, entries, counts, choose_buckets(counts, settings)


@pytest.mark.parametrize("transform", ["fix_pixels", "dynamic", "crop2square", "resize2square"])
def test_exact_sizes_are_those_of_the_rule(transform):
    sizes = photographs(500)
    keys, entries = exact_sizes(sizes, config(transform=transform))
    for size, key in zip(sizes[:, 0].tolist(), keys.tolist(), strict=True):
        assert entries[key] == (target_size(*size, 512, transform),)


def test_few_pixels_differ_and_buckets_are_few():
    sizes = photographs()
    keys, entries, counts, chosen = bucketed(sizes, config())
    differences = np.array([pixel_difference(entry[0], chosen[entry][0]) for entry in entries])
    assert differences.max() <= 0.07
    assert differences[keys].mean() < 0.02
    areas = [chosen[entry][0][0] * chosen[entry][0][1] / (entry[0][0] * entry[0][1]) - 1 for entry in entries]
    assert np.abs(np.array(areas)[keys]).mean() < 0.02
    buckets = set(chosen.values())
    assert len(buckets) < 0.6 * len(entries)
    assert all(side % 32 == 0 for bucket in buckets for size in bucket for side in size)
    assert {target_size(*size, 512, "fix_pixels") for size in [(4032, 3024), (1920, 1080)]} <= {b[0] for b in buckets}
    listed = list_buckets("t2i", counts, chosen)
    assert sum(bucket.samples for bucket in listed) == len(sizes)


def test_exact_mode_keeps_every_size():
    *_, chosen = bucketed(photographs(2000), config(exact_sizes=True))
    assert all(entry == bucket for entry, bucket in chosen.items())


def test_pairs_and_triples():
    # Two references, one, and none, as one source with room for two would hold them.
    none = (0, 0)
    sizes = np.array([[(512, 512), (768, 512), (512, 768)], [(512, 512), (512, 512), none], [(90, 90), none, none]])
    keys, entries = exact_sizes(sizes, config())
    square = (512, 512)
    assert [entries[key] for key in keys] == [
        (square, target_size(768, 512, 512, "fix_pixels"), target_size(512, 768, 512, "fix_pixels")),
        (square, square),
        (target_size(90, 90, 512, "fix_pixels"),),
    ]
    counts = {(square, square): 500, (square, (544, 512)): 1, (square,): 500, (square, (768, 352)): 1}
    chosen = choose_buckets(counts, config())
    assert chosen[square, (544, 512)] == (square, square)
    assert chosen[square, (768, 352)] == (square, (768, 352))
    assert chosen[(square,)] == (square,)


side = st.integers(1, 60).map(lambda n: 32 * n)


@given(side, side, side, side)
def test_pixel_difference(a, b, c, d):
    difference = pixel_difference((a, b), (c, d))
    assert 0 <= difference < 1
    assert difference == pixel_difference((c, d), (a, b))
    assert (difference == 0) == ((a, b) == (c, d))
