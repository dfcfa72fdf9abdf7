"""Stage 2 on a tiny model and a dozen drawn pictures, going on from `tiny_pretrain.py`: some seconds on a CPU."""

from deepgen_jax.data.config import DataConfig, SourceConfig
from deepgen_jax.training.config import AdapterConfig, CheckpointConfig, SampleConfig, SupervisedConfig
from deepgen_jax.training.optimizer import OptimizerConfig

SOURCES = (
    SourceConfig("pictures", "json", "out/example/t2i.json"),
    SourceConfig("edits", "json", "out/example/edit.json", task="edit"),
)


def get_config() -> SupervisedConfig:
    """30 steps of 12 samples; bridge, DiT and adapters learn."""
    return SupervisedConfig(
        model="out/tiny",
        start="out/runs/tiny_pretrain",
        out="out/runs/tiny_sft",
        steps=30,
        trains=("bridge", "mmdit", "lora"),
        lora=AdapterConfig(rank=4, alpha=8),
        dtype="float32",
        remat="none",
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.1),
        data=DataConfig(sources=SOURCES, micro_batch=4, image_size=64, min_side=16, token_multiple=256),
        accumulation=3,
        checkpoints=CheckpointConfig(every=10),
        samples=SampleConfig(every=15, prompts=("a red circle",), size=64, num_inference_steps=4),
    )
