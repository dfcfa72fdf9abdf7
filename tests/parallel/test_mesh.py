"""Which mesh is taken, and which part of a batch each host holds on real arrangements of chips."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils

from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel.mesh import AXES, host_share, parse_mesh, usual_mesh, usual_mesh_of


@dataclass(frozen=True)
class Chip:
    """What JAX's arrangement of meshes reads of a TPU."""

    id: int
    coords: tuple[int, int, int]
    process_index: int
    device_kind: str
    core_on_chip: int = 0
    platform: str = "tpu"
    slice_index: int = 0


def slice_of(kind: str, sides: tuple[int, ...]) -> list[Chip]:
    """A slice whose hosts are blocks of 2x2 chips."""
    sides = (*sides, 1)[:3]
    places = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(sides)))]
    hosts = sorted({(z, y // 2, x // 2) for x, y, z in places})
    return [Chip(i, (x, y, z), hosts.index((z, y // 2, x // 2)), kind) for i, (x, y, z) in enumerate(places)]


@pytest.mark.parametrize(
    ("kind", "sides", "mesh", "parts"),
    [
        ("TPU v5 lite", (16, 16), "data=16,fsdp=16", 64),
        ("TPU v5 lite", (16, 16), "fsdp=256", 64),
        ("TPU v6 lite", (8, 8), "data=4,fsdp=16", 16),
        ("TPU v6 lite", (8, 8), "data=8,fsdp=8", 16),
        ("TPU v6 lite", (8, 8), "data=8,fsdp=4,tensor=2", 16),
        ("TPU v6 lite", (4, 4), "fsdp=16", 4),
        ("TPU v5", (4, 4, 4), "data=4,fsdp=16", 16),
    ],
)
def test_hosts_of_a_slice_share_every_batch(monkeypatch, kind, sides, mesh, parts):
    chips = slice_of(kind, sides)
    shape = parse_mesh(mesh)
    sizes = tuple(shape[axis] for axis in AXES)
    devices = mesh_utils.create_device_mesh(sizes, chips, allow_split_physical_axes=True)
    laid_out = SimpleNamespace(devices=devices, shape=shape)
    rows = devices.reshape(-1, sizes[-1])
    seen: dict[int, frozenset[int]] = {}
    for host in {chip.process_index for chip in chips}:
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        part, count = host_share(laid_out)
        assert count == parts
        own = frozenset(i for i, row in enumerate(rows) if any(chip.process_index == host for chip in row))
        # Hosts with the same part hold the same rows; all parts together are the batch.
        assert seen.setdefault(part, own) == own
    assert sorted(itertools.chain(*seen.values())) == list(range(len(rows)))
    assert sorted(seen) == list(range(parts))


def test_parts_that_overlap_are_refused():
    hosts = np.array([[[0, 1], [1, 2], [2, 0]]])
    devices = np.vectorize(lambda host: SimpleNamespace(process_index=host))(hosts)
    with pytest.raises(DeepGenError, match="splits batches unevenly over hosts; make tensor smaller"):
        host_share(SimpleNamespace(devices=devices, shape=parse_mesh("fsdp=3,tensor=2")))


def test_weights_are_split_over_neighbours_unless_told_otherwise():
    assert usual_mesh(64, gpu=True) == "data=8,fsdp=8"
    assert usual_mesh(4, gpu=True) == "data=1,fsdp=4"
    assert usual_mesh(256, gpu=False) == "data=16,fsdp=16"
    assert usual_mesh(512, 2, gpu=False) == "data=32,fsdp=16"
    chips = [SimpleNamespace(platform="tpu", slice_index=i // 24) for i in range(48)]
    assert usual_mesh_of(chips) == "data=6,fsdp=8"
