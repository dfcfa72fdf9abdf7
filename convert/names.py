"""The name tables: which tensor of a release is which parameter of ours. Import and export read the same tables.

Tables are rows of ``Layer``; sizes in them are symbols that :func:`weights` resolves from a model's configuration. The
names on the left are those of the newest releases; :mod:`deepgen_jax.convert.keys` maps older spellings to them.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from deepgen_jax.config import BridgeConfig, DeepGenConfig, MMDiTConfig, TextConfig, VAEConfig, VisionConfig
from deepgen_jax.models.mmdit import block_runs
from deepgen_jax.models.qwen_text import selected_layers

from .transforms import Shape, Transform, target_shape

#: Where the parts of a model stand in a checkpoint's key space.
TEXT = "lmm.model.language_model."
VISION = "lmm.model.visual."
LM_HEAD = "lmm.lm_head"
MMDIT = "transformer."
VAE = "vae."

EMBEDDING_KEY = f"{TEXT}embed_tokens.weight"
LM_HEAD_KEY = f"{LM_HEAD}.weight"


class Kind(enum.Enum):
    """Layer types: the tensors they hold in a release and the parameters they become."""

    LINEAR = (("weight", "kernel", Transform.LINEAR), ("bias", "bias", Transform.SAME))
    LINEAR_NO_BIAS = (("weight", "kernel", Transform.LINEAR),)
    EMBEDDING = (("weight", "embedding", Transform.SAME),)
    RMS_NORM = (("weight", "scale", Transform.SAME),)
    NORM = (("weight", "scale", Transform.SAME), ("bias", "bias", Transform.SAME))
    CONV = (("weight", "kernel", Transform.CONV), ("bias", "bias", Transform.SAME))
    PATCH_2D = (("weight", "kernel", Transform.PATCH_CHANNELS_LAST), ("bias", "bias", Transform.SAME))
    PATCH_3D = (("weight", "kernel", Transform.PATCH_CHANNELS_FIRST),)
    TABLE = (("", "", Transform.TABLE),)
    ARRAY = (("", "", Transform.SAME),)


class Layer(NamedTuple):
    """One row of a table. ``shape`` is that of the weight, each size a symbol or a number times a symbol ("9 D")."""

    source: str
    target: str
    kind: Kind
    shape: str


@dataclass(frozen=True)
class Weight:
    """One tensor of a release and its place in the parameter tree.

    Attributes:
      key: name in the newest releases, with the part's prefix.
      shape: shape in the release.
      path: path of the leaf in the parameter tree.
      transform: layout change.
      index, stack: place in, and sizes of, the leaf's leading axes that stack equal layers.
      adaptable: LoRA adapters may sit on it.
    """

    key: str
    shape: Shape
    path: tuple[str, ...]
    transform: Transform
    index: Shape = ()
    stack: Shape = ()
    adaptable: bool = False

    @property
    def part(self) -> str:
        return self.path[0]

    @property
    def target_shape(self) -> Shape:
        """Shape of this tensor's slice of the leaf, without the stack's axes."""
        return target_shape(self.transform, self.shape)

    @property
    def module(self) -> str:
        """Name of the layer that holds the tensor."""
        return self.key.rpartition(".")[0]


_TEXT_LAYER = (
    Layer("input_layernorm", "input_norm", Kind.RMS_NORM, "D"),
    Layer("self_attn.q_proj", "q_proj", Kind.LINEAR, "D D"),
    Layer("self_attn.k_proj", "k_proj", Kind.LINEAR, "KV D"),
    Layer("self_attn.v_proj", "v_proj", Kind.LINEAR, "KV D"),
    Layer("self_attn.o_proj", "o_proj", Kind.LINEAR_NO_BIAS, "D D"),
    Layer("post_attention_layernorm", "post_attention_norm", Kind.RMS_NORM, "D"),
    Layer("mlp.gate_proj", "gate_proj", Kind.LINEAR_NO_BIAS, "F D"),
    Layer("mlp.up_proj", "up_proj", Kind.LINEAR_NO_BIAS, "F D"),
    Layer("mlp.down_proj", "down_proj", Kind.LINEAR_NO_BIAS, "D F"),
)
_VISION_BLOCK = (
    Layer("norm1", "norm1", Kind.RMS_NORM, "D"),
    Layer("attn.qkv", "qkv", Kind.LINEAR, "3D D"),
    Layer("attn.proj", "proj", Kind.LINEAR, "D D"),
    Layer("norm2", "norm2", Kind.RMS_NORM, "D"),
    Layer("mlp.gate_proj", "gate_proj", Kind.LINEAR, "F D"),
    Layer("mlp.up_proj", "up_proj", Kind.LINEAR, "F D"),
    Layer("mlp.down_proj", "down_proj", Kind.LINEAR, "D F"),
)
_VISION = (
    Layer("patch_embed.proj", "patch_embed", Kind.PATCH_3D, "D C T P P"),
    Layer("merger.ln_q", "merger/ln_q", Kind.RMS_NORM, "D"),
    Layer("merger.mlp.0", "merger/fc1", Kind.LINEAR, "M M"),
    Layer("merger.mlp.2", "merger/fc2", Kind.LINEAR, "OUT M"),
)
_BRIDGE = (
    Layer("meta_queries", "meta_queries", Kind.ARRAY, "Q TEXT"),
    Layer("projector_1", "projector_in", Kind.LINEAR, "D S"),
    Layer("projector_2", "projector_pooled", Kind.LINEAR, "POOLED D"),
    Layer("projector_3", "projector_sequence", Kind.LINEAR, "SEQUENCE D"),
)
_CONNECTOR_LAYER = (
    Layer("layer_norm1", "norm1", Kind.NORM, "D"),
    Layer("self_attn.q_proj", "q_proj", Kind.LINEAR, "D D"),
    Layer("self_attn.k_proj", "k_proj", Kind.LINEAR, "D D"),
    Layer("self_attn.v_proj", "v_proj", Kind.LINEAR, "D D"),
    Layer("self_attn.out_proj", "out_proj", Kind.LINEAR, "D D"),
    Layer("layer_norm2", "norm2", Kind.NORM, "D"),
    Layer("mlp.fc1", "fc1", Kind.LINEAR, "F D"),
    Layer("mlp.fc2", "fc2", Kind.LINEAR, "D F"),
)
_MMDIT = (
    Layer("pos_embed.pos_embed", "pos_embed", Kind.TABLE, "1 S D"),
    Layer("pos_embed.proj", "patch_embed", Kind.PATCH_2D, "D C P P"),
    Layer("context_embedder", "context_embedder", Kind.LINEAR, "CAPTION SEQUENCE"),
    Layer("time_text_embed.timestep_embedder.linear_1", "timestep_fc1", Kind.LINEAR, "D 256"),
    Layer("time_text_embed.timestep_embedder.linear_2", "timestep_fc2", Kind.LINEAR, "D D"),
    Layer("time_text_embed.text_embedder.linear_1", "text_fc1", Kind.LINEAR, "D POOLED"),
    Layer("time_text_embed.text_embedder.linear_2", "text_fc2", Kind.LINEAR, "D D"),
    Layer("norm_out.linear", "norm_out", Kind.LINEAR, "2D D"),
    Layer("proj_out", "proj_out", Kind.LINEAR, "OUT D"),
)
_MMDIT_BLOCK = (
    Layer("attn.to_q", "attn/to_q", Kind.LINEAR, "D D"),
    Layer("attn.to_k", "attn/to_k", Kind.LINEAR, "D D"),
    Layer("attn.to_v", "attn/to_v", Kind.LINEAR, "D D"),
    Layer("attn.to_out.0", "attn/to_out", Kind.LINEAR, "D D"),
    Layer("attn.norm_q", "attn/norm_q", Kind.RMS_NORM, "H"),
    Layer("attn.norm_k", "attn/norm_k", Kind.RMS_NORM, "H"),
    Layer("attn.add_k_proj", "attn/add_k", Kind.LINEAR, "D D"),
    Layer("attn.add_v_proj", "attn/add_v", Kind.LINEAR, "D D"),
    Layer("attn.norm_added_k", "attn/norm_added_k", Kind.RMS_NORM, "H"),
    Layer("ff.net.0.proj", "ff/fc1", Kind.LINEAR, "4D D"),
    Layer("ff.net.2", "ff/fc2", Kind.LINEAR, "D 4D"),
)
_MMDIT_SINGLE = (Layer("norm1.linear", "norm1", Kind.LINEAR, "6D D"),)
_MMDIT_DUAL = (
    Layer("norm1.linear", "norm1", Kind.LINEAR, "9D D"),
    Layer("attn2.to_q", "attn2/to_q", Kind.LINEAR, "D D"),
    Layer("attn2.to_k", "attn2/to_k", Kind.LINEAR, "D D"),
    Layer("attn2.to_v", "attn2/to_v", Kind.LINEAR, "D D"),
    Layer("attn2.to_out.0", "attn2/to_out", Kind.LINEAR, "D D"),
    Layer("attn2.norm_q", "attn2/norm_q", Kind.RMS_NORM, "H"),
    Layer("attn2.norm_k", "attn2/norm_k", Kind.RMS_NORM, "H"),
)
_MMDIT_CONTEXT_QUERY = (
    Layer("attn.add_q_proj", "attn/add_q", Kind.LINEAR, "D D"),
    Layer("attn.norm_added_q", "attn/norm_added_q", Kind.RMS_NORM, "H"),
)
_MMDIT_CONTEXT = (
    Layer("norm1_context.linear", "norm1_context", Kind.LINEAR, "6D D"),
    *_MMDIT_CONTEXT_QUERY,
    Layer("attn.to_add_out", "attn/add_out", Kind.LINEAR, "D D"),
    Layer("ff_context.net.0.proj", "ff_context/fc1", Kind.LINEAR, "4D D"),
    Layer("ff_context.net.2", "ff_context/fc2", Kind.LINEAR, "D 4D"),
)
_MMDIT_CONTEXT_PRE_ONLY = (Layer("norm1_context.linear", "norm1_context", Kind.LINEAR, "2D D"),)
#: The last layer's context queries: releases hold them, nothing computes with them.
_MMDIT_UNUSED = tuple(row._replace(target=row.target.removeprefix("attn/")) for row in _MMDIT_CONTEXT_QUERY)
_RESNET = (
    Layer("norm1", "norm1", Kind.NORM, "I"),
    Layer("conv1", "conv1", Kind.CONV, "O I 3 3"),
    Layer("norm2", "norm2", Kind.NORM, "O"),
    Layer("conv2", "conv2", Kind.CONV, "O O 3 3"),
)
_SHORTCUT = (Layer("conv_shortcut", "shortcut", Kind.CONV, "O I 1 1"),)
_RESAMPLE = (Layer("", "", Kind.CONV, "O O 3 3"),)
_VAE_ATTENTION = (
    Layer("group_norm", "group_norm", Kind.NORM, "O"),
    Layer("to_q", "to_q", Kind.LINEAR, "O O"),
    Layer("to_k", "to_k", Kind.LINEAR, "O O"),
    Layer("to_v", "to_v", Kind.LINEAR, "O O"),
    Layer("to_out.0", "to_out", Kind.LINEAR, "O O"),
)
_VAE_ENDS = (
    Layer("conv_in", "conv_in", Kind.CONV, "FIRST IN 3 3"),
    Layer("conv_norm_out", "norm_out", Kind.NORM, "LAST"),
    Layer("conv_out", "conv_out", Kind.CONV, "OUT LAST 3 3"),
)


class _Place(NamedTuple):
    """Parent path in the parameter tree, place in the stack and its sizes."""

    target: str
    position: Shape = ()
    stack: Shape = ()


def _size(term: str, sizes: Mapping[str, int]) -> int:
    number, symbol = re.fullmatch(r"(\d*)([A-Z]*)", term).groups()  # type: ignore[union-attr]
    return int(number or 1) * (sizes[symbol] if symbol else 1)


def _expand(
    rows: tuple[Layer, ...],
    source: str,
    place: _Place | str,
    sizes: Mapping[str, int],
    *,
    adaptable: bool = False,
) -> Iterator[Weight]:
    """The tensors of a table's layers, with ``source`` as prefix of keys, at ``place`` (a string: not stacked)."""
    target, index, stack = _Place(place) if isinstance(place, str) else place
    for row in rows:
        shape = tuple(_size(term, sizes) for term in row.shape.split())
        for name, leaf, transform in row.kind.value:
            key = ".".join(filter(None, ((source + row.source).rstrip("."), name)))
            yield Weight(
                key,
                shape[:1] if name == "bias" else shape,
                tuple(filter(None, f"{target}/{row.target}/{leaf}".split("/"))),
                transform,
                index,
                stack,
                adaptable and row.kind in (Kind.LINEAR, Kind.LINEAR_NO_BIAS, Kind.EMBEDDING) and name == "weight",
            )


def text_weights(config: TextConfig, stride: int, *, lm_head: bool) -> Iterator[Weight]:
    """The language model; ``stride`` as in ``BridgeConfig``, ``lm_head``: the head is not the embedding."""
    sizes = {
        "D": config.hidden_size,
        "KV": config.num_kv_heads * config.head_dim,
        "F": config.intermediate_size,
        "V": config.vocab_size,
    }
    embedding = (Layer("embed_tokens", "embed_tokens", Kind.EMBEDDING, "V D"),)
    yield from _expand(embedding, TEXT, "text", sizes, adaptable=True)
    first = selected_layers(config.num_layers, stride)[-1]
    groups = (config.num_layers - 1 - first) // stride
    for layer in range(config.num_layers):
        if layer == config.num_layers - 1:
            place = _Place("unused/text/last_layer")
        elif layer < first:
            place = _Place("text/first_layers", (layer,), (first,))
        else:
            place = _Place("text/layer_groups", divmod(layer - first, stride), (groups, stride))
        yield from _expand(_TEXT_LAYER, f"{TEXT}layers.{layer}.", place, sizes, adaptable=True)
    yield from _expand((Layer("norm", "norm", Kind.RMS_NORM, "D"),), TEXT, "unused/text", sizes)
    if lm_head:
        rows = (Layer("", "lm_head", Kind.LINEAR_NO_BIAS, "V D"),)
        yield from _expand(rows, LM_HEAD, "unused/text", sizes, adaptable=True)


def vision_weights(config: VisionConfig) -> Iterator[Weight]:
    """The vision tower."""
    sizes = {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "C": config.in_channels,
        "T": config.temporal_patch_size,
        "P": config.patch_size,
        "M": config.hidden_size * config.spatial_merge_size**2,
        "OUT": config.out_hidden_size,
    }
    yield from _expand(_VISION, VISION, "vision", sizes, adaptable=True)
    for block in range(config.depth):
        place = _Place("vision/blocks", (block,), (config.depth,))
        yield from _expand(_VISION_BLOCK, f"{VISION}blocks.{block}.", place, sizes, adaptable=True)


def bridge_weights(config: BridgeConfig, text: TextConfig, pooled_dim: int, sequence_dim: int) -> Iterator[Weight]:
    """Think tokens, projectors and connector, on the selected hidden states of the language model."""
    num_states = len(selected_layers(text.num_layers, config.selection_stride))
    sizes = {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "Q": config.num_queries,
        "TEXT": text.hidden_size,
        "S": num_states * text.hidden_size,
        "POOLED": pooled_dim,
        "SEQUENCE": sequence_dim,
    }
    layers = tuple(layer for layer in _BRIDGE if config.num_queries or layer.source != "meta_queries")
    yield from _expand(layers, "", "bridge", sizes)
    for layer in range(config.num_layers):
        place = _Place("bridge/layers", (layer,), (config.num_layers,))
        yield from _expand(_CONNECTOR_LAYER, f"connector.layers.{layer}.", place, sizes)


def mmdit_weights(config: MMDiTConfig) -> Iterator[Weight]:
    """The diffusion transformer, under its names in diffusers."""
    sizes = {
        "D": config.hidden_size,
        "H": config.head_dim,
        "C": config.in_channels,
        "P": config.patch_size,
        "S": config.pos_embed_max_size**2,
        "CAPTION": config.caption_projection_dim,
        "SEQUENCE": config.joint_attention_dim,
        "POOLED": config.pooled_projection_dim,
        "OUT": config.estimates * config.patch_size**2 * config.out_channels,
    }
    yield from _expand(_MMDIT, MMDIT, "mmdit", sizes)
    for number, run in enumerate(block_runs(config)):
        rows = (
            *_MMDIT_BLOCK,
            *(_MMDIT_DUAL if run.dual else _MMDIT_SINGLE),
            *(_MMDIT_CONTEXT_PRE_ONLY if run.context_pre_only else _MMDIT_CONTEXT),
        )
        for i in range(run.length):
            source = f"{MMDIT}transformer_blocks.{run.start + i}."
            yield from _expand(rows, source, _Place(f"mmdit/blocks_{number}", (i,), (run.length,)), sizes)
            if run.context_pre_only:
                yield from _expand(_MMDIT_UNUSED, source, "unused/mmdit", sizes)


def vae_weights(config: VAEConfig) -> Iterator[Weight]:
    """Encoder and decoder of the autoencoder, under their names in diffusers."""
    widths = config.block_out_channels

    def resnet(source: str, target: str, width_in: int, width_out: int) -> Iterator[Weight]:
        rows = _RESNET if width_in == width_out else _RESNET + _SHORTCUT
        yield from _expand(rows, source, target, {"I": width_in, "O": width_out})

    def middle(source: str, target: str) -> Iterator[Weight]:
        width = widths[-1]
        for j in range(2):
            yield from resnet(f"{source}mid_block.resnets.{j}.", f"{target}/mid_resnet_{j}", width, width)
        attention = f"{source}mid_block.attentions.0."
        yield from _expand(_VAE_ATTENTION, attention, f"{target}/mid_attention", {"O": width})

    source, target = f"{VAE}encoder.", "vae/encoder"
    ends = {"FIRST": widths[0], "IN": config.in_channels, "LAST": widths[-1], "OUT": 2 * config.latent_channels}
    yield from _expand(_VAE_ENDS, source, target, ends)
    yield from middle(source, target)
    width = widths[0]
    for i, width_out in enumerate(widths):
        for j in range(config.layers_per_block):
            block = f"{source}down_blocks.{i}.resnets.{j}."
            yield from resnet(block, f"{target}/down_{i}_resnet_{j}", width, width_out)
            width = width_out
        if i < len(widths) - 1:
            sampler = f"{source}down_blocks.{i}.downsamplers.0.conv"
            yield from _expand(_RESAMPLE, sampler, f"{target}/down_{i}_downsample", {"O": width})

    source, target = f"{VAE}decoder.", "vae/decoder"
    ends = {"FIRST": widths[-1], "IN": config.latent_channels, "LAST": widths[0], "OUT": config.out_channels}
    yield from _expand(_VAE_ENDS, source, target, ends)
    yield from middle(source, target)
    width = widths[-1]
    for i, width_out in enumerate(reversed(widths)):
        for j in range(config.layers_per_block + 1):
            block = f"{source}up_blocks.{i}.resnets.{j}."
            yield from resnet(block, f"{target}/up_{i}_resnet_{j}", width, width_out)
            width = width_out
        if i < len(widths) - 1:
            sampler = f"{source}up_blocks.{i}.upsamplers.0.conv"
            yield from _expand(_RESAMPLE, sampler, f"{target}/up_{i}_upsample", {"O": width})


def weights(config: DeepGenConfig, *, lm_head: bool | None = None) -> dict[str, Weight]:
    """All tensors of a model by key. ``lm_head`` defaults to the configuration's ``not tie_word_embeddings``."""
    mmdit = config.mmdit
    lm_head = not config.text.tie_word_embeddings if lm_head is None else lm_head
    rows = (
        *text_weights(config.text, config.bridge.selection_stride, lm_head=lm_head),
        *vision_weights(config.vision),
        *bridge_weights(config.bridge, config.text, mmdit.pooled_projection_dim, mmdit.joint_attention_dim),
        *mmdit_weights(mmdit),
        *vae_weights(config.vae),
    )
    return {weight.key: weight for weight in rows}
