"""``deepgen edit``: reference images changed by an instruction."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg

from deepgen_jax.cli.sampling import PromptArguments, SamplingCommand
from deepgen_jax.config import DeepGenConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.batch import EDIT_NEGATIVE_PROMPT, Settings


@dataclass
class ReferenceOptions(PromptArguments):
    """Options of editing only."""

    image: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="FILE")] = ()
    """Reference image; repeat the option for several. With --prompts: for lines that name none."""
    reference_posterior: Literal["mean", "sample"] = "mean"
    """How references enter the model: the mean of their latent distribution, or a sample as in the released code."""
    negative_prompt_preset: Literal["none", "edit"] = "none"
    """edit: the long negative prompt of the published editing scores."""
    max_reference_pixels: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="")] = None
    """Larger references are reduced to about this area, aspect kept; by default that of the model's own size."""


@dataclass
class EditCommand(SamplingCommand, ReferenceOptions):
    """Changes reference images by an instruction."""

    def settings(self, config: DeepGenConfig) -> Settings:
        if self.prompts is None and not self.image:
            raise DeepGenError("there is no image to edit; give one with --image FILE")
        settings = dataclasses.replace(
            super().settings(config),
            images=self.image,
            needs_image=True,
            reference_posterior=self.reference_posterior,
        )
        if self.negative_prompt_preset == "edit":
            if self.negative_prompt:
                raise DeepGenError("--negative-prompt and --negative-prompt-preset are both given; keep one of them")
            settings = dataclasses.replace(settings, negative_prompt=EDIT_NEGATIVE_PROMPT)
        if self.max_reference_pixels is not None:
            if self.max_reference_pixels < settings.multiple**2:
                raise DeepGenError(
                    f"--max-reference-pixels is {self.max_reference_pixels}; use at least {settings.multiple**2}"
                )
            settings = dataclasses.replace(settings, max_reference_pixels=self.max_reference_pixels)
        return settings
