"""Stage 1 of DeepGen-nano: with no DiT that was trained before, it learns together with the bridge."""

from deepgen_jax.configs.nano import MODEL, caption_data
from deepgen_jax.training.config import CheckpointConfig, SampleConfig, SupervisedConfig
from deepgen_jax.training.optimizer import OptimizerConfig

PROMPTS = (
    "a large red circle to the left of a small blue square",
    "three yellow stars on a black background",
    "the shape with three sides, in the colour of grass",
    'a sign that says "OPEN"',
)


def get_config() -> SupervisedConfig:
    """Pictures from captions alone, 32 samples a step; edits come in stage 2."""
    return SupervisedConfig(
        model=MODEL,
        start="out/nano/pretrain_noisy",
        out="out/nano/pretrain",
        steps=2400,
        trains=("bridge", "mmdit"),
        dtype="float32",
        remat="none",
        optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, warmup=50, weight_decay=0.01),
        ema_decay=0.999,
        noise_shift=8.0,
        data=caption_data(32),
        accumulation=1,
        checkpoints=CheckpointConfig(every=300),
        samples=SampleConfig(every=1200, prompts=PROMPTS, size=96, num_inference_steps=20),
    )
