"""Stage 1 of DeepGen-nano, first round: single things and relations, where captions leave least open."""

from dataclasses import replace

from deepgen_jax.configs.nano import caption_data, pretrain
from deepgen_jax.training.run_config import SupervisedConfig


def get_config() -> SupervisedConfig:
    """More noise than later, so that the text is looked at: nothing else tells what a picture of noise shows."""
    config = pretrain.get_config()
    return replace(
        config,
        start="out/nano/language",
        out="out/nano/pretrain_relations",
        steps=430,
        optimizer=replace(config.optimizer, warmup=50),
        noise_shift=6.0,
        data=caption_data(64, "single+relation"),
    )
