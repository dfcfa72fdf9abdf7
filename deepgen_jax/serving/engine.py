"""`PipelineEngine`: batches of jobs on a `DeepGenPipeline`, step by step, so that they can be watched and masked."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.tokens import round_up
from deepgen_jax.data.vision_inputs import to_pixels, to_uint8
from deepgen_jax.flow.schedule import make_sigmas
from deepgen_jax.inference import programs
from deepgen_jax.inference.conditioning import SEQUENCE_BUCKET
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.models.vae import normalise
from deepgen_jax.parallel.mesh import batch_size_multiple, to_host
from deepgen_jax.serving import blending
from deepgen_jax.serving.jobs import Checked, EngineInfo, Job, OnPhase, OnPreview


def engine_info(config: DeepGenConfig, name: str) -> EngineInfo:
    """What clients have to know about a model."""
    return EngineInfo(
        name=name,
        side=config.default_side,
        multiple=config.image_multiple,
        largest=config.mmdit.pos_embed_max_size * config.mmdit.patch_size * config.vae.downscale,
        steps=50,
        guidance=config.guidance_scale,
        samplers=("euler",),
    )


class PipelineEngine:
    """An `Engine` over a pipeline.

    Jobs share a program, and so a bucket, when sizes, steps, sampler, use of guidance, the padded length of the prompt
    and the sizes of the references agree. Everything else differs by row: texts, seeds, scales of guidance, masks.
    """

    def __init__(self, pipe: DeepGenPipeline, name: str) -> None:
        self._pipe = pipe
        self.info = engine_info(pipe.config, name)

    def check(self, job: Job) -> Checked:
        config = self._pipe.config
        sizes = [image.size for image in job.images] or None
        lengths = [len(self._pipe.tokenize(job.prompt, sizes)["input_ids"])]
        if job.guidance != 1:
            lengths.append(len(self._pipe.tokenize(job.negative_prompt, sizes)["input_ids"]))
        padded = round_up(max(lengths) + config.bridge.num_queries, SEQUENCE_BUCKET)
        unit = config.image_multiple
        image_tokens = sum(width * height // unit**2 for width, height in sizes or ())
        bucket: Hashable = (
            job.kind, job.width, job.height, job.steps, job.first_step, job.sampler, job.guidance != 1, padded,
            tuple(sizes or ()),
        )  # fmt: skip
        cell = config.vae.downscale * config.mmdit.patch_size
        return Checked(bucket, lengths[0] - image_tokens, image_tokens, job.width * job.height // cell**2)

    def run(self, jobs: Sequence[Job], rows: int, on_preview: OnPreview, on_phase: OnPhase) -> list[np.ndarray]:
        pipe, config, first = self._pipe, self._pipe.config, jobs[0]
        count = len(jobs)
        jobs = [*jobs, *[jobs[-1]] * (rows - count)]
        clock = _Clock(on_phase)
        # A copy each: a picture that rows share is encoded once, and the programs' shapes would follow how many do.
        pictures = [[image.copy() for image in job.images] for job in jobs]
        requests = pipe._requests(
            [job.prompt for job in jobs],
            pictures if first.images else None,
            [job.negative_prompt for job in jobs],
            [job.seed for job in jobs],
        )
        shape = (config.vae.latent_channels, *(side // config.vae.downscale for side in (first.height, first.width)))
        noise = pipe._initial_noise(requests, shape, None)
        guided = first.guidance != 1
        guidance = jnp.asarray([[[job.guidance]] for job in jobs], jnp.float32) if guided else None
        condition = pipe._condition(requests, "reference", guided=guided)
        references = pipe._references(requests, "mean", None)
        masks = blending.latent_masks(jobs, config.vae.downscale)
        sample, source = noise, None
        sigmas = make_sigmas(pipe.scheduler, first.steps, shape[1] * shape[2] // config.mmdit.patch_size**2)
        if masks is not None or first.first_step:
            source = self._encode(jobs, shape)
        if source is not None and first.first_step:
            sample = blending.noised(source, noise, sigmas[first.first_step])
        clock.tick("condition", condition.sequence)

        mmdit = {"mmdit": pipe.params["mmdit"]}
        due = [job.preview_steps() for job in jobs[:count]]
        for step in range(first.first_step, first.steps):
            pair = jnp.asarray(sigmas[step : step + 2])
            following = programs.denoise(pipe.model, mmdit, sample, references, condition, pair, guidance)
            if masks is not None and source is not None:
                following = blending.keep_outside(following, masks, source, noise, pair[1])
            wanted = [(row, table[step + 1]) for row, table in enumerate(due) if step + 1 in table]
            if wanted:
                # Where the flow now points to: the clean image at the end of a straight line through both samples.
                clean = following + pair[1] / (pair[0] - pair[1]) * (following - sample)
                for row, index in wanted:
                    on_preview(row, index, blending.composite(self._decode(clean[row : row + 1])[0], jobs[row]))
            sample = following
        clock.tick("denoise", sample)
        images = self._decode(sample)[:count]
        clock.tick("decode", None)
        return [blending.composite(image, job) for image, job in zip(images, jobs, strict=False)]

    def row_sizes(self, max_batch: int) -> tuple[int, ...]:
        unit = batch_size_multiple(self._pipe.mesh)
        sizes = {round_up(min(2**power, max_batch), unit) for power in range(max_batch.bit_length() + 1)}
        return tuple(sorted(sizes))

    def usual_jobs(self) -> list[Job]:
        info = self.info
        generation = Job(
            kind="generation",
            prompt="a red circle",
            negative_prompt="",
            seed=0,
            width=info.side,
            height=info.side,
            steps=info.steps,
            guidance=info.guidance,
            sampler=info.samplers[0],
            previews=1,
        )
        blank = Image.new("RGB", (info.side, info.side))
        edit = replace(generation, kind="edit", images=(blank,), source=blank)
        return [generation, edit, replace(edit, mask=np.ones((info.side, info.side), np.bool_))]

    def _encode(self, jobs: Sequence[Job], shape: tuple[int, ...]) -> jax.Array:
        """Latents of the sources [B, C, h, w], normalised; zeros for jobs without one."""
        rows = []
        for job in jobs:
            if job.source is None:
                rows.append(np.zeros(shape, np.float32))
                continue
            mean, _ = self._pipe.vae_encode(np.moveaxis(to_pixels(job.source)[None], -1, 1))
            rows.append(np.asarray(normalise(jnp.asarray(mean[0]), self._pipe.config.vae)))
        return self._pipe._split(np.stack(rows))

    def _decode(self, latents: jax.Array) -> np.ndarray:
        """Latents [B, C, h, w] -> uint8 [B, H, W, 3]."""
        pipe = self._pipe
        pixels = programs.vae_decode(pipe.model, pipe._vae, latents, one_by_one=pipe.mesh.size == 1)
        return to_uint8(to_host(pixels))


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
