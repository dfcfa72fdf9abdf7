"""Flow matching: noise schedules, samplers and the training loss."""

from deepgen_jax.flow import losses, samplers, schedule

__all__ = ["losses", "samplers", "schedule"]
