"""Stage 2 of DeepGen-nano, ninth round: words replaced on signs, next to all other changes.

Words are drawn from captions, while edits that replace one hardly work: one edit in seven is of this kind here. Two
edits to one picture again.
"""

from dataclasses import replace

from deepgen_jax.configs.nano import sft_shapes, world_sources
from deepgen_jax.training.run_config import SupervisedConfig

_SOURCES = world_sources(
    ("words", "t2i", "text", 0.3),
    ("pairs", "t2i", "relation+two+count", 0.3),
    ("world", "t2i", "", 0.4),
    ("colours", "edit", "recolour", 0.3),
    ("colours_on_grey", "edit", "recolour,background=grey", 0.12),
    ("by_shape", "edit", "recolour+remove+move,named=shape", 0.14),
    ("removals", "edit", "remove", 0.12),
    ("edits", "edit", "move+multi_step", 0.14),
    ("additions", "edit", "add", 0.03),
    ("word_changes", "edit", "replace_word", 0.15),
)


def get_config() -> SupervisedConfig:
    """48 samples a step and the noise of the rounds before."""
    config = sft_shapes.get_config()
    return replace(
        config,
        start="out/nano/sft_shapes",
        out="out/nano/sft_changes",
        steps=1000,
        # Another order again.
        data=replace(config.data, sources=_SOURCES, seed=6),
    )
