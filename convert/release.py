"""The diffusers release layout: its folders, configuration files and tensor names."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepgen_jax.config import (
    BridgeConfig,
    DeepGenConfig,
    MMDiTConfig,
    SchedulerConfig,
    TextConfig,
    VAEConfig,
    VisionConfig,
)

from .hparams import CALL_DEFAULTS
from .names import LM_HEAD, MMDIT, TEXT, VAE, VISION
from .tensor_files import SafetensorsWriter, TensorSpecs, write_json

#: (prefix of canonical keys, folder, prefix there); the first that fits counts.
_PLACES = (
    (TEXT, "vlm", "model."),
    (VISION, "vlm", "visual."),
    (f"{LM_HEAD}.", "vlm", "lm_head."),
    (MMDIT, "transformer", ""),
    (VAE, "vae", ""),
    ("", "connector", ""),
)
_STEMS = {
    "vlm": "model",
    "connector": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
_TORCH_NAMES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_DIFFUSERS_VERSION = "0.35.2"


def place(key: str) -> tuple[str, str]:
    """Folder and name of a canonical key."""
    prefix, folder, local = next(row for row in _PLACES if key.startswith(row[0]))
    return folder, local + key.removeprefix(prefix)


class ReleaseWriter:
    """Writes a release to a new folder; tensors arrive under canonical keys in the order of ``specs``.

    The tokenizer's files are the caller's to add, in ``tokenizer/``.
    """

    def __init__(
        self,
        folder: Path,
        config: DeepGenConfig,
        scheduler: SchedulerConfig,
        specs: TensorSpecs,
        max_shard_bytes: int,
    ) -> None:
        by_folder: dict[str, dict[str, jax.ShapeDtypeStruct]] = {name: {} for name in _STEMS}
        for canonical, spec in specs.items():
            name, key = place(canonical)
            by_folder[name][key] = spec
        self._writers = {
            name: SafetensorsWriter(folder / name, _STEMS[name], group, max_shard_bytes)
            for name, group in by_folder.items()
        }
        dtypes = {spec.dtype for spec in by_folder["vlm"].values()}
        vlm_dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        files = {
            "vlm/config.json": qwen_json(config.text, config.vision, vlm_dtype.name),
            "transformer/config.json": mmdit_json(config.mmdit),
            "vae/config.json": vae_json(config.vae),
            "scheduler/scheduler_config.json": scheduler_json(scheduler),
            "connector/config.json": connector_json(config.bridge),
            "deepgen_config.json": hparams_json(config),
            "prompt_template.json": _PROMPT_TEMPLATE,
            "model_index.json": _MODEL_INDEX,
        }
        (folder / "scheduler").mkdir()
        for name, values in files.items():
            write_json(folder / name, values)
        for name, subfolder in _CODE.items():
            shutil.copyfile(Path(__file__).with_name(name), folder / subfolder / name)

    def add(self, key: str, rows: np.ndarray) -> None:
        folder, name = place(key)
        self._writers[folder].add(name, rows)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def qwen_json(text: TextConfig, vision: VisionConfig, dtype: str) -> dict[str, Any]:
    """``config.json`` of Qwen2.5-VL, in the flat form that every version of transformers reads."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": text.pad_token_id,
        "eos_token_id": text.eos_token_id,
        "vision_start_token_id": text.vision_start_token_id,
        "vision_end_token_id": text.vision_end_token_id,
        "image_token_id": text.image_token_id,
        "video_token_id": text.video_token_id,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_sections)},
        "tie_word_embeddings": text.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": text.vocab_size,
        "vision_config": {
            "depth": vision.depth,
            "hidden_act": "silu",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "in_chans": vision.in_channels,
            "in_channels": vision.in_channels,
            "out_hidden_size": vision.out_hidden_size,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "spatial_patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "tokens_per_second": 2,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.full_attention_blocks),
        },
    }


def mmdit_json(config: MMDiTConfig) -> dict[str, Any]:
    """``transformer/config.json``."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "attention_head_dim": config.head_dim,
        "caption_projection_dim": config.caption_projection_dim,
        "dual_attention_layers": list(config.dual_attention_layers),
        "in_channels": config.in_channels,
        "joint_attention_dim": config.joint_attention_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "pooled_projection_dim": config.pooled_projection_dim,
        "pos_embed_max_size": config.pos_embed_max_size,
        "qk_norm": "rms_norm",
        "sample_size": config.sample_size,
    }


def vae_json(config: VAEConfig) -> dict[str, Any]:
    """``vae/config.json``."""
    levels = len(config.block_out_channels)
    values = dataclasses.asdict(config)
    values["block_out_channels"] = list(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": _DIFFUSERS_VERSION,
        **values,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def scheduler_json(config: SchedulerConfig) -> dict[str, Any]:
    """``scheduler/scheduler_config.json``; our field names are the file's."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": _DIFFUSERS_VERSION,
        **dataclasses.asdict(config),
    }


def connector_json(config: BridgeConfig) -> dict[str, Any]:
    """``connector/config.json``; the stride at which hidden states are selected where it is not that of the release."""
    stride = config.selection_stride
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.layer_norm_eps,
        "num_queries": config.num_queries,
        **({} if stride == BridgeConfig.selection_stride else {"selection_stride": stride}),
    }


def hparams_json(config: DeepGenConfig) -> dict[str, Any]:
    """Hyper-parameters that no checkpoint stores, in the format of ``--hparams``."""
    connector = connector_json(config.bridge)
    values = {"num_queries": connector.pop("num_queries"), "max_length": config.max_prompt_tokens}
    for name in CALL_DEFAULTS:
        if (value := getattr(config, name)) != getattr(DeepGenConfig, name):
            values[name] = value
    if config.lora is not None:
        values |= {"lora_rank": config.lora.rank, "lora_alpha": config.lora.alpha}
    return {**values, "connector": connector}


_PROMPT_TEMPLATE = {
    "IMG_START_TOKEN": "<|vision_start|>",
    "IMG_END_TOKEN": "<|vision_end|>",
    "IMG_CONTEXT_TOKEN": "<|image_pad|>",
    "INSTRUCTION": "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "GENERATION": "Generate an image: {input}",
    "CFG": "Generate an image.",
}
#: Code that a release carries for diffusers, by the folder that it stands in; the sources are modules beside this one.
_CODE = {"deepgen_pipeline.py": "", "deepgen_connector.py": "connector"}
_MODEL_INDEX = {
    "_class_name": ["deepgen_pipeline", "DeepGenPipeline"],
    "_diffusers_version": _DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "vlm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "connector": ["deepgen_connector", "DeepGenConnector"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
}
