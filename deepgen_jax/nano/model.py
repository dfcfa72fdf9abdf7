"""DeepGen-nano: the same architecture at small width, for the procedural world; its sizes and its untrained folder."""

from __future__ import annotations

import json
import random
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

from deepgen_jax.config import (
    BridgeConfig,
    DeepGenConfig,
    MMDiTConfig,
    TextConfig,
    VAEConfig,
    VisionConfig,
)
from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.model_folder import locate, read_manifest

#: Parts of the bridge that ablations leave out.
Ablation = Literal["think_tokens", "stacked_channels"]
#: Folders of a release that do not depend on bridge and DiT.
_ENCODERS = ("vlm", "vae", "tokenizer")
#: Side of pictures in pixels.
SIZE = 96
#: Tokens: bytes, merges and 7 special ones.
_VOCABULARY, _SPECIAL = 860, 7
#: Samples of each task whose texts train the tokenizer.
_TEXTS = 6000
#: Longest token in bytes: an English word or three Chinese characters, so that no token is a whole phrase.
_LONGEST_TOKEN = 11


def nano_config(without: Collection[Ablation] = ()) -> DeepGenConfig:
    """Sizes of DeepGen-nano: all six selected layers, dual attention and references, about 7 M parameters.

    Args:
      without: parts that the bridge lacks: think tokens, or all selected layers but the deepest.
    """
    first, layers = _VOCABULARY - _SPECIAL, 7
    queries = 0 if "think_tokens" in without else 16
    # A stride of all layers selects only the last one.
    stride = layers - 1 if "stacked_channels" in without else 1
    text = TextConfig(
        hidden_size=128, intermediate_size=352, num_layers=layers, num_heads=4, num_kv_heads=2, vocab_size=_VOCABULARY,
        mrope_sections=(4, 6, 6), tie_word_embeddings=True, max_position_embeddings=4096, pad_token_id=first,
        eos_token_id=first + 2, vision_start_token_id=first + 3, vision_end_token_id=first + 4,
        image_token_id=first + 5, video_token_id=first + 6,
    )  # fmt: skip
    return DeepGenConfig(
        text=text,
        vision=VisionConfig(
            depth=4, hidden_size=96, intermediate_size=256, num_heads=4, full_attention_blocks=(1, 3),
            out_hidden_size=128,
        ),
        bridge=BridgeConfig(
            num_queries=queries, hidden_size=128, intermediate_size=384, num_layers=2, num_heads=4,
            selection_stride=stride,
        ),
        mmdit=MMDiTConfig(
            num_layers=6, num_heads=4, head_dim=32, joint_attention_dim=128, caption_projection_dim=128,
            pooled_projection_dim=128, dual_attention_layers=(0, 1, 2), pos_embed_max_size=16,
            sample_size=SIZE // 8,
        ),
        # One norm group: with few channels a group, a plain background would lose everything but its sign.
        vae=VAEConfig(block_out_channels=(16, 16, 32, 64), layers_per_block=1, norm_num_groups=1, sample_size=SIZE),
        max_prompt_tokens=128, guidance_scale=1.0, num_inference_steps=4, image_size=SIZE, max_guidance_scale=2.0,
    )  # fmt: skip


def write_untrained(
    out: Path,
    *,
    seed: int = 0,
    without: Collection[Ablation] = (),
    encoders: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the model folder of DeepGen-nano with random weights and its tokenizer, as the start of training.

    Args:
      out: the folder to write; it appears when everything is written, or not at all.
      seed: of the weights.
      without: as of :func:`nano_config`.
      encoders: a trained nano, whose VLM, autoencoder and tokenizer are taken: bridge and DiT alone are random.
      overwrite: replace ``out``.

    Raises:
      DeepGenError: ``out`` exists or cannot be written, or ``encoders`` is no nano.
    """
    from deepgen_jax.convert import convert
    from deepgen_jax.convert.exporting import export
    from deepgen_jax.convert.random_release import write_release

    if out.exists() and not overwrite:
        raise DeepGenError(f"{out} exists; choose another --out or pass --overwrite")
    config = nano_config(without)
    if encoders is not None:
        _check_encoders(encoders, config)
    with tempfile.TemporaryDirectory() as folder:
        release = Path(folder) / "release"
        write_release(
            release, config, seed=seed, dtype="float32", merges=learn_merges() if encoders is None else (),
            for_training=True,
        )  # fmt: skip
        if encoders is not None:
            trained = export(encoders, "diffusers", Path(folder) / "trained", dtype="float32")
            for part in _ENCODERS:
                shutil.rmtree(release / part)
                shutil.move(trained / part, release / part)
        convert(diffusers=release, out=out, overwrite=overwrite)


def _check_encoders(model: str | Path, config: DeepGenConfig) -> None:
    """Raises DeepGenError if the model's VLM or autoencoder is not of the sizes of ``config``."""
    found = read_manifest(locate(model)).config
    if (found.text, found.vision, found.vae) != (config.text, config.vision, config.vae):
        raise DeepGenError(f"{model} is not of nano's sizes; name a nano, or leave --encoders out")


def learn_merges() -> list[tuple[str, str]]:
    """Byte pairs of the tokenizer, learned from captions, instructions and questions of the world; always the same.

    Words on signs are left out: they are spelled letter by letter, as they are drawn.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from deepgen_jax.convert.random_release import WORDS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY - _SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False, max_token_length=_LONGEST_TOKEN,
    )  # fmt: skip
    tokenizer.train_from_iterator(_texts(), trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def _texts() -> Iterator[str]:
    from deepgen_jax.data.tokens import format_prompt
    from deepgen_jax.nano.samples import TASK_SKILLS, make_sample
    from deepgen_jax.nano.world.questions import ask

    for task in TASK_SKILLS:
        for index in range(_TEXTS):
            sample = make_sample("train", task, seed=0, index=index)
            # In the template, instructions and questions follow pictures.
            question, picture = ask(random.Random(index), sample), None if task == "t2i" else ()
            for text in (format_prompt(sample.text, picture), format_prompt(question, ())):
                yield re.sub(r"<\|\w+\|>", "", re.sub('"[^"]*"|[A-Z]{2,}', '""', text))
