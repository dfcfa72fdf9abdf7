"""Stage 1 of DeepGen-nano, last round: one or two things, at the noise levels of sampling, for their outlines."""

from dataclasses import replace

from deepgen_jax.configs.nano import caption_data, pretrain_skills
from deepgen_jax.training.config import SupervisedConfig


def get_config() -> SupervisedConfig:
    """As before, of two skills."""
    return replace(
        pretrain_skills.get_config(),
        start="out/nano/pretrain_skills",
        out="out/nano/pretrain_places",
        steps=1700,
        noise_shift=4.0,
        data=caption_data(32, "single+relation"),
    )
