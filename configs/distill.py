"""Few-step distillation of the MMDiT (pi-Flow, arXiv 2510.14974): 4 evaluations for 50 guided steps.

Segments, estimates, targets, window, batch and number of steps are those of the authors' distillation of Qwen-Image;
they train adapters of rank 256: `trains=mmdit_lora lora.rank=256 lora.alpha=256 optimizer.learning_rate=1e-4`. Learning
rates are ours. Prompts are any files in `data/prompts`, a line or row each; edits are those of stage 2, of which only
instructions and references are used. `docs/distill.md` explains what to choose.
"""

from deepgen_jax.configs.sft import EDITING, REASONING_EDITING
from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.training.distill_config import DistillConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import CheckpointConfig, SampleConfig


def get_config() -> DistillConfig:
    """9,000 steps of 256 samples, a quarter of them edits, all weights of the MMDiT."""
    prompts = SourceConfig("prompts", "prompts", "data/prompts")
    editing = [
        SourceConfig(name, "json", f"data/editing/{name}", task="edit") for name in (*EDITING, *REASONING_EDITING)
    ]
    return DistillConfig(
        model="deepgen-base",
        start="runs/grpo",
        out="runs/distill",
        steps=9_000,
        trains=("mmdit",),
        evaluations=4,
        estimates=10,
        targets=2,
        guidance_scale=4.0,
        optimizer=OptimizerConfig(
            learning_rate=1e-5,
            schedule="constant",
            warmup=100,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.0,
            clip_norm=1.0,
        ),
        ema_decay=0.999,
        data=DataConfig(
            sources=(prompts, *editing),
            micro_batch=64,
            mixture=MixtureConfig(cycle=("edit", "t2i", "t2i", "t2i")),
            image_size=512,
            transform="fix_pixels",
            text_drop=0.0,
            token_multiple=256,
        ),
        accumulation=4,
        checkpoints=CheckpointConfig(every=250, keep_last=3, keep_every=1000),
        samples=SampleConfig(every=250, prompts=("a red fox in fresh snow", "a sign that says \"OPEN\" above a door")),
    )
