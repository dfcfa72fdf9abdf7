"""Stage 1 of DeepGen-nano, third round: pairs and counts join."""

from dataclasses import replace

from deepgen_jax.configs.nano import caption_data, pretrain
from deepgen_jax.training.run_config import SupervisedConfig


def get_config() -> SupervisedConfig:
    """48 samples a step; captions of these skills are a little shorter than those of signs."""
    return replace(
        pretrain.get_config(),
        start="out/nano/pretrain_relations_long",
        out="out/nano/pretrain_counts",
        steps=824,
        data=replace(caption_data(48, "single+relation+two+count"), token_multiple=52),
    )
