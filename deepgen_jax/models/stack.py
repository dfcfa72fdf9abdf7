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
# Fused attention on GPUs, whose results are found by the operation, as they include statistics that have no name.
FLASH = "dot_product_attention_fwd_wrapper"


def rematerialised(layer: type[nn.Module], remat: Remat) -> Any:
    """``layer`` with activations recomputed in the backward pass.

    "none" keeps everything, "full" keeps only each layer's input, what is :func:`deepgen_jax.models.layers.kept`, and
    on GPUs results of flash attention. "flash" keeps these on TPUs, too, where they take twice the memory, as heads of
    64 channels are padded to 128. "dots" also keeps the results of products with weights (no batch dimensions), which
    are the dearest to recompute.
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

    One loop runs through all layers, as one within another would copy the parameters of a group before it starts.

    Args:
      init: parameters are being made.
    """

    def merged(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(groups * size, *x.shape[2:]), tree)

    def split(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(groups, size, *x.shape[1:]), tree)

    layers = scanned(body, groups * size, broadcast_inputs)
    return nn.map_variables(layers, ("params", LORA), merged, split, init=init, mutable=init)
