"""Stage 2 on a tiny model and a dozen drawn pictures, after `tiny_pretrain.py`.

145 s of CPU time, most of it for compiling; much less when the programs are cached.
`benchmarks/overfit.py` trains longer, until the model reproduces the pictures.
"""

from deepgen_jax.configs.tiny_vae import MIXTURE, SOURCES
from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import AdapterConfig, CheckpointConfig, SampleConfig, SupervisedConfig


def get_config() -> SupervisedConfig:
    """60 steps of 8 samples; bridge, DiT and adapters learn."""
    return SupervisedConfig(
        model="out/tiny",
        start="out/runs/tiny_pretrain",
        out="out/runs/tiny_sft",
        steps=60,
        trains=("bridge", "mmdit", "lora"),
        lora=AdapterConfig(rank=4, alpha=8, dropout=0.0),
        dtype="float32",
        remat="none",
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.05),
        data=DataConfig(
            sources=SOURCES,
            micro_batch=2,
            mixture=MIXTURE,
            image_size=32,
            min_side=16,
            text_drop=0.0,
            token_multiple=96,
        ),
        accumulation=4,
        checkpoints=CheckpointConfig(every=30),
        samples=SampleConfig(every=30, prompts=("a red circle on a white background",), size=32, num_inference_steps=4),
    )
