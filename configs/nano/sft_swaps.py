"""Stage 2 of DeepGen-nano, twelfth round: the mixture of the eleventh with more words replaced on signs."""

from dataclasses import replace

from deepgen_jax.configs.nano import sft_names, world_sources
from deepgen_jax.training.run_config import SupervisedConfig

_SOURCES = world_sources(
    ("words", "t2i", "text", 0.35),
    ("pairs", "t2i", "relation+two+count", 0.3),
    ("world", "t2i", "", 0.35),
    ("colours", "edit", "recolour,things=3", 0.3),
    ("colours_on_grey", "edit", "recolour,background=grey", 0.08),
    ("by_shape", "edit", "recolour+remove+move,named=shape", 0.17),
    ("removals", "edit", "remove,things=3", 0.12),
    ("edits", "edit", "move+multi_step", 0.13),
    ("additions", "edit", "add", 0.03),
    ("word_changes", "edit", "replace_word", 0.17),
)


def get_config() -> SupervisedConfig:
    """48 samples a step and the noise of the rounds before."""
    config = sft_names.get_config()
    return replace(
        config,
        start="out/nano/sft_names",
        out="out/nano/sft_swaps",
        # Another order again.
        data=replace(config.data, sources=_SOURCES, seed=9),
    )
