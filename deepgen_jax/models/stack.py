"""Stacks of equal layers.

Their parameters are stacked, and they run as one `nn.scan`, so that a program's size does not grow with depth. On a
single GPU, XLA would copy each layer's weights out of the stack before it multiplies with them; there the pipeline
splits stacks into a tree for each layer when it loads a model (:func:`unstack`), and programs unroll the loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from deepgen_jax.models.layers import FLASH_RESULTS, INNER, KEPT, LORA, PRODUCT

Remat = Literal["none", "dots", "mlp", "flash", "full"]
#: Collection of the joint attention's outputs, [layers, B, queries, D], for those who ask for it as mutable.
ATTENTION_OUTPUTS = "attention_outputs"
# Primitive of fused attention on GPUs. Its results include softmax statistics that cannot be named, so the policy
# matches the primitive, a private name of JAX; tests/models/test_attention.py fails where a release renames it.
FLASH = "dot_product_attention_fwd_wrapper"

#: (path of a stack, number of its leading axes that count layers). The vision tower is not listed: it runs once a
#: reference, over many tokens.
_STACKS = ((r"mmdit/blocks_\d+", 1), (r"text/first_layers", 1), (r"text/layer_groups", 2), (r"bridge/layers", 1))
_LAYER = "layer_"
# Names of the activations that each rematerialisation saves.
_SAVED: Mapping[str, tuple[str, ...]] = {
    "full": (KEPT,),
    "flash": (KEPT, FLASH_RESULTS),
    "mlp": (KEPT, FLASH_RESULTS, INNER),
    "dots": (KEPT, FLASH_RESULTS, INNER, PRODUCT),
}


def rematerialised(layer: Any, remat: Remat) -> Any:
    """``layer``, a module class or a function of a module, with activations recomputed in the backward pass.

    "none" saves all activations. "full" saves the input of each layer, the results of feed-forward layers in the MMDiT,
    the narrow products of adapters, and on GPUs the results of flash attention. "flash" saves these on TPUs,
    too, where they take twice the memory, as heads of 64 channels are padded to 128. "mlp" also saves the inner
    activations of feed-forward layers, before the nonlinearity: the widest products. "dots" also saves the results of
    all other linear layers.
    """
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names(*_SAVED[remat])
    return nn.remat(layer, prevent_cse=False, policy=policies.save_from_both_policies(named, _is_flash_attention))


def _is_flash_attention(operation: Any, *_: Any, **__: Any) -> bool:
    return bool(operation.name == FLASH)


def scanned(body: Any, length: int, broadcast_inputs: int, *, unrolled: bool = False) -> Callable[..., Any]:
    """A module class like ``body``, repeated ``length`` times with parameters stacked on a new first axis.

    ``body.__call__`` takes (carry, *inputs) and returns (carry, output or None); every layer sees the same
    inputs. With ``unrolled``, parameters are those of :func:`unstack`, and there is no loop.
    """
    if unrolled:
        return partial(_unrolled, body, length)
    return nn.scan(
        body,
        variable_axes={"params": 0, LORA: 0, ATTENTION_OUTPUTS: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast,) * broadcast_inputs,
        length=length,
    )


def repeated(
    layer: nn.Module, length: int, remat: Remat, carries: Sequence[Any], inputs: Sequence[tuple[Any, ...]]
) -> tuple[Any, ...]:
    """``layer`` over several batches at once, ``length`` times: each turn of one loop runs it on all of them.

    Weights are gathered, and their gradients reduced, once a turn, however many batches there are.

    Args:
      layer: (carry, *inputs) -> (carry, None); its parameters are stacked on a new first axis.
      length: number of layers.
      remat: what the backward pass computes again.
      carries: of each batch; they need not have the same shapes.
      inputs: of each batch, seen by every layer.

    Returns:
      The last carry of each batch.
    """

    def turn(layer: Any, carries: Any, inputs: Any) -> tuple[Any, None]:
        return tuple(layer(carry, *given)[0] for carry, given in zip(carries, inputs, strict=True)), None

    def cast(params: Any) -> Any:
        """Kernels in the dtype of the computation, so that gradients of all batches are added before the reduction."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(layer.dtype) if path[-1].key == "kernel" else x, params
        )

    body: Any = turn
    if len(carries) > 1:
        body = nn.map_variables(turn, "params", cast, mutable=False)
    loop = nn.scan(
        rematerialised(body, remat),
        variable_axes={"params": 0, LORA: 0, ATTENTION_OUTPUTS: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=length,
    )
    out: tuple[Any, ...] = loop(layer, tuple(carries), tuple(inputs))[0]
    return out


def scanned_groups(
    body: Any, groups: int, size: int, broadcast_inputs: int, *, init: bool, unrolled: bool = False
) -> Callable[..., Any]:
    """The same for ``groups * size`` layers, with parameters stacked on two new first axes, [groups, size].

    A single loop runs over all layers; a nested one would copy the parameters of each group.

    Args:
      init: the module is being initialised.
    """
    if unrolled:
        return partial(_unrolled, body, groups * size)

    def merged(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(groups * size, *x.shape[2:]), tree)

    def split(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(groups, size, *x.shape[1:]), tree)

    layers = scanned(body, groups * size, broadcast_inputs)
    return nn.map_variables(layers, ("params", LORA), merged, split, init=init, mutable=init)


class _Unrolled(nn.Module):
    """``length`` layers one after another, each with parameters under its own name."""

    layer: Any
    length: int
    settings: tuple[Any, ...]

    @nn.compact
    def __call__(self, carry: Any, *inputs: Any) -> tuple[Any, Any]:
        outputs = []
        for i in range(self.length):
            carry, output = self.layer(*self.settings, name=f"{_LAYER}{i}")(carry, *inputs)
            outputs.append(output)
        return carry, None if outputs[0] is None else jnp.stack(outputs)


def _unrolled(body: Any, length: int, *settings: Any, name: str | None = None) -> _Unrolled:
    return _Unrolled(body, length, settings, name=name)


def unrolls(mesh: Mesh) -> bool:
    """Whether inference on a mesh unrolls stacks: on a single GPU."""
    return bool(mesh.size == 1 and mesh.devices.flat[0].platform == "gpu")


def is_unstacked(parent: nn.Module, name: str) -> bool:
    """Whether ``parent`` was given parameters of the stack ``name`` as those of :func:`unstack`."""
    return parent.has_variable("params", name) and split_layers(parent.get_variable("params", name)) is not None


def split_layers(stack: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The trees of an unstacked stack, first layer first; None for a stack."""
    if f"{_LAYER}0" not in stack:
        return None
    return tuple(stack[f"{_LAYER}{i}"] for i in range(len(stack)))


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the parts of a model, with a tree for each layer in place of each stack.

    ``blocks_0/attn/to_q/kernel`` [13, in, out] becomes ``blocks_0/layer_0/attn/to_q/kernel`` [in, out], and so on.
    Arrays are donated, one at a time, so that no two copies of the weights are held; shapes
    (``jax.ShapeDtypeStruct``) work alike.
    """
    return _map_stacks(_split, params)


def restack(params: Mapping[str, Any], group: int) -> dict[str, Any]:
    """The inverse of :func:`unstack`, as a copy where the arrays are, numpy's on the host; stacks stay as they are.

    Args:
      params: parameters of the parts of a model.
      group: second size of stacks with two leading axes.
    """

    def joined(stack: Mapping[str, Any], axes: int) -> Mapping[str, Any]:
        layers = split_layers(stack)
        if layers is None:
            return stack
        leading = (-1, group)[:axes]
        out: Mapping[str, Any] = jax.tree.map(lambda *x: _joined(x, leading), *layers)
        return out

    return _map_stacks(joined, params)


def _map_stacks(
    function: Callable[[Mapping[str, Any], int], Mapping[str, Any]], params: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """``function(stack, leading axes)`` of every stack; all else as it is."""
    out: dict[str, Any] = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        axes = next((count for pattern, count in _STACKS if re.fullmatch(pattern, path)), 0)
        if axes:
            out[name] = function(value, axes)
        else:
            out[name] = _map_stacks(function, value, f"{path}/") if isinstance(value, Mapping) else value
    return out


def _split(stack: Mapping[str, Any], axes: int) -> dict[str, Any]:
    leaves, structure = jax.tree.flatten(dict(stack))
    slices = [_slices(leaf, axes) for leaf in leaves]
    layers = zip(*slices, strict=True)
    return {f"{_LAYER}{i}": jax.tree.unflatten(structure, one) for i, one in enumerate(layers)}


def _slices(leaf: Any, axes: int) -> Sequence[Any]:
    """One array a layer; the stack of them is deleted."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        count = int(np.prod(leaf.shape[:axes]))
        return [jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype)] * count
    found: Sequence[Any] = _sliced(leaf, axes)
    leaf.delete()
    return found


@partial(jax.jit, static_argnames="axes")
def _sliced(stack: jax.Array, axes: int) -> list[jax.Array]:
    return list(stack.reshape(-1, *stack.shape[axes:]))


def _joined(arrays: Sequence[Any], leading: tuple[int, ...]) -> Any:
    stack = np.stack(arrays) if isinstance(arrays[0], np.ndarray) else jnp.stack(arrays)
    return stack.reshape(*leading, *arrays[0].shape)
