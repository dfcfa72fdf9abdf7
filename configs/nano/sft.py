"""Stage 2 of DeepGen-nano: edits join; bridge, DiT and adapters on the VLM learn."""

from dataclasses import replace

from deepgen_jax.configs.nano import pretrain, world_data
from deepgen_jax.training.config import AdapterConfig, CheckpointConfig, SampleConfig, SupervisedConfig
from deepgen_jax.training.optimizer import OptimizerConfig


def get_config() -> SupervisedConfig:
    """As many pictures as edits, 16 of each a step."""
    return replace(
        pretrain.get_config(),
        start="out/nano/pretrain_things",
        out="out/nano/sft",
        steps=1200,
        trains=("bridge", "mmdit", "lora"),
        lora=AdapterConfig(rank=16, alpha=32, dropout=0.05),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, warmup=50, weight_decay=0.01),
        noise_shift=4.0,
        # Captions fit into three times 17 tokens, instructions with their pictures into four.
        data=replace(world_data(16, ("t2i", "edit")), token_multiple=17),
        accumulation=2,
        checkpoints=CheckpointConfig(every=200),
        samples=SampleConfig(every=0),
    )
