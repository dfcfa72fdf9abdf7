"""A stand-in for a model behind the service: images are a cheap function of all that decides a job."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.serving.jobs import Checked, EngineInfo, Job, OnPhase, OnPreview


def image_of(job: Job) -> np.ndarray:
    """The fake image of a job, uint8 [H, W, 3]."""
    sources = [image.tobytes() for image in job.images]
    mask = None if job.mask is None else job.mask.tobytes()
    key = (job.kind, job.prompt, job.negative_prompt, job.seed, job.steps, job.guidance, job.strength, sources, mask)
    colour = hashlib.sha256(repr(key).encode()).digest()[:3]
    return np.broadcast_to(np.frombuffer(colour, np.uint8), (job.height, job.width, 3)).copy()


class FakeEngine:
    """Remembers its batches.

    Prompts that begin with "refused" are errors of the job, "broken" of the program, and "huge" are out of memory in
    batches of more than one.

    Args:
      seconds: of a batch.
      open_gate: batches start at once; otherwise they wait for ``gate`` to be set.
    """

    def __init__(self, seconds: float = 0.0, open_gate: bool = True) -> None:
        self.info = EngineInfo("fake", 64, 32, 512, 4, 1.0, ("euler", "heun"))
        self.batches: list[list[Job]] = []
        self.seconds = seconds
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        if open_gate:
            self.gate.set()

    def check(self, job: Job) -> Checked:
        words = len(job.prompt.split())
        if words > 30:
            raise DeepGenError(f"the prompt is {words} tokens long, the model reads 30; shorten it")
        return Checked((job.kind, job.width, job.height, job.steps), words, 4 * len(job.images), 16)

    def run(self, jobs: Sequence[Job], rows: int, on_preview: OnPreview, on_phase: OnPhase) -> list[np.ndarray]:
        self.batches.append(list(jobs))
        self.begun.release()
        self.gate.wait()
        time.sleep(self.seconds)
        if any(job.prompt.startswith("refused") for job in jobs):
            raise DeepGenError("this prompt is refused")
        if any(job.prompt.startswith("broken") for job in jobs):
            raise RuntimeError("a programming error")
        if rows > 1 and any(job.prompt.startswith("huge") for job in jobs):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        for step in range(jobs[0].steps + 1):
            for place, job in enumerate(jobs):
                if (index := job.preview_steps().get(step)) is not None:
                    on_preview(place, index, image_of(job) // 2)
        on_phase("denoise", self.seconds)
        return [image_of(job) for job in jobs]

    def row_sizes(self, max_batch: int) -> tuple[int, ...]:
        return tuple(size for size in (1, 2, 4, 8, 16) if size <= max_batch)

    def usual_jobs(self) -> list[Job]:
        return [Job("generation", "a fox", "", 0, 64, 64, 4, 1.0, "euler")]
