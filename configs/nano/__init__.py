"""All stages of DeepGen-nano, in order: vae, language, pretrain, sft, grpo; see docs/nano.md."""

from deepgen_jax.data.config import DataConfig, MixtureConfig, SourceConfig

#: Model folder that `deepgen nano init` writes.
MODEL = "out/nano/model"
#: 200,000 pictures and as many edits before the first comes again.
WORLD = "size=96,samples=200000,seed=0"
SOURCES = (SourceConfig("world", "synthetic", WORLD), SourceConfig("edits", "synthetic", WORLD, task="edit"))


def world_data(micro_batch: int) -> DataConfig:
    """Pictures and edits in turns; all prompts of one length, so that few programs are compiled."""
    return DataConfig(
        sources=SOURCES,
        micro_batch=micro_batch,
        mixture=MixtureConfig(cycle=("edit", "t2i")),
        image_size=96,
        token_multiple=72,
        threads=1,
    )
