"""Stage 2 of DeepGen-nano, tenth round: pictures of three things, where most changes still go wrong.

The world says still more in other words, so that texts are longer, with the tokenizer of the package above all.
"""

from dataclasses import replace

from deepgen_jax.configs.nano import sft_changes, world_sources
from deepgen_jax.training.run_config import SupervisedConfig

_SOURCES = world_sources(
    ("words", "t2i", "text", 0.3),
    ("pairs", "t2i", "relation+two+count", 0.3),
    ("world", "t2i", "", 0.4),
    ("colours", "edit", "recolour,things=3", 0.34),
    ("colours_on_grey", "edit", "recolour,background=grey", 0.12),
    ("by_shape", "edit", "recolour+remove+move,named=shape", 0.1),
    ("removals", "edit", "remove,things=3", 0.14),
    ("edits", "edit", "move+multi_step", 0.14),
    ("additions", "edit", "add", 0.03),
    ("word_changes", "edit", "replace_word", 0.13),
)


def get_config() -> SupervisedConfig:
    """48 samples a step and the noise of the rounds before."""
    config = sft_changes.get_config()
    return replace(
        config,
        start="out/nano/sft_changes",
        out="out/nano/sft_scenes",
        steps=1300,
        # Another order again. Nearly all texts fit into twice and three times 28 tokens.
        data=replace(config.data, sources=_SOURCES, token_multiple=28, seed=7),
    )
