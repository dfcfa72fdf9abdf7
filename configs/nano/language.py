"""The vision-language model of DeepGen-nano from random weights: questions on pictures, and captions."""

from dataclasses import replace

from deepgen_jax.configs.nano import MODEL, world, world_data
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import CheckpointConfig, LanguageConfig


def get_config() -> LanguageConfig:
    """Three questions per caption, 32 samples a step."""
    pictures, edits = world()
    questions = replace(edits, name="questions", path=f"{edits.path},questions=1")
    return LanguageConfig(
        model=MODEL,
        start="out/nano/vae_signs",
        out="out/nano/language",
        steps=400,
        dtype="float32",
        remat="none",
        optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, warmup=20),
        data=replace(
            world_data(8, ("edit", "edit", "edit", "t2i")), sources=(pictures, questions), text_drop=0.0
        ),
        accumulation=4,
        checkpoints=CheckpointConfig(every=100),
    )
