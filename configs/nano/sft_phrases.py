"""Stage 2 of DeepGen-nano, seventh round: the same said in many more ways; as many pictures as edits."""

from dataclasses import replace

from deepgen_jax.configs.nano import sft_noise, world_sources
from deepgen_jax.data.data_config import MixtureConfig
from deepgen_jax.training.run_config import SupervisedConfig

_SOURCES = world_sources(
    ("words", "t2i", "text", 0.3),
    ("relations", "t2i", "relation+two", 0.3),
    ("world", "t2i", "", 0.4),
    ("colours", "edit", "recolour", 0.45),
    ("removals", "edit", "remove", 0.17),
    ("edits", "edit", "add+move+multi_step", 0.3),
    ("word_changes", "edit", "replace_word", 0.08),
)


def get_config() -> SupervisedConfig:
    """48 samples a step and the noise of the round before."""
    config = sft_noise.get_config()
    return replace(
        config,
        start="out/nano/sft_noise",
        out="out/nano/sft_phrases",
        steps=1600,
        # Another order again.
        data=replace(
            config.data, sources=_SOURCES, micro_batch=24, mixture=MixtureConfig(cycle=("t2i", "edit")), seed=4
        ),
        accumulation=2,
    )
