"""`PipelineEngine`: batches of jobs on a `DeepGenPipeline`, in segments of steps for previews and masks."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import jax
import numpy as np
from PIL import Image

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.tokens import round_up
from deepgen_jax.flow.samplers import SAMPLERS
from deepgen_jax.inference.acceleration import NO_ACCELERATION, Acceleration
from deepgen_jax.inference.conditioning import SEQUENCE_BUCKET
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.serving import blending
from deepgen_jax.serving.jobs import Checked, EngineInfo, Job, OnPhase, OnPreview


def engine_info(config: DeepGenConfig, name: str) -> EngineInfo:
    """Properties of a model that clients need."""
    others = [] if config.few_step else [known for known in SAMPLERS.names() if known != config.sampler]
    return EngineInfo(
        name=name,
        side=config.default_side,
        multiple=config.image_multiple,
        largest=config.mmdit.pos_embed_max_size * config.mmdit.patch_size * config.vae.downscale,
        steps=config.num_inference_steps,
        guidance=config.guidance_scale,
        samplers=(config.sampler, *others),
        few_step=config.few_step,
    )


class PipelineEngine:
    """An `Engine` over a pipeline.

    Jobs share a program, and so a bucket, when sizes, steps, sampler, use of guidance, the padded length of the prompt
    and the sizes of the references agree. Everything else differs by row: texts, seeds, guidance scales, masks.

    On one CPU device the images of a batch are computed one by one, as many at a time as there are cores: XLA's CPU
    products round differently in batches of other sizes, and a single image leaves part of the cores idle.
    """

    def __init__(self, pipe: DeepGenPipeline, name: str, acceleration: Acceleration = NO_ACCELERATION) -> None:
        """Takes a pipeline.

        Args:
          pipe: the pipeline.
          name: of the model.
          acceleration: of all images. Images computed together would share a cache's decisions, so that with a cache
            each is computed by itself on any device.
        """
        self._pipe, self._acceleration = pipe, acceleration
        self.info = engine_info(pipe.config, name)
        self._by_row = pipe.images_alone
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, "image") if self._by_row else None
        self._compiled: set[Hashable] = set()

    def check(self, job: Job) -> Checked:
        config = self._pipe.config
        sizes = [image.size for image in job.images] or None
        lengths = [len(self._pipe.tokenize(job.prompt, sizes)["input_ids"])]
        if job.guidance != 1:
            lengths.append(len(self._pipe.tokenize(job.negative_prompt, sizes)["input_ids"]))
        padded = round_up(max(lengths) + config.bridge.num_queries, SEQUENCE_BUCKET)
        image_tokens = sum(width * height // config.image_multiple**2 for width, height in sizes or ())
        bucket: Hashable = (
            job.kind, job.width, job.height, job.steps, job.first_step, job.sampler, job.guidance != 1, padded,
            tuple(sizes or ()),
        )  # fmt: skip
        cell = config.vae.downscale * config.mmdit.patch_size
        return Checked(bucket, lengths[0] - image_tokens, image_tokens, job.width * job.height // cell**2)

    def run(self, jobs: Sequence[Job], rows: int, on_preview: OnPreview, on_phase: OnPhase) -> list[np.ndarray]:
        if self._pool is None and self._acceleration.cache is not None:
            return [self._alone(jobs, place, rows, on_preview, on_phase) for place in range(len(jobs))]
        if self._pool is None:
            padded = [*jobs, *[replace(jobs[-1], previews=0)] * (rows - len(jobs))]
            return self._run_together(padded, on_preview, on_phase)[: len(jobs)]

        alone = partial(self._alone, jobs, rows=1, on_preview=on_preview, on_phase=on_phase)
        bucket = (self.check(jobs[0]).bucket, any(job.mask is not None for job in jobs))
        done: list[np.ndarray] = []
        if bucket not in self._compiled:
            # Threads that start together would each compile the same programs.
            done.append(alone(0))
            self._compiled.add(bucket)
        return done + list(self._pool.map(alone, range(len(done), len(jobs))))

    def row_sizes(self, max_batch: int) -> tuple[int, ...]:
        if self._by_row:
            return tuple(range(1, max_batch + 1))
        unit = self._pipe.batch_multiple
        if self._acceleration.cache is not None:
            return (unit,)
        sizes = {round_up(min(2**power, max_batch), unit) for power in range(max_batch.bit_length() + 1)}
        return tuple(sorted(sizes))

    def usual_jobs(self) -> list[Job]:
        info = self.info
        generation = Job(
            kind="generation", prompt="a red circle", negative_prompt="", seed=0, width=info.side, height=info.side,
            steps=info.steps, guidance=info.guidance, sampler=info.samplers[0], previews=1,
        )  # fmt: skip
        blank = Image.new("RGB", (info.side, info.side))
        edit = replace(generation, kind="edit", images=(blank,), source=blank)
        return [generation, edit, replace(edit, mask=np.ones((info.side, info.side), np.bool_))]

    def _alone(
        self, jobs: Sequence[Job], place: int, rows: int, on_preview: OnPreview, on_phase: OnPhase
    ) -> np.ndarray:
        """The image of one job of a batch, computed by itself, in ``rows`` copies."""

        def preview(row: int, index: int, image: np.ndarray) -> None:
            if row == 0:
                on_preview(place, index, image)

        copies = [replace(jobs[place], previews=0)] * (rows - 1)
        return self._run_together([jobs[place], *copies], preview, on_phase)[0]

    def _run_together(self, jobs: Sequence[Job], on_preview: OnPreview, on_phase: OnPhase) -> list[np.ndarray]:
        """Images of a batch of one bucket, computed together."""
        pipe, config, first = self._pipe, self._pipe.config, jobs[0]
        clock = _Clock(on_phase)
        # A copy each: a picture that rows share is encoded once, and the programs' shapes would follow how many do.
        pictures = [[image.copy() for image in job.images] for job in jobs]
        run = pipe.start(
            [job.prompt for job in jobs],
            pictures if first.images else None,
            [job.negative_prompt for job in jobs],
            height=first.height,
            width=first.width,
            steps=first.steps,
            guidance=[job.guidance for job in jobs],
            sampler=first.sampler,
            seed=[job.seed for job in jobs],
            acceleration=self._acceleration,
        )
        masks = blending.latent_masks(jobs, config.vae.downscale)
        source = run.noise
        if masks is not None or first.first_step:
            source = pipe.encode_sources([job.source for job in jobs], run.noise.shape)
        if first.first_step:
            sample = blending.noised(source, run.noise, run.sigmas[first.first_step])
            run.restart(sample, first.first_step)
        clock.tick("condition", run.condition.sequence)

        previews = [job.preview_steps() for job in jobs]
        stops = set(range(first.first_step, first.steps)) if masks is not None else set().union(*previews)
        for end in sorted((stops | {first.steps}) - {first.first_step}):
            run.advance(end)
            if masks is not None:
                run.state = blending.keep_outside(
                    run.state, masks, source, run.noise, run.sigmas[end], config.mmdit.patch_size
                )
            for row, due in enumerate(previews):
                if end in due:
                    image = pipe.decode_images(run.clean_latents(row))[0]
                    on_preview(row, due[end], blending.composite(image, jobs[row]))
        final = run.latents()
        clock.tick("denoise", final)
        images = pipe.decode_images(final)
        clock.tick("decode", None)
        return [blending.composite(image, job) for image, job in zip(images, jobs, strict=False)]


class _Clock:
    """Seconds between ticks."""

    def __init__(self, on_phase: OnPhase) -> None:
        self._on_phase, self._start = on_phase, time.monotonic()

    def tick(self, phase: str, result: jax.Array | None) -> None:
        """Reports the time since the last tick as that of ``phase``, once its result is there."""
        if result is not None:
            result.block_until_ready()
        now = time.monotonic()
        self._on_phase(phase, now - self._start)
        self._start = now
