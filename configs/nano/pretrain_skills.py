"""Stage 1 of DeepGen-nano, last round: all skills but signs."""

from dataclasses import replace

from deepgen_jax.configs.nano import caption_data, pretrain
from deepgen_jax.training.config import SampleConfig, SupervisedConfig


def get_config() -> SupervisedConfig:
    """Nearer to the noise levels of sampling."""
    return replace(
        pretrain.get_config(),
        start="out/nano/vae_colours",
        out="out/nano/pretrain_skills",
        steps=3300,
        noise_shift=5.0,
        data=caption_data(32, "single+two+relation+count+reasoning"),
        samples=SampleConfig(every=0),
    )
