"""Stage 2 of DeepGen-nano, sixth round, a short one: half of the edits on grey, where shapes are lost most."""

from dataclasses import replace

from deepgen_jax.configs.nano import sft_colours, world_sources
from deepgen_jax.training.config import SupervisedConfig

_SOURCES = (
    *world_sources(
        ("words", "t2i", "text", 0.35),
        ("relations", "t2i", "relation", 0.15),
        ("world", "t2i", "", 0.5),
        ("colours", "edit", "recolour", 0.27),
        ("edits", "edit", "remove+add+move+multi_step", 0.23),
    ),
    *world_sources(
        ("colours on grey", "edit", "recolour", 0.3),
        ("edits on grey", "edit", "remove+add+move+multi_step", 0.2),
        background="grey",
    ),
)


def get_config() -> SupervisedConfig:
    """48 samples a step as before, at half the learning rate."""
    config = sft_colours.get_config()
    return replace(
        config,
        start="out/nano/sft_colours",
        out="out/nano/sft_grey",
        steps=450,
        optimizer=replace(config.optimizer, learning_rate=1e-3),
        data=replace(config.data, sources=_SOURCES, seed=3),
    )
