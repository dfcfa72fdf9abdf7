"""Releases of random weights, for trying things out, for tests and for measuring at full size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
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
from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import require_space

from .conversion import DTYPES
from .initial_bridge import keyed_rng
from .lazy_params import BLOCK_BYTES
from .names import Weight, weights
from .output import staged
from .progress import progress_bar
from .release import ReleaseWriter
from .tensor_files import nbytes, parse_size, write_json

#: The pattern by which Qwen2's tokenizer splits text into words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = 256
#: Keeps pixels of a random decoder within their range.
_DECODER_GAIN = 0.25
#: The last layers of residual branches, by part, start small: such networks learn much faster, and models that are
#: tried out by training them do.
_BRANCH_GAIN = 0.1
_BRANCH_ENDS = {
    "bridge": ("out_proj", "fc2"), "mmdit": ("to_out", "add_out", "fc2"), "vae": ("conv2", "to_out"),
}  # fmt: skip
#: Of models that are to be trained: layers of the MMDiT that make scales, shifts and gates, and its last one, which
#: start small, and the logarithm of the variance of latents.
_MODULATION = ("norm1", "norm1_context", "norm_out", "proj_out")
_LOGVAR = -4.0


def tiny_config() -> DeepGenConfig:
    """A model with every feature of the real one, about 0.7 M parameters, with a byte vocabulary."""
    text = TextConfig(
        hidden_size=32, intermediate_size=48, num_layers=12, num_heads=4, num_kv_heads=2, vocab_size=264,
        mrope_sections=(1, 1, 2), tie_word_embeddings=True, max_position_embeddings=4096, pad_token_id=_BYTES,
        eos_token_id=_BYTES + 2, vision_start_token_id=_BYTES + 3, vision_end_token_id=_BYTES + 4,
        image_token_id=_BYTES + 5, video_token_id=_BYTES + 6,
    )  # fmt: skip
    return DeepGenConfig(
        text=text,
        vision=VisionConfig(
            depth=4, hidden_size=32, intermediate_size=48, num_heads=4, full_attention_blocks=(1, 3), out_hidden_size=32
        ),
        bridge=BridgeConfig(num_queries=16, hidden_size=32, intermediate_size=56, num_layers=2, num_heads=4),
        mmdit=MMDiTConfig(
            num_layers=4, num_heads=4, head_dim=24, joint_attention_dim=40, caption_projection_dim=96,
            pooled_projection_dim=24, dual_attention_layers=(0, 1), pos_embed_max_size=64, sample_size=32,
        ),
        vae=VAEConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=4),
    )  # fmt: skip


def write_release(
    folder: str | Path,
    config: DeepGenConfig,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    scheduler: SchedulerConfig | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    merges: Sequence[tuple[str, str]] = (),
    for_training: bool = False,
) -> Path:
    """Writes a diffusers release of random weights, one tensor at a time, with a tokenizer.

    Weights are normal with a standard deviation of 1/sqrt(inputs), a tenth of it at the end of residual branches
    outside the VLM; norms are the identity and biases zero. So activations stay of order one, and the model can be
    trained. Equal arguments give equal files.

    Args:
      folder: the folder to write; it appears when everything is written, or not at all.
      config: sizes. Its special tokens must have ids from 256 + merges on, and ``pad_token_id + 1`` must be free.
      seed: of the weights.
      dtype: "bfloat16" or "float32".
      scheduler: the sampling schedule; that of the released model by default.
      max_shard_size: of the safetensors files.
      overwrite: replace ``folder``.
      merges: of the tokenizer's byte pairs; without any its tokens are single bytes.
      for_training: for models to be trained. The MMDiT's table of positions, which never trains, is
        that of the released model's kind; its modulation starts small; and latents start with little noise.

    Raises:
      DeepGenError: an argument is unusable, or ``folder`` exists.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise DeepGenError(f"dtype {dtype} is unknown; use {' or '.join(DTYPES)}")
    table = weights(config)
    specs = {key: jax.ShapeDtypeStruct(weight.shape, DTYPES[dtype]) for key, weight in table.items()}
    total = sum(map(nbytes, specs.values()))
    with staged(folder, overwrite=overwrite) as partial, progress_bar(total, "writing") as progress:
        require_space(folder, total)
        partial.mkdir()
        write_tokenizer(partial / "tokenizer", config.text, merges)
        writer = ReleaseWriter(partial, config, scheduler or SchedulerConfig(), specs, parse_size(max_shard_size))
        try:
            for weight in table.values():
                blocks: Iterable[np.ndarray] = _random_rows(weight, seed, DTYPES[dtype])
                if for_training:
                    blocks = _for_training(weight, config, blocks)
                for rows in blocks:
                    writer.add(weight.key, rows)
                    progress(rows.nbytes)
        finally:
            writer.close()
    return folder


def _random_rows(weight: Weight, seed: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """A tensor's values, as blocks of rows of its last axis."""
    rng = keyed_rng(seed, weight.key)
    columns = weight.shape[-1]
    rows = math.prod(weight.shape[:-1])
    block = max(1, BLOCK_BYTES // (4 * columns))
    for start in range(0, rows, block):
        shape = (min(block, rows - start), columns)
        name = weight.path[-1]
        if name in ("scale", "bias"):
            yield np.full(shape, float(name == "scale"), dtype)
            continue
        values = rng.standard_normal(shape, np.float32)
        values *= np.float32(_deviation(weight))
        yield values.astype(dtype)


def _for_training(weight: Weight, config: DeepGenConfig, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """A tensor's blocks of rows, changed where a network learns faster from other values."""
    for rows in blocks:
        if weight.path[-1] == "pos_embed":
            yield _positions(config.mmdit).astype(rows.dtype).reshape(rows.shape)
        elif weight.path[0] == "mmdit" and weight.path[-2] in _MODULATION:
            yield rows * rows.dtype.type(_BRANCH_GAIN)
        elif weight.path[-3:] == ("encoder", "conv_out", "bias"):
            # The second half of the channels is the logarithm of the posterior's variance.
            half = np.arange(rows.shape[-1]) >= rows.shape[-1] // 2
            yield np.where(half, rows.dtype.type(_LOGVAR), rows)
        else:
            yield rows


def _positions(config: MMDiTConfig) -> np.ndarray:
    """Sine and cosine table of all patches, float32 [max_size^2, hidden]."""
    from deepgen_jax.models.patches import sincos_table

    base = config.sample_size // config.patch_size
    return np.asarray(sincos_table(config.pos_embed_max_size, base, config.hidden_size))


def _deviation(weight: Weight) -> float:
    """Standard deviation of a weight."""
    if weight.path[-1] in ("pos_embed", "embedding"):
        return 0.5
    deviation = math.prod(weight.shape[1:]) ** -0.5
    if weight.path[-3:-1] == ("decoder", "conv_out"):
        return _DECODER_GAIN * deviation
    return _BRANCH_GAIN * deviation if weight.path[-2] in _BRANCH_ENDS.get(weight.path[0], ()) else deviation


def write_tokenizer(folder: Path, config: TextConfig, merges: Sequence[tuple[str, str]] = ()) -> None:
    """A Qwen2 tokenizer: bytes of UTF-8, then what merges make of them; special tokens have the configuration's ids.

    Raises:
      DeepGenError: the special tokens' ids collide with those of others or with each other, or exceed the vocabulary.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    special = {
        "<|endoftext|>": config.pad_token_id,
        "<|im_start|>": config.pad_token_id + 1,
        "<|im_end|>": config.eos_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
    }
    ids = list(special.values())
    usual = _BYTES + len(merges)
    if min(ids) < usual or max(ids) >= config.vocab_size or len(set(ids)) < len(ids):
        raise DeepGenError(
            f"the special tokens' ids {sorted(ids)} must be different, from {usual} on and below "
            f"text.vocab_size={config.vocab_size}"
        )
    tokens = [*sorted(ByteLevel.alphabet()), *(left + right for left, right in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [f"{left} {right}" for left, right in merges]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for token, number in special.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": {**byte_level, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {**vocabulary, **special}, "merges": pairs,
        },
    }  # fmt: skip
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): {"content": token, **flags} for token, number in special.items()},
        "additional_special_tokens": list(special)[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, **special}, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
