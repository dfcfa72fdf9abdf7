"""Stage 2 of DeepGen-nano, third round: the edits that were left out join, and every second sample is an edit.

What comes out right less often than the rest comes more often: words, relations, changes of colour.
"""

from dataclasses import replace

from deepgen_jax.configs.nano import sft, world_sources
from deepgen_jax.data.data_config import MixtureConfig
from deepgen_jax.training.run_config import SupervisedConfig

_SOURCES = world_sources(
    ("words", "t2i", "text", 0.5),
    ("relations", "t2i", "relation", 0.15),
    ("world", "t2i", "", 0.35),
    ("colours", "edit", "recolour", 0.3),
    ("places", "edit", "move+remove", 0.26),
    ("edits", "edit", "add+replace_word+multi_step+reference", 0.44),
)


def get_config() -> SupervisedConfig:
    """48 samples a step as before; the learning rate rises and falls once more."""
    config = sft.get_config()
    return replace(
        config,
        start="out/nano/sft_long",
        out="out/nano/sft_words",
        steps=1800,
        optimizer=replace(config.optimizer, learning_rate=2e-3),
        data=replace(config.data, sources=_SOURCES, micro_batch=24, mixture=MixtureConfig(cycle=("t2i", "edit"))),
        accumulation=2,
    )
