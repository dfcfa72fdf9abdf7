"""The JSON configurations of releases, parsed to ours.

Every option of a file is read, checked against the one supported value, or listed as harmless; anything else is an
error, since ignoring it could change results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepgen_jax import strict_json
from deepgen_jax.config import BridgeConfig, MMDiTConfig, SchedulerConfig, TextConfig, VAEConfig, VisionConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow.schedule import parse_config
from deepgen_jax.options import Options

from .transforms import Shape


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      DeepGenError: the file is missing or is no JSON object.
    """
    if not path.exists():
        raise DeepGenError(f"{path} is missing; download it again")
    values = strict_json.read_json(path, "download it again")
    if not isinstance(values, dict):
        raise DeepGenError(f"{path} is not a JSON object; download it again")
    return values


_IGNORED_BY_TRANSFORMERS = (
    "architectures", "attention_dropout", "bos_token_id", "dtype", "hidden_dropout", "initializer_range",
    "layer_types", "max_window_layers", "sliding_window", "torch_dtype", "transformers_version", "use_cache",
    "vision_token_id", "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict",
    "id2label", "label2id", "problem_type", "is_encoder_decoder", "attn_implementation", "name_or_path",
)  # fmt: skip


def qwen_configs(values: Mapping[str, Any], where: str) -> tuple[TextConfig, VisionConfig]:
    """Qwen2.5-VL's ``config.json``; the language model's options are at the top level or in ``text_config``."""
    top = Options(values, where)
    top.require(model_type="qwen2_5_vl", hidden_act="silu", use_sliding_window=False)
    vision = top.child("vision_config")
    if vision is None:
        raise DeepGenError(f"{where} lacks 'vision_config'; expected the configuration of Qwen2.5-VL")
    text = top.child("text_config")
    config = _text_config(top if text is None else text, top)
    if text is not None:
        # Written beside text_config by some versions, always with the same values.
        top.ignore(*(name for name in values if name in values["text_config"]))
    for options in filter(None, (top, text)):
        options.ignore(*_IGNORED_BY_TRANSFORMERS)
        options.finish()
    return config, _vision_config(vision)


def _text_config(text: Options, top: Options) -> TextConfig:
    text.require(
        model_type=("qwen2_5_vl", "qwen2_5_vl_text"),
        hidden_act="silu",
        use_sliding_window=False,
        attention_bias=True,
        mlp_bias=False,
    )
    defaults = TextConfig()
    rope = text.child("rope_parameters") or text.child("rope_scaling") or top.child("rope_scaling")
    if rope is None:
        raise DeepGenError("the configuration of Qwen2.5-VL lacks rope_scaling (its mrope_section); download it again")
    text.ignore("rope_scaling", "rope_parameters")
    rope.require(type=("mrope", "default"), rope_type=("mrope", "default"))
    theta = rope.take("rope_theta", float, None)
    theta = text.take("rope_theta", float, defaults.rope_theta if theta is None else theta)
    sections = rope.take("mrope_section", tuple)
    rope.finish()
    config = TextConfig(
        hidden_size=text.take("hidden_size", int),
        intermediate_size=text.take("intermediate_size", int),
        num_layers=text.take("num_hidden_layers", int),
        num_heads=text.take("num_attention_heads", int),
        num_kv_heads=text.take("num_key_value_heads", int),
        vocab_size=text.take("vocab_size", int),
        rms_norm_eps=text.take("rms_norm_eps", float),
        rope_theta=theta,
        mrope_sections=sections,
        # Where the file says nothing, an lm_head among the weights means untied embeddings.
        tie_word_embeddings=top.take("tie_word_embeddings", bool, text.take("tie_word_embeddings", bool, True)),
        max_position_embeddings=text.take("max_position_embeddings", int, defaults.max_position_embeddings),
        pad_token_id=top.take("pad_token_id", int, text.take("pad_token_id", int, defaults.pad_token_id)),
        eos_token_id=top.take("eos_token_id", int, text.take("eos_token_id", int, defaults.eos_token_id)),
        vision_start_token_id=top.take("vision_start_token_id", int, defaults.vision_start_token_id),
        vision_end_token_id=top.take("vision_end_token_id", int, defaults.vision_end_token_id),
        image_token_id=top.take("image_token_id", int, text.take("image_token_id", int, defaults.image_token_id)),
        video_token_id=top.take("video_token_id", int, text.take("video_token_id", int, defaults.video_token_id)),
    )
    text.ignore("vision_start_token_id", "vision_end_token_id")
    text.require(head_dim=config.head_dim)
    if 2 * sum(config.mrope_sections) != config.head_dim:
        raise DeepGenError(f"mrope_section {list(sections)} must add up to half the head dimension {config.head_dim}")
    return config


def _vision_config(vision: Options) -> VisionConfig:
    defaults = VisionConfig()
    vision.require(model_type=("qwen2_5_vl", "qwen2_5_vl_vision"), hidden_act="silu")
    vision.take("in_chans", int, None)
    config = VisionConfig(
        depth=vision.take("depth", int),
        hidden_size=vision.take("hidden_size", int),
        intermediate_size=vision.take("intermediate_size", int),
        num_heads=vision.take("num_heads", int),
        in_channels=vision.take("in_channels", int, vision.take("in_chans", int, defaults.in_channels)),
        patch_size=vision.take("patch_size", int, defaults.patch_size),
        temporal_patch_size=vision.take("temporal_patch_size", int, defaults.temporal_patch_size),
        spatial_merge_size=vision.take("spatial_merge_size", int, defaults.spatial_merge_size),
        window_size=vision.take("window_size", int, defaults.window_size),
        full_attention_blocks=vision.take("fullatt_block_indexes", tuple, defaults.full_attention_blocks),
        out_hidden_size=vision.take("out_hidden_size", int),
    )
    vision.require(spatial_patch_size=config.patch_size)
    rope = vision.child("rope_parameters")
    if rope is not None:
        rope.require(rope_theta=10000.0, rope_type=("axial", "default"))
        rope.finish()
    # The position in time only matters for videos.
    vision.ignore("tokens_per_second", *_IGNORED_BY_TRANSFORMERS)
    vision.finish()
    return config


def mmdit_config(values: Mapping[str, Any], where: str) -> MMDiTConfig:
    """``transformer/config.json`` of diffusers' SD3Transformer2DModel."""
    options = Options(values, where)
    config = MMDiTConfig(
        num_layers=options.take("num_layers", int),
        num_heads=options.take("num_attention_heads", int),
        head_dim=options.take("attention_head_dim", int),
        in_channels=options.take("in_channels", int),
        out_channels=options.take("out_channels", int, options.take("in_channels", int)),
        patch_size=options.take("patch_size", int),
        joint_attention_dim=options.take("joint_attention_dim", int),
        caption_projection_dim=options.take("caption_projection_dim", int),
        pooled_projection_dim=options.take("pooled_projection_dim", int),
        dual_attention_layers=options.take("dual_attention_layers", tuple, ()),
        pos_embed_max_size=options.take("pos_embed_max_size", int),
        sample_size=options.take("sample_size", int),
    )
    if values.get("qk_norm") is None:
        raise DeepGenError(f"{where}: qk_norm=None is not supported, only 'rms_norm' is (SD3.5, not SD3)")
    options.require(qk_norm="rms_norm")
    options.finish()
    return config


def vae_config(values: Mapping[str, Any], where: str) -> VAEConfig:
    """``vae/config.json`` of diffusers' AutoencoderKL."""
    options = Options(values, where)
    widths = options.take("block_out_channels", tuple)
    config = VAEConfig(
        in_channels=options.take("in_channels", int),
        out_channels=options.take("out_channels", int),
        latent_channels=options.take("latent_channels", int),
        block_out_channels=widths,
        layers_per_block=options.take("layers_per_block", int),
        norm_num_groups=options.take("norm_num_groups", int),
        scaling_factor=options.take("scaling_factor", float),
        shift_factor=options.take("shift_factor", float, 0.0),
        sample_size=options.take("sample_size", int, VAEConfig().sample_size),
        force_upcast=options.take("force_upcast", bool, True),
    )
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        options.require(**{name: [block] * len(widths)})
    for name in ("use_quant_conv", "use_post_quant_conv"):
        if values.get(name) is not False:
            raise DeepGenError(f"{where}: {name}={values.get(name, True)!r} is not supported, only False is")
        options.ignore(name)
    options.require(act_fn="silu", mid_block_add_attention=True)
    for name in ("latents_mean", "latents_std"):
        options.ignore(name)
        if values.get(name) is not None:
            raise DeepGenError(f"{where}: {name} is not supported; only shift_factor and scaling_factor are")
    options.finish()
    return config


def scheduler_config(values: Mapping[str, Any], where: str) -> SchedulerConfig:
    """``scheduler/scheduler_config.json`` of diffusers' FlowMatchEulerDiscreteScheduler."""
    return parse_config(values, where)


def bridge_config(
    shapes: Mapping[str, Shape], connector: Mapping[str, Any], where: str, hidden_size: int
) -> BridgeConfig:
    """The bridge's sizes, from the shapes of its tensors and, for the rest, from ``connector``.

    Args:
      shapes: canonical key -> shape of the bridge's tensors; may be empty.
      connector: num_queries, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads and
        selection_stride, as far as known.
      where: name of the file that ``connector`` comes from.
      hidden_size: of the language model; the connector has the same unless the tensors or the file say otherwise.

    Raises:
      DeepGenError: the file contradicts the shapes.
    """
    defaults = BridgeConfig()
    usual = {**vars(defaults), "hidden_size": hidden_size}
    options = Options(connector, where)
    options.require(hidden_act="gelu_pytorch_tanh")
    numbers = [int(match[1]) for match in map(re.compile(r"connector\.layers\.(\d+)\.").match, shapes) if match]
    queries = shapes.get("meta_queries", ())
    intermediate = shapes.get("connector.layers.0.mlp.fc1.bias", ())
    projector = shapes.get("projector_1.weight", ())
    inferred = {
        "num_queries": queries[0] if len(queries) == 2 else None,
        "hidden_size": projector[0] if len(projector) == 2 else None,
        "intermediate_size": intermediate[0] if len(intermediate) == 1 else None,
        "num_hidden_layers": max(numbers) + 1 if numbers else None,
    }
    ours = {"num_hidden_layers": "num_layers"}
    sizes = {}
    for name, found in inferred.items():
        stated = options.take(name, int, None)
        if None not in (stated, found) and stated != found:
            raise DeepGenError(
                f"{where}: {name} is {stated}, but the checkpoint's tensors say {found}; "
                "use the file that belongs to the checkpoint"
            )
        field = ours.get(name, name)
        sizes[field] = next((v for v in (found, stated) if v is not None), usual[field])
    heads = options.take("num_attention_heads", int, defaults.num_heads)
    if heads > 0 and sizes["hidden_size"] % heads:
        raise DeepGenError(
            f"the connector's hidden size {sizes['hidden_size']} cannot be split into {heads} "
            "heads; pass --hparams with the model's connector.num_attention_heads"
        )
    config = BridgeConfig(
        **sizes,
        num_heads=heads,
        layer_norm_eps=options.take("layer_norm_eps", float, defaults.layer_norm_eps),
        selection_stride=options.take("selection_stride", int, defaults.selection_stride),
    )
    options.ignore("attention_dropout", *_IGNORED_BY_TRANSFORMERS, "model_type", "_attn_implementation")
    options.finish()
    return config
