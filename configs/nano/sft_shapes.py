"""Stage 2 of DeepGen-nano, eighth round: outlines of the source, where colours do not give them away.

On grey, a thing may be darker or brighter than what is behind it, so that its latents tell its outline only together
with its colour; and "the square" must be found by its outline. Two edits to one picture, many of them of these kinds.
"""

from dataclasses import replace

from deepgen_jax.configs.nano import sft_phrases, world_sources
from deepgen_jax.data.data_config import MixtureConfig
from deepgen_jax.training.run_config import SupervisedConfig

_SOURCES = world_sources(
    ("words", "t2i", "text", 0.3),
    ("pairs", "t2i", "relation+two+count", 0.3),
    ("world", "t2i", "", 0.4),
    ("colours", "edit", "recolour", 0.12),
    ("colours_on_grey", "edit", "recolour,background=grey", 0.3),
    ("by_shape", "edit", "recolour+remove+move,named=shape", 0.2),
    ("removals", "edit", "remove", 0.08),
    ("edits", "edit", "move+multi_step", 0.2),
    ("additions", "edit", "add", 0.04),
    ("word_changes", "edit", "replace_word", 0.06),
)


def get_config() -> SupervisedConfig:
    """48 samples a step and the noise of the two rounds before."""
    config = sft_phrases.get_config()
    return replace(
        config,
        start="out/nano/sft_phrases",
        out="out/nano/sft_shapes",
        steps=1000,
        # Another order again.
        data=replace(
            config.data,
            sources=_SOURCES,
            micro_batch=16,
            mixture=MixtureConfig(cycle=("t2i", "edit", "edit")),
            seed=5,
        ),
        accumulation=3,
    )
