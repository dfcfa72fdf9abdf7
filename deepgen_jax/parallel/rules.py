"""Sharding rules: a regular expression for each kind of parameter -> mesh axes of its last dimensions.

Megatron's scheme over "tensor" (projections into heads and MLPs are split by column, those out of them by row), and the
other large dimension over "fsdp". Leading axes of stacked layers are never split.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Spec = tuple[str | None, ...]

_COLUMN = (
    r"q_proj|k_proj|v_proj|gate_proj|up_proj|fc1|qkv|to_q|to_k|to_v|add_q|add_k|add_v"
    r"|projector_in|projector_pooled|projector_sequence|context_embedder|timestep_fc1|text_fc1|lm_head"
)
_ROW = r"o_proj|down_proj|out_proj|fc2|proj|to_out|add_out|timestep_fc2|text_fc2"
_CONV = r"conv_in|conv_out|conv1|conv2|shortcut|\w+_downsample|\w+_upsample"

#: (pattern that matches the whole path, mesh axis of each of the last dimensions)
RULES: tuple[tuple[str, Spec], ...] = (
    # 0.4 MiB at full size. If split, the compiler communicates their results for every token instead of the weights.
    (r"mmdit/(patch_embed|proj_out)/(kernel|a|b)", (None, None)),
    (r"mmdit/(patch_embed|proj_out)/bias", (None,)),
    (r"vision/patch_embed/kernel", ("fsdp", "tensor")),
    (rf".*/({_COLUMN})/kernel", ("fsdp", "tensor")),
    (rf".*/({_COLUMN})/bias", ("tensor",)),
    (r"mmdit/(.*/)?(norm1|norm1_context|norm_out)/kernel", ("fsdp", "tensor")),
    (r"mmdit/(.*/)?(norm1|norm1_context|norm_out)/bias", ("tensor",)),
    (rf".*/({_ROW})/kernel", ("tensor", "fsdp")),
    (rf".*/({_ROW})/bias", (None,)),
    (r".*/embed_tokens/embedding", (None, "fsdp")),
    (r"bridge/meta_queries", (None, "fsdp")),
    (r"mmdit/pos_embed", (None, "fsdp")),
    (rf"vae/.*/({_CONV})/kernel", (None, None, None, "fsdp")),
    (rf"vae/.*/({_CONV})/bias", (None,)),
    (r".*/scale", (None,)),
    (r".*/(weight|product)_scale", (None,)),
    (r"(vae|bridge)/.*norm\w*/bias", (None,)),
    (r".*/embed_tokens/a", ("fsdp", None)),
    (r".*/embed_tokens/b", (None, "fsdp")),
    # Adapters are split like the kernels beside them; otherwise activations would be resharded.
    (rf".*/({_COLUMN})/a", ("fsdp", None)),
    (rf".*/({_COLUMN})/b", ("fsdp", "tensor")),
    (r"mmdit/(.*/)?(norm1|norm1_context|norm_out)/a", ("fsdp", None)),
    (r"mmdit/(.*/)?(norm1|norm1_context|norm_out)/b", ("fsdp", "tensor")),
    (rf".*/({_ROW})/a", ("tensor", "fsdp")),
    (rf".*/({_ROW})/b", (None, "fsdp")),
)


def matching_rules(path: str) -> list[int]:
    """Indices of the rules that match a parameter's path; exactly one in a valid table."""
    return [i for i, (pattern, _) in enumerate(RULES) if re.fullmatch(pattern, path)]


@functools.cache
def _spec_of(path: str) -> Spec:
    """Mesh axes of a parameter's last dimensions."""
    matches = matching_rules(path)
    if len(matches) != 1:
        raise ValueError(f"sharding: {path} matches {len(matches)} rules of deepgen_jax.parallel.rules, expected 1")
    return RULES[matches[0]][1]


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Partition of one parameter. A dimension that its mesh axis does not divide is not split.

    Raises:
      ValueError: no rule, or more than one, matches the path.
    """
    spec = _spec_of(path)
    leading = len(shape) - len(spec)
    axes = [axis if axis and shape[leading + i] % mesh.shape[axis] == 0 else None for i, axis in enumerate(spec)]
    return PartitionSpec(*(None,) * leading, *axes)


def shardings(tree: Mapping[str, Any], mesh: Mesh, prefix: str = "") -> dict[str, Any]:
    """A tree of ``NamedSharding`` for a tree of arrays or ``ShapeDtypeStruct``s, whose paths begin with ``prefix``."""
    return _map_paths(lambda path, leaf: NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)), tree, prefix)


def gathered_shardings(tree: Mapping[str, Any], mesh: Mesh, prefix: str = "") -> dict[str, Any]:
    """The same for weights replicated over "fsdp", except embedding tables, of which rows are looked up."""

    def gathered(path: str, leaf: Any) -> NamedSharding:
        spec = partition_spec(path, leaf.shape, mesh)
        if not path.endswith("/embedding"):
            spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
        return NamedSharding(mesh, spec)

    return _map_paths(gathered, tree, prefix)


def _map_paths(function: Callable[[str, Any], Any], tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A tree of ``function(path, leaf)``, paths joined by slashes."""

    def of(path: tuple[Any, ...], leaf: Any) -> Any:
        return function("/".join((prefix, *path) if prefix else path), leaf)

    return dict(traverse_util.path_aware_map(of, dict(tree)))
