"""The sharding table and meshes."""

from __future__ import annotations

import jax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, PartitionSpec

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models.deepgen import abstract_params
from deepgen_jax.parallel import rules
from deepgen_jax.parallel.mesh import AXES, make_mesh, parse_mesh
from deepgen_jax.stores import model_folder
from deepgen_jax.training.partition import init_lora


@pytest.fixture(scope="module")
def full():
    return abstract_params(DeepGenConfig())


def test_every_parameter_matches_exactly_one_rule(full):
    paths = flatten_dict(full, sep="/")
    assert {path: n for path in paths if (n := len(rules.matching_rules(path))) != 1} == {}


def test_stored_and_adapter_parameters_match_exactly_one_rule(folders):
    folder = folders("sft_adapters")
    for name in ("params", "lora"):
        for path, _ in flatten_dict(model_folder.stored_tree(folder, name), sep="/").items():
            assert len(rules.matching_rules(path)) == 1, path


def test_adapters_of_the_mmdit_match_exactly_one_rule(full):
    adapters = jax.eval_shape(lambda: init_lora(full["mmdit"], 4, jax.random.key(0), part="mmdit"))
    paths = flatten_dict(adapters, sep="/")
    assert {path: n for path in paths if (n := len(rules.matching_rules(path))) != 1} == {}
    kernels = [path.removesuffix("/kernel") for path in flatten_dict(full, sep="/") if path.startswith("mmdit/")]
    assert {path.rpartition("/")[0] for path in paths} <= set(kernels)
    assert "mmdit/blocks_0/norm1/a" in paths


@pytest.mark.parametrize("fsdp", [2, 8, 16, 64, 256])
def test_no_large_parameter_is_whole_on_every_device(fsdp, full):
    """Of 4 MiB and more, in the dtype that it has in stage 2."""
    mesh = AbstractMesh((1, fsdp, 1), AXES)
    for path, leaf in flatten_dict(full, sep="/").items():
        width = 4 if path.split("/")[0] in ("bridge", "mmdit", "vae") else 2
        if leaf.size * width > 4 * 2**20:
            assert "fsdp" in rules.partition_spec(path, leaf.shape, mesh), path


@pytest.mark.parametrize("fsdp", [2, 8, 16, 64])
def test_no_large_adapter_is_whole_on_every_device(fsdp, full):
    """Of the published rank, 64, over which they are split where their kernels' other dimension is."""
    mesh = AbstractMesh((1, fsdp, 1), AXES)
    for part in ("text", "mmdit"):
        shapes = full[part]
        adapters = jax.eval_shape(lambda shapes=shapes, part=part: init_lora(shapes, 64, jax.random.key(0), part))
        for path, leaf in flatten_dict(adapters, sep="/").items():
            if leaf.size * 4 > 4 * 2**20:
                assert "fsdp" in rules.partition_spec(path, leaf.shape, mesh), path


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_tensor_parallelism_splits_heads_and_mlps(tensor, full):
    mesh = AbstractMesh((1, 1, tensor), AXES)
    for path, leaf in flatten_dict({"mmdit": full["mmdit"]}, sep="/").items():
        if path.endswith(("to_q/kernel", "fc1/kernel", "to_out/kernel", "fc2/kernel")):
            assert "tensor" in rules.partition_spec(path, leaf.shape, mesh), path


def test_small_projections_of_every_token_are_whole(full):
    mesh = AbstractMesh((1, 8, 2), AXES)
    for name in ("patch_embed", "proj_out"):
        assert rules.partition_spec(f"mmdit/{name}/kernel", full["mmdit"][name]["kernel"].shape, mesh) == (
            PartitionSpec(None, None)
        )


def test_axes_that_do_not_divide_a_dimension_are_left_out():
    mesh = AbstractMesh((1, 4, 2), AXES)
    assert rules.partition_spec("text/x/q_proj/kernel", (6, 10), mesh) == PartitionSpec(None, "tensor")
    with pytest.raises(ValueError, match="matches 0 rules"):
        rules.partition_spec("text/x/unheard_of", (4,), mesh)


def test_mesh_text():
    assert parse_mesh("tensor=2, data=4") == {"data": 4, "fsdp": 1, "tensor": 2}
    for wrong in ("", "model=2", "data", "data=0", "data=-1", "data=2,data=2", "data=x"):
        with pytest.raises(DeepGenError, match="data=1,fsdp=8,tensor=1"):
            parse_mesh(wrong)


def test_mesh_must_use_the_devices_there_are():
    assert make_mesh(None).size == 1
    with pytest.raises(DeepGenError, match=f"needs 64 devices, but there are {len(jax.devices())}"):
        make_mesh("data=64")


def test_layers_are_gathered_and_tables_stay_split(full):
    mesh = AbstractMesh((2, 4, 2), AXES)
    text = {"text": full["text"]}
    found = {path: where.spec for path, where in flatten_dict(rules.gathered_shardings(text, mesh), sep="/").items()}
    assert [path for path, spec in found.items() if "fsdp" in spec] == ["text/embed_tokens/embedding"]
    assert found["text/layer_groups/gate_proj/kernel"] == PartitionSpec(None, None, None, "tensor")
    for path, leaf in flatten_dict(text, sep="/").items():
        assert ("tensor" in found[path]) == ("tensor" in rules.partition_spec(path, leaf.shape, mesh))
