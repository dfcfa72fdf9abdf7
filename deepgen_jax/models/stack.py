"""Stacks of equal layers run as one `nn.scan`, so that a program's size does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from deepgen_jax.models.layers import LORA

Remat = Literal["none", "full", "dots"]
# Name of what even "full" keeps.
_KEPT = "kept"


def kept(x: jax.Array) -> jax.Array:
    """``x``, which "full" rematerialisation keeps, too: to be used of what takes long to compute and is small."""
    return checkpoint_name(x, _KEPT)


def rematerialised(layer: type[nn.Module], remat: Remat) -> Any:
    """``layer`` with activations recomputed in the backward pass.

    "none" keeps everything, "full" keeps only each layer's input and what is :func:`kept`, "dots" also keeps the
    results of products with weights (no batch dimensions), which are the dearest to recompute.
    """
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if remat == "dots" else policies.save_only_these_names(_KEPT)
    return nn.remat(layer, prevent_cse=False, policy=policy)


def scanned(body: Any, length: int, broadcast_inputs: int) -> Callable[..., Any]:
    """A module class like ``body``, repeated ``length`` times with parameters stacked on a new first axis.

    ``body.__call__`` takes (carry, *inputs) and returns (carry, output or None); every layer sees the same
    inputs.
    """
    return nn.scan(
        body,
        variable_axes={"params": 0, LORA: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast,) * broadcast_inputs,
        length=length,
    )
