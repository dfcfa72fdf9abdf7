"""State dicts in memory -> parameter trees, without a folder in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.errors import DeepGenError

from . import names
from .keys import parse_key
from .transforms import to_target
from .writer import nested

_PREFIXES = {"text": "lmm.", "vision": "lmm.", "bridge": "", "mmdit": names.MMDIT, "vae": names.VAE}


def load_tree(part: str, state_dict: Mapping[str, Any], config: DeepGenConfig) -> dict[str, Any]:
    """The parameters of one part from a state dict under its own library's names.

    Args:
      part: "text" and "vision" (transformers' Qwen2.5-VL, either hierarchy; further tensors are ignored), "bridge"
        (names of the releases), "mmdit" and "vae" (diffusers).
      state_dict: arrays or CPU tensors by name, without adapters.
      config: sizes; only those of the part matter.

    Returns:
      The part's nested dict of float32 arrays, without the weights that nothing computes with.

    Raises:
      DeepGenError: tensors are missing or of the wrong shape.
    """
    table = [weight for weight in _table(part, config) if weight.part == part]
    found = {parse_key(name, _PREFIXES[part]).name: value for name, value in state_dict.items()}
    missing = [weight.key for weight in table if weight.key not in found]
    if missing:
        raise DeepGenError(f"the state dict of {part} lacks {len(missing)} tensors, such as {missing[0]}")
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    for weight in table:
        value = found[weight.key]
        array = np.asarray(value.detach().float().numpy() if hasattr(value, "detach") else value, np.float32)
        if array.shape != weight.shape:
            raise DeepGenError(f"{weight.key} is {list(array.shape)}, expected {list(weight.shape)}")
        shape = (*weight.stack, *weight.target_shape)
        leaves.setdefault(weight.path, np.empty(shape, np.float32))[weight.index] = to_target(weight.transform, array)
    return nested(leaves)[part]


def _table(part: str, config: DeepGenConfig) -> list[names.Weight]:
    match part:
        case "text":
            return list(names.text_weights(config.text, config.bridge.selection_stride, lm_head=False))
        case "vision":
            return list(names.vision_weights(config.vision))
        case "mmdit":
            return list(names.mmdit_weights(config.mmdit))
        case "vae":
            return list(names.vae_weights(config.vae))
        case "bridge":
            return [weight for weight in names.weights(config).values() if weight.part == "bridge"]
    raise DeepGenError(f"part {part!r} is unknown; use one of {', '.join(_PREFIXES)}")
