"""Low-rank adapters as a separate tree beside the base weights.

A LoRA tree has the paths of the parameter tree; where an adapted layer has ``{"kernel", ...}`` or ``{"embedding"}``,
it has ``{"a" [..., in, rank], "b" [..., rank, out]}``. The update of the weight is ``scale * a @ b``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Mapping[str, Any]


def is_adapter(node: Any) -> bool:
    """Whether a node of a LoRA tree is one layer's pair of factors."""
    return isinstance(node, Mapping) and set(node) == {"a", "b"}


def scaled(lora: Tree, scale: float | jax.Array) -> dict[str, Any]:
    """The tree that modules take: ``b`` times the scale (alpha / rank). Differentiable."""
    if is_adapter(lora):
        return {"a": lora["a"], "b": lora["b"] * scale}
    return {name: scaled(child, scale) for name, child in lora.items()}


def folded(weight: Any, a: Any, b: Any, scale: float) -> Any:
    """``weight + scale * a @ b`` in float32, of numpy arrays, which stay on the host, or of jax arrays.

    Args:
      weight: [..., in, out].
      a, b: [..., in, rank] and [..., rank, out].
      scale: alpha / rank.
    """
    if isinstance(weight, np.ndarray):
        update = a.astype(np.float32, copy=False) @ b.astype(np.float32, copy=False)
        update *= np.float32(scale)  # in place: the weight may be large
        update += weight
        return update
    a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
    return jnp.asarray(weight, jnp.float32) + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def merged(params: Tree, lora: Tree, scale: float) -> dict[str, Any]:
    """``params`` with every adapter folded into its weight in float32; adapted weights come out float32.

    Raises:
      KeyError: an adapter has no weight at its path.
    """
    out = dict(params)
    for name, child in lora.items():
        if name not in params:
            raise KeyError(f"adapter at {name!r}, but the parameters have {sorted(params)}")
        if is_adapter(child):
            weight = "embedding" if "embedding" in params[name] else "kernel"
            out[name] = {**params[name], weight: folded(params[name][weight], child["a"], child["b"], scale)}
        else:
            out[name] = merged(params[name], child, scale)
    return out
