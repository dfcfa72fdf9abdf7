"""Jobs of one image each, and the interface of the engine that runs them in batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import Image

Kind = Literal["generation", "edit"]
KINDS: tuple[Kind, ...] = ("generation", "edit")


@dataclass(frozen=True)
class Job:
    """One image to make; together with the model it decides every pixel.

    Attributes:
      kind: "generation" or "edit".
      prompt, negative_prompt: texts; the negative prompt has no effect at guidance 1.
      seed: of the initial noise, 0 to 2**32 - 1.
      width, height: of the result in pixels.
      steps: sampler steps.
      guidance: scale of classifier-free guidance.
      sampler: name of the sampler.
      images: references, RGB, at the size at which they enter the model.
      source: the picture that ``mask`` and ``strength`` refer to, RGB of the result's size.
      mask: bool [height, width], True where the picture may change; None for everywhere.
      strength: share of the noise schedule that is run, in (0, 1]; below 1 sampling starts from the noised source.
      previews: number of intermediate images to report.
    """

    kind: Kind
    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    sampler: str
    images: tuple[Image.Image, ...] = ()
    source: Image.Image | None = None
    mask: np.ndarray | None = None
    strength: float = 1.0
    previews: int = 0

    @property
    def first_step(self) -> int:
        """Step at which sampling starts: 0, or later where ``strength`` is below 1."""
        return min(self.steps - 1, self.steps - max(1, round(self.steps * self.strength)))

    def preview_steps(self) -> dict[int, int]:
        """Number of finished steps -> index of the preview that is due then; evenly spaced, the last step excluded."""
        run = self.steps - self.first_step
        due = {self.first_step + run * (k + 1) // (self.previews + 1): k for k in range(self.previews)}
        return {step: k for step, k in due.items() if self.first_step < step < self.steps}


@dataclass(frozen=True)
class EngineInfo:
    """Properties of the model that a client needs.

    Attributes:
      name: as ``/v1/models`` lists it.
      side: default side of a square image in pixels.
      multiple: sides are multiples of this.
      largest: longest side in pixels.
      steps, guidance: defaults.
      samplers: names; the first is the default.
      few_step: distilled to these steps and sampler without guidance; others are refused.
    """

    name: str
    side: int
    multiple: int
    largest: int
    steps: int
    guidance: float
    samplers: tuple[str, ...]
    few_step: bool = False


@dataclass(frozen=True)
class Checked:
    """A job that the model accepts.

    Attributes:
      bucket: jobs of equal buckets run in one compiled program.
      text_tokens, image_tokens: length of its input.
      output_tokens: tokens of its picture.
    """

    bucket: Hashable
    text_tokens: int
    image_tokens: int
    output_tokens: int


#: (place of the job in the batch, index of the preview, uint8 [H, W, 3]).
OnPreview = Callable[[int, int, np.ndarray], None]
#: (name of a phase, seconds it took).
OnPhase = Callable[[str, float], None]


class Engine(Protocol):
    """A model that runs batches; all methods but `check` are called from one thread."""

    @property
    def info(self) -> EngineInfo: ...

    def check(self, job: Job) -> Checked:
        """Raises a DeepGenError for a job that the model cannot take; called from any thread."""
        ...

    def run(self, jobs: Sequence[Job], rows: int, on_preview: OnPreview, on_phase: OnPhase) -> list[np.ndarray]:
        """Images of jobs of one bucket, uint8 [H, W, 3] each; the batch is padded to ``rows``.

        An image must not depend on the other jobs or on ``rows``.
        """
        ...

    def row_sizes(self, max_batch: int) -> tuple[int, ...]:
        """The sizes to which batches are padded, ascending; the last one is the largest batch."""
        ...

    def usual_jobs(self) -> list[Job]:
        """Jobs whose programs are worth compiling before the first request."""
        ...
