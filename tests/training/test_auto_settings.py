"""Settings left to "auto": what is chosen fits, more memory never means more recomputation, what is given is kept."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deepgen_jax import settings
from deepgen_jax.aot.compile import Request
from deepgen_jax.aot.topology import parse_topology
from deepgen_jax.config import DeepGenConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel.chips import CHIPS, GIB
from deepgen_jax.parallel.mesh import parse_mesh, usual_mesh
from deepgen_jax.training import config_files
from deepgen_jax.training.auto_settings import LONGER_SAMPLES, SHARE, Devices, auto_meshes, choose
from deepgen_jax.training.memory_model import MemoryModel, abstract_mesh
from deepgen_jax.training.stage import stage_class

MODEL = DeepGenConfig()
ROWS = json.loads((Path(__file__).parents[2] / "docs/data/scaling.json").read_text(encoding="utf-8"))
#: Recomputation, least first.
ORDER = ("none", "dots", "mlp", "flash", "full")
KINDS = {"v5e": "tpu", "v5p": "tpu", "v6e": "tpu", "h100": "gpu"}


def config_of(name, *words):
    return settings.apply(config_files.load_config(name), words)


def devices(kind, count, memory=None, slices=1):
    chip = CHIPS[kind]
    return Devices(chip.device_kinds[0], KINDS[kind], count, slices, chip.memory if memory is None else memory)


def chosen(config, on, recorded=None):
    return choose(config, on, lambda: MODEL, getattr(stage_class(config), "workload", None), recorded)


def modelled(config, on, choice):
    """Bytes by kind of a choice."""
    workload = stage_class(config).workload(config, MODEL)
    model = MemoryModel(config, MODEL, workload, on.platform, on.slices)
    return model.bytes(abstract_mesh(parse_mesh(choice.mesh)), choice.remat, bool(choice.gather_frozen))


COMPILED = [row for row in ROWS if not re.search(r"rollout|inference|encoders", row["program"])]


@pytest.mark.parametrize("row", COMPILED, ids=lambda row: row["command"].removeprefix("deepgen compile "))
def test_model_of_memory_is_close_to_what_compilers_report(row):
    name, *words = row["command"].split()[2:]
    config = config_of(name, *[word for word in words if re.match(r"[a-z_.]+=", word) and word != row["mesh"]])
    kind, text = row["topology"].split(":")
    on = devices(kind, math.prod(parse_mesh(row["mesh"]).values()), slices=2 if "slices" in text else 1)
    choice = chosen(dataclasses.replace(config, mesh=row["mesh"]), on)
    found = modelled(config, on, choice)
    compiled = row["memory_gib"]
    weights = found["trainable weights"] + found["frozen weights"] + found["moving average"]
    assert weights / GIB == pytest.approx(compiled["weights"], abs=0.06)
    assert found["optimiser"] / GIB == pytest.approx(compiled["optimiser"], abs=0.06)
    assert 0.9 < sum(found.values()) / GIB / compiled["total"] < 1.2


stages = st.sampled_from(["pretrain", "sft", "grpo", "distill"])
kinds = st.sampled_from(sorted(KINDS))
counts = st.sampled_from([1, 2, 4, 8, 16, 64, 256])


@hypothesis_settings(max_examples=25, deadline=None)
@given(stages, kinds, counts, st.floats(1, 400), st.floats(1, 4))
def test_more_memory_never_means_more_recomputation(name, kind, count, gib, factor):
    config = config_of(name)
    less, more = (chosen(config, devices(kind, count, memory * GIB)) for memory in (gib, gib * factor))
    assert ORDER.index(more.remat) <= ORDER.index(less.remat)
    assert more.fits or not less.fits


@hypothesis_settings(max_examples=25, deadline=None)
@given(stages, kinds, counts, st.floats(1, 400))
def test_what_is_chosen_fits_and_is_the_same_each_time(name, kind, count, gib):
    config, on = config_of(name), devices(kind, count, gib * GIB)
    choice = chosen(config, on)
    assert choice == chosen(config, on)
    found = modelled(config, on, choice)
    assert choice.needed == sum(found.values())
    assert choice.fits == (choice.needed <= SHARE * on.memory)
    sizes = parse_mesh(choice.mesh)
    assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] == count
    if choice.remat != "full":
        allowed = choice.needed + (LONGER_SAMPLES - 1) * found["activations and work space"]
        assert allowed <= SHARE * on.memory
    assert "may not fit" in str(choice) or choice.fits


@hypothesis_settings(max_examples=8, deadline=None)
@given(kinds, st.sampled_from(ORDER), st.booleans(), st.sampled_from(["data=64,fsdp=1", "data=1,fsdp=64", "fsdp=64"]))
def test_what_is_given_is_kept(kind, remat, gather, mesh):
    on = devices(kind, 64)
    whole = config_of("sft", f"remat={remat}", f"gather_frozen={str(gather).lower()}", f"mesh={mesh}")
    choice = chosen(whole, on)
    assert (choice.mesh, choice.remat, choice.gather_frozen) == (mesh, remat, gather)
    assert chosen(config_of("sft", f"remat={remat}"), on).remat == remat
    assert chosen(config_of("sft", f"mesh={mesh}"), on).mesh == mesh
    assert chosen(config_of("sft", f"gather_frozen={str(gather).lower()}"), on).gather_frozen is gather
    assert choice.applied(whole) == whole


def test_stage_2_on_v6e_takes_what_was_estimated_fastest():
    choice = chosen(config_of("sft"), devices("v6e", 64))
    assert (choice.mesh, choice.remat, choice.gather_frozen) == ("data=4,fsdp=16", "flash", True)
    request = Request(config_of("sft"), parse_topology("v6e:8x8"))
    assert request.choice == choice
    assert request.mesh_text == choice.mesh


def test_replication_pays_where_links_are_slow_for_the_arithmetic():
    for kind, count, pays in (("v6e", 64, True), ("v5e", 256, True), ("v5p", 64, False), ("h100", 64, False)):
        assert chosen(config_of("sft"), devices(kind, count)).gather_frozen is pays
    # Products of many samples take longer.
    assert not chosen(config_of("sft", "data.micro_batch=512"), devices("v6e", 64, 400 * GIB)).gather_frozen


def test_cpus_and_unknown_devices_keep_the_plain_settings():
    unknown = Devices("some GPU", "gpu", 8, 1, 0.0)
    for on in (Devices("cpu", "cpu", 8, 1, 0.0), Devices("cpu", "cpu", 8, 1, 64 * GIB), unknown):
        choice = choose(config_of("sft"), on, lambda: pytest.fail("nothing is modelled"), None)
        assert (choice.mesh, choice.remat, choice.gather_frozen) == (usual_mesh(8, gpu=on.gpu), "full", False)
    assert chosen(config_of("tiny_vae"), devices("v6e", 8)).gather_frozen is None


@given(kinds, st.integers(1, 512), st.lists(st.integers(1, 512), min_size=1, max_size=3))
def test_meshes_hold_all_devices_and_split_micro_batches_that_can_be_split(kind, count, sizes):
    on = devices(kind, count)
    meshes = [parse_mesh(text) for text in auto_meshes(on, sizes)]
    for mesh in meshes:
        assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] == count
        if mesh["tensor"] > 1:
            assert all(size % (mesh["data"] * mesh["fsdp"]) == 0 for size in sizes)
    assert [mesh["fsdp"] for mesh in meshes] == sorted({mesh["fsdp"] for mesh in meshes})
    if all(size % count == 0 for size in sizes):
        assert meshes[0] == parse_mesh(usual_mesh(count, gpu=on.gpu))


def test_resumed_runs_keep_their_choice_on_the_same_devices():
    config, on = config_of("sft"), devices("v6e", 64)
    recorded = {"devices": str(on), "mesh": "data=8,fsdp=8", "remat": "full", "gather_frozen": False}
    assert chosen(config, on, recorded).to_json() == recorded
    assert chosen(config, on, chosen(config, on).to_json()) == chosen(config, on)
    # What is given now counts more, and other devices have their own choice.
    assert chosen(config_of("sft", "remat=flash"), on, recorded).to_json() == recorded | {"remat": "flash"}
    other = devices("v6e", 16)
    assert chosen(config, other, recorded) == chosen(config, other)
    # As does a run that would not fit any more.
    larger = config_of("sft", "data.micro_batch=512")
    assert chosen(larger, on, recorded | {"remat": "none"}) == chosen(larger, on)
    cpu = Devices("cpu", "cpu", 1, 1, 0.0)
    kept = {"devices": "1 x cpu", "mesh": "fsdp=1", "remat": "none", "gather_frozen": False}
    assert choose(config, cpu, lambda: MODEL, None, kept).to_json() == kept


def test_stages_are_not_made_before_the_choice():
    assert config_of("sft", "remat=dots").chosen_remat == "dots"
    with pytest.raises(ValueError, match="make_stage"):
        _ = config_of("sft").chosen_remat


def test_values_of_the_settings_are_checked():
    for word in ("remat=most", "gather_frozen=often"):
        with pytest.raises(DeepGenError, match=word.split("=")[1]):
            config_of("sft", word)
    assert config_of("sft", "gather_frozen=auto").gather_frozen == "auto"
    assert config_of("sft", "gather_frozen=true").gather_frozen is True
    with pytest.raises(DeepGenError, match="mesh"):
        chosen(config_of("sft", "mesh=often"), devices("v6e", 8))
