"""`PipelineEngine`: batches of jobs on a `DeepGenPipeline`, in segments of steps for previews and masks."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.tokens import round_up
from deepgen_jax.data.vision_inputs import to_pixels, to_uint8
from deepgen_jax.flow.samplers import SAMPLERS, get_sampler
from deepgen_jax.inference import programs
from deepgen_jax.inference.conditioning import SEQUENCE_BUCKET
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.models.vae import normalise
from deepgen_jax.parallel.mesh import batch_size_multiple, to_host
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

    def __init__(self, pipe: DeepGenPipeline, name: str) -> None:
        self._pipe = pipe
        self.info = engine_info(pipe.config, name)
        self._by_row = pipe.mesh.size == 1 and pipe.mesh.devices.flat[0].platform == "cpu"
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
        if self._pool is None:
            padded = [*jobs, *[replace(jobs[-1], previews=0)] * (rows - len(jobs))]
            return self._run_together(padded, on_preview, on_phase)[: len(jobs)]

        def alone(place: int) -> np.ndarray:
            def preview(_: int, index: int, image: np.ndarray) -> None:
                on_preview(place, index, image)

            return self._run_together([jobs[place]], preview, on_phase)[0]

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
        unit = batch_size_multiple(self._pipe.mesh)
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

    def _run_together(self, jobs: Sequence[Job], on_preview: OnPreview, on_phase: OnPhase) -> list[np.ndarray]:
        """Images of a batch of one bucket, computed together."""
        pipe, config, first = self._pipe, self._pipe.config, jobs[0]
        clock = _Clock(on_phase)
        # A copy each: a picture that rows share is encoded once, and the programs' shapes would follow how many do.
        pictures = [[image.copy() for image in job.images] for job in jobs]
        requests = pipe._requests(
            [job.prompt for job in jobs],
            pictures if first.images else None,
            [job.negative_prompt for job in jobs],
            [job.seed for job in jobs],
        )
        size = (first.height // config.vae.downscale, first.width // config.vae.downscale)
        noise = pipe._initial_noise(requests, (config.vae.latent_channels, *size), None)
        guidance = None
        if first.guidance != 1:
            scales = [job.guidance for job in jobs]
            guidance = jnp.float32(scales[0]) if len(jobs) == 1 else jnp.asarray(scales, jnp.float32)[:, None, None]
        condition = pipe._condition(requests, "reference", guided=guidance is not None)
        references = pipe._references(requests, "mean", None)
        sampler, tokens = get_sampler(first.sampler), size[0] * size[1] // config.mmdit.patch_size**2
        sigmas = sampler.noise_levels(pipe.scheduler, first.steps, tokens)
        keys = programs.sample_keys(*pipe._seeds(requests)) if sampler.stochastic else None
        masks = blending.latent_masks(jobs, config.vae.downscale)
        source = self._encode(jobs, noise.shape) if masks is not None or first.first_step else noise
        sample = blending.noised(source, noise, sigmas[first.first_step]) if first.first_step else noise
        state = programs.start_denoising(pipe.model, sample, first.sampler)
        clock.tick("condition", condition.sequence)

        previews = [job.preview_steps() for job in jobs]
        stops = set(range(first.first_step, first.steps)) if masks is not None else set().union(*previews)
        levels, mmdit = jnp.asarray(programs.padded_sigmas(sigmas)), {"mmdit": pipe.params["mmdit"]}
        for begin, end in pairwise(sorted(stops | {first.first_step, first.steps})):
            state = programs.denoise_steps(
                pipe.model, mmdit, state, references, condition, levels, guidance, np.int32(begin), np.int32(end), keys,
                sampler=first.sampler, size=size,
            )  # fmt: skip
            if masks is not None:
                state = blending.keep_outside(state, masks, source, noise, sigmas[end], config.mmdit.patch_size)
            for row, due in enumerate(previews):
                if end in due:
                    clean = programs.to_latents(pipe.model, state.clean[row : row + 1], size)
                    on_preview(row, due[end], blending.composite(self._decode(clean)[0], jobs[row]))
        final = programs.to_latents(pipe.model, state.x, size)
        clock.tick("denoise", final)
        images = self._decode(final)
        clock.tick("decode", None)
        return [blending.composite(image, job) for image, job in zip(images, jobs, strict=False)]

    def _encode(self, jobs: Sequence[Job], shape: tuple[int, ...]) -> jax.Array:
        """Latents of the sources [B, C, h, w], normalised; zeros for jobs without one."""
        latents = np.zeros(shape, np.float32)
        for row, job in enumerate(jobs):
            if job.source is not None:
                mean, _ = self._pipe.vae_encode(np.moveaxis(to_pixels(job.source)[None], -1, 1))
                latents[row] = normalise(jnp.asarray(mean[0]), self._pipe.config.vae)
        return self._pipe._split(latents)

    def _decode(self, latents: jax.Array) -> np.ndarray:
        """Latents [B, C, h, w] -> uint8 [B, H, W, 3]."""
        pipe = self._pipe
        return to_uint8(to_host(programs.vae_decode(pipe.model, pipe._vae, latents, one_by_one=pipe.mesh.size == 1)))


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
