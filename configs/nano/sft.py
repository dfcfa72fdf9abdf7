"""Stage 2 of DeepGen-nano: edits join; bridge, MMDiT and adapters on the VLM learn; `rounds.py` continues from it."""

from dataclasses import replace

from deepgen_jax.configs.nano import pretrain, world_data
from deepgen_jax.training.run_config import AdapterConfig, SupervisedConfig


def get_config() -> SupervisedConfig:
    """Two images per edit, 48 samples a step; only edits that change one thing."""
    config = pretrain.get_config()
    return replace(
        config,
        start="out/nano/pretrain",
        out="out/nano/sft",
        steps=3000,
        trains=("bridge", "mmdit", "lora"),
        lora=AdapterConfig(rank=16, alpha=32, dropout=0.05),
        optimizer=replace(config.optimizer, learning_rate=2.5e-3, schedule="cosine"),
        noise_shift=3.0,
        # Captions fit into four times 14 tokens, instructions with their pictures into five.
        data=replace(world_data(16, changes="recolour+move+remove+add"), token_multiple=14),
        accumulation=3,
    )
