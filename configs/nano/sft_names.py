"""Stage 2 of DeepGen-nano, eleventh round: things that are named by their shape or their colour alone.

An edit that goes wrong mostly changes another thing than the one that was named, above all where one word names it.
"""

from dataclasses import replace

from deepgen_jax.configs.nano import sft_scenes, world_sources
from deepgen_jax.training.run_config import SupervisedConfig

_SOURCES = world_sources(
    ("words", "t2i", "text", 0.3),
    ("pairs", "t2i", "relation+two+count", 0.3),
    ("world", "t2i", "", 0.4),
    ("colours", "edit", "recolour,things=3", 0.28),
    ("colours_on_grey", "edit", "recolour,background=grey", 0.1),
    ("by_shape", "edit", "recolour+remove+move,named=shape", 0.18),
    ("removals", "edit", "remove,things=3", 0.14),
    ("edits", "edit", "move+multi_step", 0.14),
    ("additions", "edit", "add", 0.03),
    ("word_changes", "edit", "replace_word", 0.13),
)


def get_config() -> SupervisedConfig:
    """48 samples a step and the noise of the rounds before."""
    config = sft_scenes.get_config()
    return replace(
        config,
        start="out/nano/sft_scenes",
        out="out/nano/sft_names",
        # Another order again.
        data=replace(config.data, sources=_SOURCES, seed=8),
    )
