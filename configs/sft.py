"""Stage 2, joint supervised fine-tuning: bridge, DiT and adapters on the VLM learn; Tables 8 and 9 of the paper.

The data sets are the public ones of Table 8. Put them under `data/` as the paths say, or set other paths
(`data.sources.NAME.path=...`). The paper's in-house generation, editing and poster data are not public.
"""

from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import AdapterConfig, CheckpointConfig, SampleConfig, SupervisedConfig

#: General generation (11M samples), reasoning generation (150K) and text rendering (560K).
GENERATION = ("blip-3o", "sharegpt-4o-image", "echo-4o-image", "opengpt4o-image", "self-banana-50k")
REASONING_GENERATION = ("unireason-t2i",)
TEXT_RENDERING = ("text-rendering", "chinese-poem")
EDITING = (
    "nhr-edit",
    "gpt-image-edit",
    "sharegpt-4o-image-edit",
    "opengpt4o-image-edit",
    "nano-banana-consist",
    "pico-banana",
    "x2i2",
    "uniworld-edit",
)
REASONING_EDITING = ("unireason-edit",)


def get_config() -> SupervisedConfig:
    """Published hyper-parameters: batch 768, 400,000 steps, edit and generation batches 1:2, aspects kept."""
    generation = [
        SourceConfig(name, "json", f"data/sft/{name}") for name in (*GENERATION, *REASONING_GENERATION, *TEXT_RENDERING)
    ]
    editing = [
        SourceConfig(name, "json", f"data/editing/{name}", task="edit") for name in (*EDITING, *REASONING_EDITING)
    ]
    return SupervisedConfig(
        model="deepgen-base",
        start="runs/pretrain",
        out="runs/sft",
        steps=400_000,
        trains=("bridge", "mmdit", "lora"),
        lora=AdapterConfig(rank=64, alpha=128, dropout=0.05),
        optimizer=OptimizerConfig(
            learning_rate=5e-5,
            schedule="cosine",
            warmup=0.01,
            warmup_start=1e-5,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.05,
            clip_norm=1.0,
        ),
        data=DataConfig(
            sources=(*generation, *editing),
            micro_batch=256,
            mixture=MixtureConfig(cycle=("edit", "t2i", "t2i")),
            image_size=512,
            transform="fix_pixels",
            text_drop=0.1,
            token_multiple=256,
        ),
        accumulation=3,
        merge=2,
        checkpoints=CheckpointConfig(every=1000, keep_last=3, keep_every=20_000),
        samples=SampleConfig(every=5000, prompts=("a red fox in fresh snow", "a sign that says \"OPEN\" above a door")),
    )
