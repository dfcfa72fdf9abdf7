"""Configuration of distillation to a few-step model (pi-Flow, Chen et al. 2025, arXiv 2510.14974)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from deepgen_jax.config import FEW_STEP_SAMPLER
from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.settings import at_least
from deepgen_jax.training.run_config import RunConfig, Trainable

#: Numbers of evaluations that a model can be distilled to.
EVALUATIONS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig):
    """Distillation: the starting weights are the teacher, frozen; a copy learns to sample in few evaluations.

    Attributes:
      trains: ("mmdit",), or ("mmdit_lora",) for adapters on all its layers but the output head, which trains in full.
      data: the prompts; of t2i, kind "prompts" needs no pictures. Pictures of edits are conditions as in stage 2.
      accumulation: micro-batches of one optimiser step.
      evaluations: of the student for an image, K: 1, 2, 4 or 8. Each covers a segment of the noise levels.
      estimates: clean images that an evaluation predicts along its segment, N.
      targets: noise levels in a segment at which the policy is compared with the teacher, M. Each costs an evaluation
        of the teacher, or with guidance two.
      guidance_scale: of the teacher; the student needs none. None for the model's default, 1 for no guidance.
      window: length of time (noise level before shifting, 0 to 1) over which the policy's mean velocity is compared.
      states: start of a segment: "noise", where the student's own sampling from noise arrives, or "data", pictures of
        the data with noise.
      segments: learned from in a step: "all", or "one" of each micro-batch, drawn by its length.
    """

    data: DataConfig
    trains: tuple[Trainable, ...] = ("mmdit",)
    accumulation: int = 1
    evaluations: int = 4
    estimates: int = 10
    targets: int = 2
    guidance_scale: float | None = None
    window: float = 3 / 128
    states: Literal["noise", "data"] = "noise"
    segments: Literal["all", "one"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trains not in (("mmdit",), ("mmdit_lora",)):
            raise DeepGenError(f"trains is {self.trains}; distillation trains only mmdit or mmdit_lora")
        if self.evaluations not in EVALUATIONS:
            raise DeepGenError(f"evaluations is {self.evaluations}; choose 1, 2, 4 or 8")
        for name in ("accumulation", "estimates", "targets"):
            at_least(name, getattr(self, name), 1)
        if self.estimates > 128:
            raise DeepGenError(f"estimates is {self.estimates}; use at most 128")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            raise DeepGenError(f"guidance_scale is {self.guidance_scale}; use 0 or more, 1 for no guidance")
        if not 0 < self.window <= 0.1:
            raise DeepGenError(f"window is {self.window}; it must be above 0 and at most 0.1")
        own = {"num_inference_steps": self.evaluations, "guidance_scale": 1.0, "sampler": FEW_STEP_SAMPLER}
        for part, settings in (("samples", self.samples), ("eval", self.eval)):
            for name, value in own.items():
                if (asked := getattr(settings, name, None)) not in (None, value):
                    raise DeepGenError(f"{part}.{name} is {asked}, but the student's is {value}; leave it out")

    @property
    def model_changes(self) -> dict[str, Any]:
        """The student's head, and defaults of calls that use its policy."""
        return {
            "mmdit": {"estimates": self.estimates},
            "sampler": FEW_STEP_SAMPLER,
            "num_inference_steps": self.evaluations,
            "guidance_scale": 1.0,
            "max_guidance_scale": None,
        }
