"""Stage 2 of DeepGen-nano, fifth round: two edits to one picture again, half of them changes of colour."""

from dataclasses import replace

from deepgen_jax.configs.nano import sft_edits, world_sources
from deepgen_jax.training.run_config import SupervisedConfig

_SOURCES = world_sources(
    ("words", "t2i", "text", 0.35),
    ("relations", "t2i", "relation", 0.15),
    ("world", "t2i", "", 0.5),
    ("colours", "edit", "recolour", 0.5),
    ("removals", "edit", "remove", 0.15),
    ("edits", "edit", "add+move+multi_step", 0.35),
)


def get_config() -> SupervisedConfig:
    """48 samples a step as before; the learning rate rises and falls once more."""
    config = sft_edits.get_config()
    return replace(
        config,
        start="out/nano/sft_edits",
        out="out/nano/sft_colours",
        steps=1400,
        # Another order again.
        data=replace(config.data, sources=_SOURCES, seed=2),
    )
