"""Stage 1 of DeepGen-nano, third round: one or two things with their places, where captions tell most."""

from dataclasses import replace

from deepgen_jax.configs.nano import pretrain, world_data
from deepgen_jax.training.config import SupervisedConfig


def get_config() -> SupervisedConfig:
    """As before, of two skills, and longer."""
    config = pretrain.get_config()
    data = replace(world_data(32, ("t2i",), skills="single+relation"), token_multiple=52)
    return replace(
        config, start="out/nano/pretrain", out="out/nano/pretrain_things", steps=3900, data=data, noise_shift=10.0
    )
