"""Stage 1 of DeepGen-nano, third round: one or two things with their places, where captions tell most."""

from dataclasses import replace

from deepgen_jax.configs.nano import caption_data, pretrain
from deepgen_jax.training.config import SupervisedConfig


def get_config() -> SupervisedConfig:
    """As before, of two skills, and longer."""
    return replace(
        pretrain.get_config(),
        start="out/nano/pretrain",
        out="out/nano/pretrain_things",
        steps=3900,
        noise_shift=10.0,
        data=caption_data(32, "single+relation"),
    )
