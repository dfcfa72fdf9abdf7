"""Stacks of equal layers run as one `nn.scan`, so that a program's size does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import linen as nn

from deepgen_jax.models.layers import FLASH_RESULTS, KEPT, LORA

Remat = Literal["none", "dots", "flash", "full"]
#: Collection of the joint attention's outputs, [layers, B, queries, D], for those who ask for it as mutable.
ATTENTION_OUTPUTS = "attention_outputs"
# Primitive of fused attention on GPUs. Its results include softmax statistics that cannot be named, so the policy
# matches the primitive, a private name of JAX; tests/models/test_attention.py fails where a release renames it.
FLASH = "dot_product_attention_fwd_wrapper"


def rematerialised(layer: type[nn.Module], remat: Remat) -> Any:
    """``layer`` with activations recomputed in the backward pass.

    "none" saves all activations. "full" saves the input of each layer, what is marked by
    :func:`deepgen_jax.models.layers.kept`, and on GPUs the results of flash attention. "flash" saves these on TPUs,
    too, where they take twice the memory, as heads of 64 channels are padded to 128. "dots" also saves the results of
    products with weights (no batch dimensions), the most expensive to recompute.
    """
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    names = (KEPT,) if remat == "full" else (KEPT, FLASH_RESULTS)
    policy = policies.save_from_both_policies(policies.save_only_these_names(*names), _is_flash_attention)
    if remat == "dots":
        policy = policies.save_from_both_policies(policy, policies.dots_with_no_batch_dims_saveable)
    return nn.remat(layer, prevent_cse=False, policy=policy)


def _is_flash_attention(operation: Any, *_: Any, **__: Any) -> bool:
    return bool(operation.name == FLASH)


def scanned(body: Any, length: int, broadcast_inputs: int) -> Callable[..., Any]:
    """A module class like ``body``, repeated ``length`` times with parameters stacked on a new first axis.

    ``body.__call__`` takes (carry, *inputs) and returns (carry, output or None); every layer sees the same
    inputs.
    """
    return nn.scan(
        body,
        variable_axes={"params": 0, LORA: 0, ATTENTION_OUTPUTS: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast,) * broadcast_inputs,
        length=length,
    )


def scanned_groups(body: Any, groups: int, size: int, broadcast_inputs: int, *, init: bool) -> Callable[..., Any]:
    """The same for ``groups * size`` layers, with parameters stacked on two new first axes, [groups, size].

    A single loop runs over all layers; a nested one would copy the parameters of each group.

    Args:
      init: the module is being initialised.
    """

    def merged(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(groups * size, *x.shape[2:]), tree)

    def split(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(groups, size, *x.shape[1:]), tree)

    layers = scanned(body, groups * size, broadcast_inputs)
    return nn.map_variables(layers, ("params", LORA), merged, split, init=init, mutable=init)
