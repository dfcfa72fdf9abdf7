"""Stage 2 of DeepGen-nano, second round: the learning rate rises and falls once more."""

from dataclasses import replace

from deepgen_jax.configs.nano import sft
from deepgen_jax.training.run_config import SupervisedConfig


def get_config() -> SupervisedConfig:
    """As the first round, which ran in a world whose captions left size and background to chance."""
    return replace(sft.get_config(), start="out/nano/sft", out="out/nano/sft_long", steps=3700)
