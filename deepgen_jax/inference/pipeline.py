"""`DeepGenPipeline`: a model folder as a function from prompts and pictures to pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from PIL import Image

from deepgen_jax.config import DeepGenConfig, SchedulerConfig
from deepgen_jax.data.tokens import Padding, PromptTokenizer
from deepgen_jax.data.vision_inputs import to_pixels, to_uint8
from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow.samplers import get_sampler
from deepgen_jax.inference import programs
from deepgen_jax.inference.accelerated import Work, start_work
from deepgen_jax.inference.acceleration import NO_ACCELERATION, Acceleration, interval_of
from deepgen_jax.inference.defaults import Sampling, check_acceleration, resolve_sampling, resolve_size
from deepgen_jax.inference.denoising import Denoising, prepare
from deepgen_jax.inference.known_words import KnownWords, read_known_words
from deepgen_jax.inference.parts import ModelParts
from deepgen_jax.inference.references import Posterior, encode_references
from deepgen_jax.inference.requests import ImageArgument, Requests
from deepgen_jax.inference.rows import OnStep, PreviewCallback, Sampled, on_step_of, run_each_row
from deepgen_jax.inference.stored_programs import in_background
from deepgen_jax.models.packing import pack_kernels
from deepgen_jax.models.stack import unrolls, unstack
from deepgen_jax.models.vae import normalise
from deepgen_jax.parallel.mesh import to_host
from deepgen_jax.random_keys import Inference
from deepgen_jax.stores.model_folder import locate

OutputType = Literal["pil", "np", "latent"]


@dataclass(frozen=True)
class PipelineOutput:
    """Result of a call.

    Attributes:
      images: PIL images, uint8 [B, H, W, 3], or None for ``output_type="latent"``.
      latents: float32 [B, C, H/8, W/8], normalised.
      evaluations: MMDiT layers evaluated and those without acceleration, summed over images; None without it.
    """

    images: list[Image.Image] | np.ndarray | None
    latents: np.ndarray
    evaluations: tuple[float, float] | None = None


class DeepGenPipeline(ModelParts):
    """Generates and edits images; see :meth:`from_pretrained` and :meth:`__call__`."""

    def __init__(
        self,
        config: DeepGenConfig,
        scheduler: SchedulerConfig,
        params: programs.Params,
        tokenizer: PromptTokenizer,
        mesh: Mesh,
        dtype: DTypeLike,
    ) -> None:
        """Takes parameters that are already on the mesh in their dtypes; most users want :meth:`from_pretrained`."""
        super().__init__(config, params, tokenizer, mesh, dtype)
        self.scheduler = scheduler
        #: Words that the model has seen, where its folder lists them; calls warn about others.
        self.known_words: KnownWords | None = None
        self._prepared: set[Any] = set()

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], dtype: DTypeLike = "float32", mesh: Mesh | str | None = None
    ) -> DeepGenPipeline:
        """Loads a model folder (made by ``deepgen convert``), or "nano", the small model of the package.

        Args:
          folder: the model folder, or "nano"; a folder of that name comes first.
          dtype: dtype of weights and computation, "float32" or "bfloat16"; the VAE stays float32 where its config says
            so, and 8-bit weights stay 8-bit. Adapters stored beside the weights are merged on loading.
          mesh: a mesh with the axes ("data", "fsdp", "tensor"), its sizes as text ("fsdp=8"), or None for one device.

        Raises:
          DeepGenError: no such folder, not a model folder, damaged weights, unusable dtype or mesh.
        """
        from deepgen_jax.inference.loading import load_model

        path = locate(folder)
        config, scheduler, params, tokenizer, devices, compute = load_model(path, dtype, mesh)
        if devices.size == 1 and devices.devices.flat[0].platform == "cpu":
            params = pack_kernels(params)
        elif unrolls(devices):
            params = unstack(params)
        pipeline = cls(config, scheduler, params, tokenizer, devices, compute)
        pipeline.known_words = read_known_words(path)
        return pipeline

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: ImageArgument = None,
        negative_prompt: str | Sequence[str | None] | None = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        latents: np.ndarray | jax.Array | None = None,
        padding: Padding = "reference",
        reference_posterior: Posterior = "mean",
        output_type: OutputType = "pil",
        reference_noise: Sequence[Sequence[np.ndarray]] | None = None,
        sampler: str | None = None,
        callback: PreviewCallback | None = None,
        callback_every: int = 1,
        cache: float | None = None,
        taylor: bool = False,
        guidance_interval: Sequence[float] | None = None,
    ) -> PipelineOutput:
        """Generates images from prompts, or edits reference images where ``image`` is given.

        An image depends on its own prompt, references, seed and the settings, never on the rest of the batch (but see
        ``padding="batch"``): bit for bit on one CPU device, where each image is computed by itself, and elsewhere, as
        on any mesh, within float32 rounding.

        Args:
          prompt: one prompt or B of them.
          image: None for text-to-image; one PIL image; a list, the references of the one prompt; or a list of lists,
            the references of each prompt. Any number of any size whose sides are multiples of 32 pixels. They are
            read as files are: turned upright (EXIF), converted to sRGB (ICC profile), and laid over white.
          negative_prompt: one for all, or one each. In editing it is seen with the same references.
          height, width: of the result in pixels, multiples of 32; by default those of the first reference, or the
            model's own.
          num_inference_steps: steps of the sampler; by default the model's.
          guidance_scale: g in ``v_neg + g (v - v_neg)``; 1 runs without the negative prompt; by default the model's.
          seed: image i draws its noise from (seed, i); or a list, image i draws from (seed[i], 0).
          latents: initial noise [B, C, H/8, W/8] in place of the seed's.
          padding: "reference" gives the released system's result for each prompt run alone, "batch" its result for
            this very batch, "masked" hides all padding.
          reference_posterior: references enter the MMDiT as the VAE posterior's "mean" or a "sample" of it.
          output_type: "pil", "np" or "latent".
          reference_noise: posterior noise [C, h, w] of each reference in place of the seed's.
          sampler: a name in ``flow.samplers.SAMPLERS``, such as "euler", "heun" or "dpmpp_2m"; by default the model's.
          callback: called with a `Preview` after every ``callback_every`` steps and after the last one, perhaps from
            another thread; what it raises ends the call.
          callback_every: steps between previews.
          cache, taylor, guidance_interval: skip work, see :class:`~deepgen_jax.inference.acceleration.Acceleration`;
            images computed together share a cache's decisions.

        Raises:
          DeepGenError: arguments that do not fit the model or each other.
        """
        if output_type not in ("pil", "np", "latent"):
            raise DeepGenError(f"output_type is {output_type!r}; choose pil, np or latent")
        if callback_every < 1:
            raise DeepGenError(f"callback_every is {callback_every}; use at least 1")
        sampling = resolve_sampling(self.config, num_inference_steps, guidance_scale, sampler)
        saving = Acceleration(cache, taylor, None if guidance_interval is None else interval_of(guidance_interval))
        check_acceleration(self.config, saving)
        requests = self._requests(prompt, image, negative_prompt, seed)
        first = next((refs[0].size for refs in requests.images if refs), None)
        width, height = resolve_size(self.config, width, height, () if first is None else (first,))
        self._check_size(height, width)
        shape = self._latent_shape(height, width)
        if latents is not None:
            latents = np.asarray(latents, np.float32)
            if latents.shape != (requests.count, *shape):
                raise DeepGenError(f"latents have shape {latents.shape}, expected {(requests.count, *shape)}")
        if self.known_words is not None:
            self.known_words.warn(requests.prompts)
        decode = output_type != "latent"

        def run(requests: Requests, rows: Sequence[int]) -> Sampled:
            noise = None if latents is None else self._split(latents[list(rows)][requests.rows])
            posterior_noise = None if reference_noise is None else [reference_noise[row] for row in rows]
            references = self._references(requests, reference_posterior, posterior_noise)
            denoising = self._start(requests, shape, noise, references, sampling, None, saving, padding, decode)
            return self._finish(denoising, requests.count, decode, on_step_of(callback, rows), callback_every)

        if self.images_alone and padding != "batch":
            sampled = run_each_row(run, requests)
        else:
            sampled = run(requests, range(requests.count))
        pixels = sampled.pixels
        images: list[Image.Image] | np.ndarray | None = None
        if pixels is not None:
            images = [Image.fromarray(array) for array in pixels] if output_type == "pil" else pixels
        return PipelineOutput(images, sampled.latents, sampled.evaluations)

    @property
    def images_alone(self) -> bool:
        """Whether the images of a call are computed one by one: on one CPU device, where products in batches of other
        sizes are rounded differently."""
        return self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu"

    def start(
        self,
        prompt: str | Sequence[str],
        image: ImageArgument = None,
        negative_prompt: str | Sequence[str | None] | None = "",
        *,
        height: int,
        width: int,
        steps: int,
        guidance: Sequence[float],
        sampler: str,
        seed: Sequence[int],
        acceleration: Acceleration = NO_ACCELERATION,
    ) -> Denoising:
        """Begins to sample images as one batch; for services that interleave steps with work of their own.

        Args:
          prompt, image, negative_prompt, height, width, seed: as for :meth:`__call__`; their number must be a multiple
            of :attr:`batch_multiple`.
          steps, sampler: of the batch.
          guidance: of each image; 1 for all of them or for none.
          acceleration: of the batch.

        Raises:
          DeepGenError: as for :meth:`__call__`.
        """
        requests = self._requests(prompt, image, negative_prompt, seed)
        shape = self._latent_shape(height, width)
        references = self._references(requests, "mean", None)
        sampling = Sampling(steps, guidance[0], sampler)
        scales = None if len(guidance) == 1 else jnp.asarray(guidance, jnp.float32)[:, None, None]
        return self._start(requests, shape, None, references, sampling, scales, acceleration, "reference", True)

    def encode_sources(self, images: Sequence[Image.Image | None], shape: tuple[int, ...]) -> jax.Array:
        """Normalised latents [B, C, h, w] of pictures of the result's size; zeros for None."""
        latents = np.zeros(shape, np.float32)
        for row, image in enumerate(images):
            if image is not None:
                mean, _ = self.vae_encode(np.moveaxis(to_pixels(image)[None], -1, 1))
                latents[row] = normalise(jnp.asarray(mean[0]), self.config.vae)
        return self._split(latents)

    def decode_images(self, latents: jax.Array) -> np.ndarray:
        """Normalised latents [B, C, h, w] -> uint8 [B, H, W, 3]."""
        return to_uint8(to_host(programs.vae_decode(self.model, self._vae, latents, one_by_one=self.mesh.size == 1)))

    def _start(
        self,
        requests: Requests,
        shape: tuple[int, int, int],
        noise: jax.Array | None,
        references: programs.References | None,
        sampling: Sampling,
        scales: jax.Array | np.float32 | None,
        saving: Acceleration,
        padding: Padding,
        decode: bool,
    ) -> Denoising:
        """Requests with the state before the first step; ``scales`` [B, 1, 1] replace the guidance scale."""
        guided = sampling.guidance != 1.0
        sampler = get_sampler(sampling.sampler)
        sigmas = sampler.noise_levels(self.scheduler, sampling.steps, self._tokens(shape))
        rows, work = len(requests.seeds), None
        if saving:
            work = start_work(self.model, saving, rows, self._tokens(shape), sigmas, guided)
        if self.images_alone:
            self._prepare(requests, shape, references, sampling.sampler, guided, work, decode)
        if noise is None:
            noise = programs.normal_noise(*self._seeds(requests), shape, Inference.INITIAL_NOISE)
        condition = self._condition(requests, padding, guided)
        keys = programs.sample_keys(*self._seeds(requests)) if sampler.stochastic else None
        if guided and scales is None:
            scales = np.float32(sampling.guidance)
        return Denoising(
            self.model, self.params, noise, references, condition, sigmas, scales if guided else None,
            sampling.sampler, keys, work,
        )  # fmt: skip

    def _prepare(
        self,
        requests: Requests,
        shape: tuple[int, int, int],
        references: programs.References | None,
        sampler: str,
        guided: bool,
        work: Work | None,
        decode: bool,
    ) -> None:
        """Begins to load or compile programs that one image needs, while this thread goes on to the first of them."""
        length = self._prompts.padded_length(requests.prompts + requests.negative_prompts * guided, requests.images)
        rows, arrays = len(requests.seeds), (references, work)
        settings = (rows, shape, length, str(jax.tree.map(np.shape, arrays)), sampler, guided, decode)
        if settings not in self._prepared:
            self._prepared.add(settings)
            first = (self.model, self.params, rows, shape, length)
            in_background(lambda: prepare(*first, references, sampler, guided, work, decode))

    def _finish(self, denoising: Denoising, count: int, decode: bool, on_step: OnStep | None, every: int) -> Sampled:
        """All steps; without ``decode``, only to latents. ``count`` rows are wanted."""
        steps = len(denoising.sigmas) - 1
        for last in [*range(every if on_step else steps, steps, every), steps]:
            denoising.advance(last)
            if on_step is not None:
                on_step(last, steps, to_host(denoising.clean_latents())[:count])
        final = denoising.latents()
        images = self.decode_images(final)[:count] if decode else None
        work = denoising.state.cache
        evaluations = (count * float(work.done), count * float(work.all)) if isinstance(work, Work) else None
        return Sampled(images, to_host(final)[:count], evaluations)

    def _seeds(self, requests: Requests) -> tuple[jax.Array, jax.Array]:
        """Seed and index of each sample's noise, uint32 [B] each."""
        seeds, indices = (self._split(np.asarray(x, np.uint32)) for x in (requests.seeds, requests.indices))
        return seeds, indices

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        vae = self.config.vae
        return vae.latent_channels, height // vae.downscale, width // vae.downscale

    def _tokens(self, shape: tuple[int, int, int]) -> int:
        """MMDiT tokens of latents [C, h, w]."""
        return shape[1] * shape[2] // self.config.mmdit.patch_size**2

    def _condition(self, requests: Requests, padding: Padding, guided: bool) -> programs.Condition:
        """Condition of the batch; with guidance prompt and negative prompt of each sample side by side."""
        if not guided:
            return self._prompts.condition(requests.prompts, requests.images, padding)
        pairs = list(zip(requests.prompts, requests.negative_prompts, strict=True))
        prompts = [text for pair in pairs for text in pair]
        partners = [text for pair in pairs for text in reversed(pair)]
        doubled = [refs for refs in requests.images for _ in range(2)]
        return self._prompts.condition(prompts, doubled, padding, partners)

    def _references(
        self, requests: Requests, posterior: Posterior, noise: Sequence[Sequence[np.ndarray]] | None
    ) -> programs.References | None:
        return encode_references(requests, posterior, noise, self.config, self.vae_encode, self._split)
