"""A CLIP checkpoint of transformers -> the parameters of `deepgen_jax.models.clip`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.models.clip import CLIPConfig, CLIPTowerConfig

from .configs import read_json
from .sources import WEIGHT_DTYPES, open_safetensors

_TOWERS = {"text": "text_model", "vision": "vision_model"}
_MODULES = {
    "layer_norm1": "norm1", "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj",
    "self_attn.out_proj": "out_proj", "layer_norm2": "norm2", "mlp.fc1": "fc1", "mlp.fc2": "fc2",
}  # fmt: skip
#: Names outside the layers -> paths.
_SINGLE = {
    "text_model.embeddings.token_embedding.weight": ("token_embedding", "embedding"),
    "text_model.embeddings.position_embedding.weight": ("text_positions",),
    "text_model.final_layer_norm.weight": ("text_norm", "scale"),
    "text_model.final_layer_norm.bias": ("text_norm", "bias"),
    "text_projection.weight": ("text_projection", "kernel"),
    "vision_model.embeddings.class_embedding": ("class_embedding",),
    "vision_model.embeddings.patch_embedding.weight": ("patch_embedding", "kernel"),
    "vision_model.embeddings.position_embedding.weight": ("vision_positions",),
    # The spelling is that of the checkpoints.
    "vision_model.pre_layrnorm.weight": ("vision_norm_in", "scale"),
    "vision_model.pre_layrnorm.bias": ("vision_norm_in", "bias"),
    "vision_model.post_layernorm.weight": ("vision_norm_out", "scale"),
    "vision_model.post_layernorm.bias": ("vision_norm_out", "bias"),
    "visual_projection.weight": ("vision_projection", "kernel"),
}
#: A counting buffer, and the temperature of training, which a cosine does without.
_UNUSED = re.compile(r"(^|\.)position_ids$|^logit_scale$")


def clip_config(values: Mapping[str, Any], where: str = "config.json") -> CLIPConfig:
    """CLIP's ``config.json``. Values that a file leaves out are those of transformers' CLIP configuration.

    Raises:
      DeepGenError: it is not CLIP's, or holds a value that is not supported.
    """
    if values.get("model_type") != "clip":
        raise DeepGenError(f"{where}: model_type is {values.get('model_type')!r}; give the folder of a CLIP model")
    text, vision = ((values.get(f"{name}_config") or {}) for name in ("text", "vision"))
    try:
        config = CLIPConfig(
            text=_tower(text, CLIPTowerConfig(512, 2048, 12, 8)),
            vision=_tower(vision, CLIPTowerConfig(768, 3072, 12, 12)),
            vocab_size=int(text.get("vocab_size", 49408)),
            max_positions=int(text.get("max_position_embeddings", 77)),
            eos_token_id=int(text.get("eos_token_id", 49407)),
            image_size=int(vision.get("image_size", 224)),
            patch_size=int(vision.get("patch_size", 32)),
            projection_dim=int(values.get("projection_dim", 512)),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise DeepGenError(f"{where} cannot be read ({error}); download it again") from None
    for tower in (config.text, config.vision):
        if tower.activation not in ("quick_gelu", "gelu"):
            raise DeepGenError(f"{where}: hidden_act={tower.activation!r} is not supported, only quick_gelu and gelu")
    return config


def load_clip(folder: Path) -> tuple[CLIPConfig, dict[str, Any]]:
    """Reads a CLIP model's folder, with its weights in safetensors or in ``pytorch_model.bin`` (which needs torch).

    Returns:
      the configuration, and float32 numpy arrays as the parameters of `deepgen_jax.models.clip.CLIP`.

    Raises:
      DeepGenError: a file is missing or damaged, or a tensor is missing, unknown or of the wrong shape.
    """
    config = clip_config(read_json(folder / "config.json"), str(folder / "config.json"))
    return config, clip_params(config, _read_weights(folder), str(folder))


def clip_params(config: CLIPConfig, tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """Parameters from the tensors of a checkpoint by name; see `load_clip`."""
    left = {name for name in tensors if not _UNUSED.search(name)}

    def take(name: str) -> np.ndarray:
        if name not in tensors:
            raise DeepGenError(f"{where}: the tensor {name} is missing; download the model again")
        left.discard(name)
        array = np.asarray(tensors[name], np.float32)
        if array.ndim == 4:
            # A convolution without overlap is a product with the patches as (row, column, channel).
            array = array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
        elif array.ndim == 2 and not name.endswith("embedding.weight"):
            array = array.T
        return array

    params: dict[str, Any] = {}
    for name, path in _SINGLE.items():
        _put(params, path, take(name))
    for tower, prefix in _TOWERS.items():
        count = getattr(config, tower).num_layers
        for module, ours in _MODULES.items():
            leaves = {"weight": "scale" if ours.startswith("norm") else "kernel", "bias": "bias"}
            for leaf, our_leaf in leaves.items():
                stacked = np.stack([take(f"{prefix}.encoder.layers.{i}.{module}.{leaf}") for i in range(count)])
                _put(params, (f"{tower}_layers", ours, our_leaf), stacked)
    if left:
        raise DeepGenError(f"{where}: {len(left)} tensors are unknown, such as {min(left)}; is this a CLIP model?")
    _check_shapes(config, params, where)
    return params


def _tower(values: Mapping[str, Any], default: CLIPTowerConfig) -> CLIPTowerConfig:
    return CLIPTowerConfig(
        hidden_size=int(values.get("hidden_size", default.hidden_size)),
        intermediate_size=int(values.get("intermediate_size", default.intermediate_size)),
        num_layers=int(values.get("num_hidden_layers", default.num_layers)),
        num_heads=int(values.get("num_attention_heads", default.num_heads)),
        activation=values.get("hidden_act", default.activation),
        layer_norm_eps=float(values.get("layer_norm_eps", default.layer_norm_eps)),
    )


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    pickled = folder / "pytorch_model.bin"
    if not any(folder.glob("*.safetensors")) and pickled.is_file():
        import torch

        try:
            loaded = torch.load(pickled, map_location="cpu", weights_only=True)
            return {name: tensor.float().numpy() for name, tensor in loaded.items() if not _UNUSED.search(name)}
        except Exception as error:
            raise DeepGenError(f"{pickled} cannot be read ({type(error).__name__}); download it again") from error
    source = open_safetensors(folder, "clip")
    try:
        used = {name: tensor for name, tensor in source.tensors.items() if not _UNUSED.search(name)}
        wrong = next((tensor for tensor in used.values() if tensor.dtype not in WEIGHT_DTYPES), None)
        if wrong:
            raise DeepGenError(f"{source.label}: {wrong.name} is {wrong.dtype}, which is no weight")
        return {name: tensor.read() for name, tensor in used.items()}
    finally:
        source.close()


def _put(tree: dict[str, Any], path: tuple[str, ...], value: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _check_shapes(config: CLIPConfig, params: Mapping[str, Any], where: str) -> None:
    import jax
    import jax.numpy as jnp

    from deepgen_jax.models.clip import CLIP

    ids, pixels = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, config.image_size, config.image_size, 3))
    wanted = jax.eval_shape(lambda: CLIP(config).init(jax.random.key(0), ids, pixels, method="similarity"))["params"]
    for path, shape in jax.tree_util.tree_leaves_with_path(wanted):
        value: Any = params
        for key in path:
            value = value[key.key]
        if value.shape != shape.shape:
            name = jax.tree_util.keystr(path)
            raise DeepGenError(f"{where}: {name} has shape {value.shape}, the configuration asks for {shape.shape}")
