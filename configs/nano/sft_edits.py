"""Stage 2 of DeepGen-nano, fourth round: two edits to one picture, most of them changes and removals."""

from dataclasses import replace

from deepgen_jax.configs.nano import sft_words, world_sources
from deepgen_jax.data.data_config import MixtureConfig
from deepgen_jax.training.run_config import SupervisedConfig

_SOURCES = world_sources(
    ("words", "t2i", "text", 0.5),
    ("relations", "t2i", "relation", 0.15),
    ("world", "t2i", "", 0.35),
    ("colours", "edit", "recolour", 0.42),
    ("removals", "edit", "remove", 0.22),
    ("edits", "edit", "add+move+multi_step", 0.36),
)


def get_config() -> SupervisedConfig:
    """48 samples a step as before; the learning rate rises and falls once more."""
    config = sft_words.get_config()
    return replace(
        config,
        start="out/nano/sft_words",
        out="out/nano/sft_edits",
        steps=2000,
        # Another order, so that other samples come first than in the round before.
        data=replace(
            config.data,
            sources=_SOURCES,
            micro_batch=16,
            mixture=MixtureConfig(cycle=("t2i", "edit", "edit")),
            seed=1,
        ),
        accumulation=3,
    )
