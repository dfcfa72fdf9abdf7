"""The mesh of generation where none is asked for."""

from __future__ import annotations

import math
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax.cli.image_run import chosen_mesh
from deepgen_jax.inference.auto_mesh import auto_mesh, mesh_for
from deepgen_jax.parallel.chips import GIB
from deepgen_jax.parallel.mesh import parse_mesh
from deepgen_jax.stores.model_folder import locate

sizes = st.integers(1, 64)


@given(sizes, sizes, st.floats(0.1, 300), st.floats(1, 200), st.sampled_from([2, 16, 24]))
def test_meshes_hold_all_devices_and_split_weights_where_they_must(count, images, weights, memory, heads):
    mesh = parse_mesh(mesh_for(count, images, weights * GIB, memory * GIB, heads))
    assert math.prod(mesh.values()) == count
    assert heads % mesh["tensor"] == 0
    if images >= count:
        assert mesh["tensor"] == 1
    held = weights / (mesh["fsdp"] * mesh["tensor"])
    assert held <= 0.6 * memory or mesh["data"] == 1
    if mesh["fsdp"] > 1:
        assert weights > 0.6 * memory * mesh["tensor"]


@given(sizes, sizes, st.floats(0.1, 300), st.floats(1, 200), st.floats(1, 4))
def test_more_memory_never_splits_weights_further(count, images, weights, memory, factor):
    less, more = (parse_mesh(mesh_for(count, images, weights, size, 24)) for size in (memory, memory * factor))
    assert more["fsdp"] <= less["fsdp"]


def device(platform, kind, memory):
    return SimpleNamespace(
        platform=platform, device_kind=kind, process_index=0, memory_stats=lambda: {"bytes_limit": memory}
    )


def test_all_accelerators_are_used_and_one_cpu():
    folder = locate("nano")
    gpus = [device("gpu", "NVIDIA H200", 130 * GIB)] * 8
    assert auto_mesh(folder, "bfloat16", 1, gpus[:1]) is None
    assert auto_mesh(folder, "bfloat16", 100, gpus) == "data=8,fsdp=1,tensor=1"
    assert auto_mesh(folder, "bfloat16", 100, [device("cpu", "cpu", 130 * GIB)] * 8) is None
    assert auto_mesh(folder, "bfloat16", 100, [device("gpu", "unknown", 0)] * 8) is None


def test_what_is_given_is_kept():
    assert chosen_mesh("data=2", locate("nano"), "auto", 4) == "data=2"
