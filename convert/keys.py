"""Spellings of tensor names: prefixes, older module hierarchies and adapters, all mapped to one canonical key."""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

_TOP = r"(?=lmm\.|transformer\.|vae\.|connector\.|projector_\d|meta_queries$|ema\.)"

#: (pattern, replacement), applied in this order to keys that already carry their part's prefix.
_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # compiled modules, FSDP and activation checkpointing, at any depth
        (r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module)\.)+", r"\1"),
        # data parallel and trainers
        (rf"^(?:module\.|model\.)+{_TOP}", ""),
        # a whole peft model instead of the adapted modules inside it
        (r"^lmm\.base_model\.model\.", "lmm."),
        # Qwen2.5-VL before transformers 4.52
        (r"^lmm\.visual\.", "lmm.model.visual."),
        (r"^lmm\.model\.(?=layers\.|embed_tokens\.|norm\.)", "lmm.model.language_model."),
        # attention of the autoencoder before diffusers 0.18
        (r"^(vae\.\w+\.mid_block\.attentions\.\d+\.)query\.", r"\1to_q."),
        (r"^(vae\.\w+\.mid_block\.attentions\.\d+\.)key\.", r"\1to_k."),
        (r"^(vae\.\w+\.mid_block\.attentions\.\d+\.)value\.", r"\1to_v."),
        (r"^(vae\.\w+\.mid_block\.attentions\.\d+\.)proj_attn\.", r"\1to_out.0."),
    )
)

_BASE = re.compile(r"\.base_layer(?=\.(?:weight|bias)$)")
_ADAPTER = re.compile(
    r"^(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.(?P<n1>[^.]+)\.weight|lora_embedding_(?P<table>[AB])\.(?P<n2>[^.]+))$"
)

#: Names that adapters' tensors have in peft, diffusers and other trainers.
_ANY_ADAPTER = re.compile(
    r"\.lora_(embedding_)?([AB]|up|down|mid|magnitude_vector)(\.|$)|\.(hada|lokr)_\w+$|lora.*\.alpha$"
)

#: Tensors of releases that can be recomputed.
_KNOWN_UNUSED = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"(?:^|\.)rotary_(?:pos_)?emb\.inv_freq$", "rotary frequencies, computed from the configuration"),
        (r"(?:^|\.)position_ids$", "a counting buffer"),
    )
)


#: Beginning of names of the moving average of the weights, beside the weights themselves.
_AVERAGE = re.compile(r"^(?:module\.|model\.|_orig_mod\.)*ema\.(?:module\.)?")
AVERAGE_LEFT_OUT = "moving average of the weights; the trained ones are converted, --ema takes the average"


class Role(enum.Enum):
    """Role of a source tensor in its module."""

    WEIGHT = "weight"
    LORA_A = "a"
    LORA_B = "b"


class Key(NamedTuple):
    """A canonical key. For adapters ``name`` is the adapted weight's key and ``adapter`` the adapter's name."""

    name: str
    role: Role = Role.WEIGHT
    adapter: str = ""


def parse_key(raw: str, prefix: str = "") -> Key:
    """The canonical key of a tensor's name; ``prefix`` is that of its part if the file holds a single part."""
    name = prefix + raw
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    match = _ADAPTER.match(name)
    if match:
        role = Role.LORA_A if (match["linear"] or match["table"]) == "A" else Role.LORA_B
        return Key(f"{match['module']}.weight", role, match["n1"] or match["n2"])
    return Key(_BASE.sub("", name))


def average_of(raw: str) -> str | None:
    """The name of the tensor that ``raw`` is the moving average of, or None if it is none."""
    match = _AVERAGE.match(raw)
    return raw[match.end() :] if match else None


def is_adapter(name: str) -> bool:
    """Whether a tensor is part of a LoRA adapter, by its name in any trainer's checkpoint."""
    return _ANY_ADAPTER.search(name) is not None


def unused_reason(name: str) -> str | None:
    """Why a canonical key may be left out, or None if it may not."""
    if average_of(name) is not None:
        return AVERAGE_LEFT_OUT
    return next((reason for pattern, reason in _KNOWN_UNUSED if pattern.search(name)), None)
