"""Stage 1 of DeepGen-nano, second round: as the first, with smaller steps of less noise."""

from dataclasses import replace

from deepgen_jax.configs.nano import caption_data, pretrain
from deepgen_jax.training.run_config import SupervisedConfig


def get_config() -> SupervisedConfig:
    """32 samples a step."""
    return replace(
        pretrain.get_config(),
        start="out/nano/pretrain_relations",
        out="out/nano/pretrain_relations_long",
        steps=558,
        noise_shift=5.0,
        data=caption_data(32, "single+relation"),
    )
