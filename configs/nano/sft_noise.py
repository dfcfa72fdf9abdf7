"""Stage 2 of DeepGen-nano, sixth round: nearly all noise, where the text and the source must tell what comes."""

from dataclasses import replace

from deepgen_jax.configs.nano import sft_colours, world_sources
from deepgen_jax.training.run_config import SupervisedConfig

_SOURCES = world_sources(
    ("words", "t2i", "text", 0.35),
    ("relations", "t2i", "relation", 0.15),
    ("world", "t2i", "", 0.5),
    ("colours", "edit", "recolour", 0.42),
    ("removals", "edit", "remove", 0.14),
    ("edits", "edit", "add+move+multi_step", 0.32),
    ("word_changes", "edit", "replace_word", 0.12),
)


def get_config() -> SupervisedConfig:
    """48 samples a step as before; four fifths of the noise levels are above 0.9, in the rounds before one in seven."""
    config = sft_colours.get_config()
    return replace(
        config,
        start="out/nano/sft_colours",
        out="out/nano/sft_noise",
        steps=1500,
        noise_shift=20.0,
        # Another order again.
        data=replace(config.data, sources=_SOURCES, seed=3),
    )
