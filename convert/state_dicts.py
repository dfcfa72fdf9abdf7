"""Finds the weights in what a checkpoint holds: a bare state dict, or one among entries of training state.

The trained weights are taken, under ``state_dict``, ``module``, ``model_state_dict`` or ``model``, in this order. A
moving average of them (EMA) is taken where it is asked for, or where the checkpoint has no other weights; it may cover
some tensors only, and the others are then the trained ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepgen_jax.errors import DeepGenError

from .keys import AVERAGE_LEFT_OUT, parse_key

#: Entries that hold the trained weights, and the layout that they mean; the first one present counts.
TRAINED = {
    "state_dict": "mmengine checkpoint",
    "module": "DeepSpeed checkpoint",
    "model_state_dict": "training checkpoint",
    "model": "training checkpoint",
}
#: Entries that hold a moving average.
AVERAGES = (
    "ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema_model_state_dict", "params_ema",
    "averaged_model",
)  # fmt: skip
#: Entries inside an average's that may hold its tensors.
_INNER = (*TRAINED, "shadow", "params", "averaged_model")


@dataclass(frozen=True)
class StateDict:
    """The weights of a checkpoint.

    Attributes:
      tensors: torch tensors by name.
      layout: what kind of checkpoint it is, in words.
      ignored: entries left out, with the reason.
      hparams: hyper-parameters in the form of ``--hparams``; only our exports have them.
      average: the tensors are, or hold, the moving average.
    """

    tensors: dict[str, Any]
    layout: str
    ignored: dict[str, str] = field(default_factory=dict)
    hparams: Any = None
    average: bool = False


def find_weights(loaded: Any, label: str, *, ema: bool = False) -> StateDict:
    """The weights in an unpickled checkpoint.

    Args:
      loaded: what ``torch.load`` returned.
      label: name of the file for messages.
      ema: take the moving average where there is one.

    Raises:
      DeepGenError: it holds no weights, or some without names.
    """
    if not isinstance(loaded, Mapping):
        raise DeepGenError(f"{label} holds a {type(loaded).__name__}, expected a state dict")
    entry = next((name for name in TRAINED if isinstance(loaded.get(name), Mapping)), None)
    trained = loaded if entry is None else _unwrapped(loaded[entry])
    average_entry = next((name for name in AVERAGES if _tensors(_unwrapped(loaded.get(name)))), None)
    average = {} if average_entry is None else _tensors(_unwrapped(loaded[average_entry]))
    tensors = _tensors(trained)
    if not tensors and not average:
        raise DeepGenError(_no_weights(loaded, label))
    take = bool(average) and (ema or not tensors)
    layout = "bare state dict" if entry is None else TRAINED[entry]
    used = {entry, average_entry} if take else {entry}
    ignored = {}
    if entry is not None or take:
        ignored = {str(name): "training state beside the weights" for name in loaded if name not in used}
    if average_entry is not None and not take:
        ignored[average_entry] = AVERAGE_LEFT_OUT
    ignored |= {str(name): "not a tensor" for name in trained if name not in tensors and name not in loaded}
    if entry is None and not take:
        ignored |= {str(name): "not a tensor" for name in loaded if name not in tensors and name != average_entry}
    if take:
        covered = {parse_key(str(name)) for name in average}
        rest = {name: tensor for name, tensor in tensors.items() if parse_key(str(name)) not in covered}
        tensors = {**rest, **average}
        layout = f"{layout}, moving average" if entry is not None else "moving average"
    meta = loaded.get("meta")
    hparams = meta.get("deepgen_config") if isinstance(meta, Mapping) else None
    return StateDict(tensors, layout, ignored, hparams if isinstance(hparams, Mapping) else None, take)


def _tensors(node: Any) -> dict[str, Any]:
    import torch

    if not isinstance(node, Mapping):
        return {}
    return {name: value for name, value in node.items() if isinstance(value, torch.Tensor)}


def _unwrapped(node: Any, depth: int = 3) -> Any:
    """The mapping of tensors inside ``node``, which may be it; ``node`` itself if there is none."""
    if _tensors(node) or not isinstance(node, Mapping) or not depth:
        return node
    inner = (_unwrapped(node[name], depth - 1) for name in _INNER if name in node)
    return next((found for found in inner if _tensors(found)), node)


def _no_weights(loaded: Mapping[Any, Any], label: str) -> str:
    for name in ("shadow_params", *AVERAGES):
        shadow = loaded.get(name)
        shadow = shadow.get("shadow_params") if isinstance(shadow, Mapping) else shadow
        if isinstance(shadow, (list, tuple)) and shadow:
            return f"{label} holds a moving average without names; save the averaged model's state dict"
    names = ", ".join(str(name) for name in list(loaded)[:5]) or "nothing"
    return f"{label} holds no weights (entries: {names}); expected a state dict, or one under {' or '.join(TRAINED)}"
