"""Frozen dataclasses that describe a model, and their JSON form in a model folder's ``config.json``.

The defaults are the released DeepGen 1.0: Qwen2.5-VL-3B-Instruct, the stacked channel bridge and
UniPic2-SD3.5M-Kontext-2B.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from deepgen_jax.errors import DeepGenError

T = TypeVar("T")

#: Side of an image in pixels unless a call or the model sets another.
DEFAULT_SIDE = 512
#: Sampler of models distilled to few steps.
FEW_STEP_SAMPLER = "pi_flow"

# Marks fields that were added later: a config.json without them means the default. Those that are rare are written
# only where they differ from it.
_OPTIONAL = {"optional": True}
_RARE = {"optional": True, "rare": True}


#: Sizes up to this make sense; a damaged file may hold any number, and tables of that size would be built.
_MAX_SIZE, _MAX_COUNT = 2**26, 4096
#: Integers that may be 0, and those that count layers or units that are looped over.
_MAY_BE_ZERO = re.compile(r".*_token_id|num_queries")
_COUNTS = re.compile(
    r"num_layers|depth|layers_per_block|selection_stride|num_heads|num_kv_heads|pos_embed_max_size|estimates"
)
_POSITIVE_FLOATS = re.compile(r".*_eps|rope_theta|scaling_factor|shift|alpha")


def _check_numbers(config: Any) -> None:
    """Raises a DeepGenError unless every number of a configuration is in its range."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if isinstance(number, float):
                low, high = (5e-324 if _POSITIVE_FLOATS.fullmatch(item.name) else -math.inf), 1e30
            else:
                low = 0 if _MAY_BE_ZERO.fullmatch(item.name) or isinstance(value, tuple) else 1
                high = _MAX_COUNT if _COUNTS.fullmatch(item.name) else _MAX_SIZE
            if not low <= number <= high or number == -math.inf:
                bounds = f"{max(low, 0):g} to {high:g}" if isinstance(number, int) else "a finite number in its range"
                raise DeepGenError(f"config: {item.name} is {number}; it must be {bounds}")


def _check_heads(config: Any, *names: str) -> None:
    """Raises a DeepGenError unless the hidden size can be split into heads."""
    for name in names:
        if config.hidden_size % getattr(config, name):
            raise DeepGenError(
                f"config: hidden_size {config.hidden_size} cannot be split into {getattr(config, name)} heads ({name})"
            )


@dataclass(frozen=True)
class TextConfig:
    """Qwen2.5-VL language model (decoder only, M-RoPE, grouped-query attention)."""

    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_layers: int = 36
    num_heads: int = 16
    num_kv_heads: int = 2
    vocab_size: int = 151936
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_sections: tuple[int, ...] = (16, 24, 24)
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 128000
    pad_token_id: int = 151643
    eos_token_id: int = 151645
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    image_token_id: int = 151655
    video_token_id: int = 151656

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_heads(self, "num_heads")
        if self.num_heads % self.num_kv_heads:
            raise DeepGenError(
                f"config: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}; it must be"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class VisionConfig:
    """Qwen2.5-VL vision tower (window attention with a few full-attention blocks, 2-D rotary positions)."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    full_attention_blocks: tuple[int, ...] = (7, 15, 23, 31)
    out_hidden_size: int = 2048
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_heads(self, "num_heads")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch, (channels, time, height, width) order."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class BridgeConfig:
    """Think tokens, stacked-channel projector, connector encoder and the two output heads.

    ``hidden_size`` is the connector's; think tokens and selected hidden states have the language model's width.
    """

    #: Think tokens; 0 for a model without.
    num_queries: int = 128
    hidden_size: int = 2048
    intermediate_size: int = 11946
    num_layers: int = 6
    num_heads: int = 32
    layer_norm_eps: float = 1e-6
    #: Every how many decoder layers, counted back from the last one used, a hidden state is selected.
    selection_stride: int = 6

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_heads(self, "num_heads")


@dataclass(frozen=True)
class MMDiTConfig:
    """SD3.5-Medium multimodal diffusion transformer."""

    num_layers: int = 24
    num_heads: int = 24
    head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    dual_attention_layers: tuple[int, ...] = tuple(range(13))
    pos_embed_max_size: int = 384
    sample_size: int = 128
    #: Velocities side by side in the output; more than 1 in a distilled model, see `deepgen_jax.flow.policy`.
    estimates: int = field(default=1, metadata=_RARE)

    def __post_init__(self) -> None:
        _check_numbers(self)

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKL with a spatial factor of ``2 ** (len(block_out_channels) - 1)``."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609
    sample_size: int = 1024
    force_upcast: bool = True

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not self.block_out_channels or any(width % self.norm_num_groups for width in self.block_out_channels):
            raise DeepGenError(
                f"config: block_out_channels {list(self.block_out_channels)} must be multiples of norm_num_groups "
                f"{self.norm_num_groups}"
            )

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class SchedulerConfig:
    """Flow-match Euler schedule; field names follow ``scheduler_config.json``."""

    num_train_timesteps: int = 1000
    shift: float = 3.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    def __post_init__(self) -> None:
        _check_numbers(self)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters kept beside the base weights; the update is ``alpha / rank * B A``."""

    rank: int = 64
    alpha: float = 128.0

    def __post_init__(self) -> None:
        _check_numbers(self)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


#: Storage types of 8-bit weights.
WEIGHT_FORMATS = ("int8", "fp8")


@dataclass(frozen=True)
class QuantizationConfig:
    """8-bit weights: see `deepgen_jax.models.quantized`.

    ``weights`` is "int8" or "fp8" (float8_e4m3fn). With ``products`` layers also round their inputs, so that matrix
    products run in 8 bits (W8A8).
    """

    weights: str = "int8"
    products: bool = False

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_FORMATS:
            raise DeepGenError(f"config: weights is {self.weights!r}; it must be {' or '.join(WEIGHT_FORMATS)}")


@dataclass(frozen=True)
class DeepGenConfig:
    """A whole model.

    ``lora`` is set where adapters are stored apart from the base weights, ``quantization`` where weights are 8-bit.
    """

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    mmdit: MMDiTConfig = field(default_factory=MMDiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    lora: LoRAConfig | None = None
    #: Longest prompt in tokens, think tokens and image tokens not counted (training cuts from the left).
    max_prompt_tokens: int = 1024
    #: Defaults of calls: classifier-free guidance scale, denoising steps, sampler, and side of an image in pixels
    #: (None: what the MMDiT was made for, at most 512).
    guidance_scale: float = 4.0
    num_inference_steps: int = field(default=50, metadata=_OPTIONAL)
    sampler: str = field(default="euler", metadata=_OPTIONAL)
    image_size: int | None = field(default=None, metadata=_OPTIONAL)
    #: A guidance scale above this ruins images, so that it is worth a warning; None where no such limit is known.
    max_guidance_scale: float | None = field(default=None, metadata=_OPTIONAL)
    quantization: QuantizationConfig | None = field(default=None, metadata=_OPTIONAL)

    def __post_init__(self) -> None:
        checks = [
            ("vision.out_hidden_size", self.vision.out_hidden_size, "text.hidden_size", self.text.hidden_size),
            (
                "mmdit.hidden_size",
                self.mmdit.hidden_size,
                "mmdit.caption_projection_dim",
                self.mmdit.caption_projection_dim,
            ),
            ("mmdit.in_channels", self.mmdit.in_channels, "vae.latent_channels", self.vae.latent_channels),
        ]
        _check_numbers(self)
        if self.lora is not None and self.quantization is not None:
            raise DeepGenError("config: lora and quantization are both set; 8-bit weights have adapters merged")
        if not 0 <= self.guidance_scale < math.inf:
            raise DeepGenError(f"config: guidance_scale is {self.guidance_scale}; it must be 0 or more")
        if self.num_inference_steps < 1:
            raise DeepGenError(f"config: num_inference_steps is {self.num_inference_steps}; it must be 1 or more")
        if self.image_size is not None and (self.image_size < 1 or self.image_size % self.image_multiple):
            raise DeepGenError(
                f"config: image_size is {self.image_size}; it must be a multiple of {self.image_multiple}"
            )
        for name, value, other, expected in checks:
            if value != expected:
                raise DeepGenError(f"config: {name} is {value}, but {other} is {expected}; they must be equal")

    @property
    def image_multiple(self) -> int:
        """Image sides in pixels are multiples of this (latent patches and 28/32 VLM patches both come out whole)."""
        return 2 * self.vae.downscale * self.mmdit.patch_size

    @property
    def default_side(self) -> int:
        """Side in pixels of square images whose size is not given."""
        if self.image_size is not None:
            return self.image_size
        side = min(DEFAULT_SIDE, self.mmdit.sample_size * self.vae.downscale)
        return max(self.image_multiple, side // self.image_multiple * self.image_multiple)

    @property
    def few_step(self) -> bool:
        """Whether it was distilled to a policy of ``num_inference_steps`` evaluations, which takes no other number."""
        return self.mmdit.estimates > 1 or self.sampler == FEW_STEP_SAMPLER

    def guidance(self, asked: float | None) -> float:
        """Classifier-free guidance scale of a call: the one asked for, or the model's default."""
        return self.guidance_scale if asked is None else asked


def to_dict(config: Any) -> dict[str, Any]:
    """A JSON-ready dict of a config dataclass; rare fields are left out at their default."""
    values = dataclasses.asdict(config)
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.metadata.get("rare") and value == item.default:
            del values[item.name]
        elif dataclasses.is_dataclass(value):
            values[item.name] = to_dict(value)
    return values


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config.json") -> T:
    """Builds dataclass ``cls`` from parsed JSON; unknown or missing names are errors, except missing optional fields.

    Raises:
      DeepGenError: a name is unknown, missing, or its value has the wrong type.
    """
    if not isinstance(values, dict):
        raise DeepGenError(f"{where}: {cls.__name__} is {values!r}, expected a JSON object")
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = {f.name for f in fields}
    required = {f.name for f in fields if not f.metadata.get("optional")}
    unknown, missing = sorted(set(values) - names), sorted(required - set(values))
    if unknown or missing:
        detail = "; ".join(
            f"{label}: {', '.join(items)}" for label, items in (("unknown", unknown), ("missing", missing)) if items
        )
        raise DeepGenError(f"{where}: fields of {cls.__name__} do not match ({detail}); convert the model again")
    parsed = {k: _parse(hints[k], v, f"{where}: {k}") for k, v in values.items()}
    try:
        return cls(**parsed)
    except DeepGenError as error:
        raise DeepGenError(f"{where}: {error}") from None


def _parse(hint: Any, value: Any, where: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or not all(type(item) is int for item in value):
            raise DeepGenError(f"{where} is {value!r}, expected a list of integers")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise DeepGenError(f"{where} is {value!r}, expected {hint.__name__}")
    return value
