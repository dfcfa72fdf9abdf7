"""`DeepGenPipeline`: a model folder as a function from prompts and pictures to pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from PIL import Image

from deepgen_jax.config import DeepGenConfig, SchedulerConfig
from deepgen_jax.data.images import load_image
from deepgen_jax.data.tokens import Padding, PromptTokenizer
from deepgen_jax.data.vision_inputs import to_pixels, to_uint8
from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow.samplers import get_sampler
from deepgen_jax.inference import programs
from deepgen_jax.inference.accelerated import Work, start_work
from deepgen_jax.inference.acceleration import NO_ACCELERATION, Acceleration, interval_of
from deepgen_jax.inference.conditioning import PromptEncoder
from deepgen_jax.inference.defaults import Sampling, check_acceleration, resolve_sampling, resolve_size
from deepgen_jax.inference.denoising import Denoising, prepare
from deepgen_jax.inference.known_words import KnownWords, read_known_words
from deepgen_jax.inference.references import Posterior, encode_references
from deepgen_jax.inference.requests import ImageArgument, Requests, collect
from deepgen_jax.inference.rows import OnStep, PreviewCallback, Sampled, on_step_of, run_each_row
from deepgen_jax.inference.stored_programs import in_background
from deepgen_jax.models import patches as grids
from deepgen_jax.models.deepgen import make_network
from deepgen_jax.models.packing import pack_kernels
from deepgen_jax.models.stack import unrolls, unstack
from deepgen_jax.models.vae import normalise
from deepgen_jax.parallel.mesh import batch_sharding, batch_size_multiple, to_host
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


class DeepGenPipeline:
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
        self.config = config
        self.scheduler = scheduler
        self.mesh = mesh
        self.params = params
        #: Words that the model has seen, where its folder lists them; calls warn about others.
        self.known_words: KnownWords | None = None
        self.tokenizer = tokenizer
        self.model = make_network(config, mesh, dtype)
        self._prompts = PromptEncoder(self.model, params, tokenizer, mesh)
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

    @property
    def batch_multiple(self) -> int:
        """The mesh splits batches of multiples of this size evenly."""
        return batch_size_multiple(self.mesh)

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

    def tokenize(self, prompt: str, image_sizes: Sequence[tuple[int, int]] | None = None) -> dict[str, np.ndarray]:
        """Tokens of one plain prompt text, the template applied inside.

        Args:
          prompt: the user's words.
          image_sizes: (width, height) in pixels of each reference; None for text-to-image.

        Returns:
          ``input_ids`` int32 [L] and ``position_ids`` int32 [3, L + think tokens].
        """
        return self._prompts.tokenize(prompt, image_sizes)._asdict()

    def encode_image(self, image: Image.Image) -> np.ndarray:
        """Vision tower's output for one picture: float32 [tokens, hidden]."""
        tokens, counts = self._prompts.encode_images(self._checked([image]))
        return to_host(tokens)[0, : counts[0]].astype(np.float32)

    def hidden_states(self, prompt: str, images: Sequence[Image.Image] | None = None) -> np.ndarray:
        """Selected hidden states of one prompt with its think tokens: float32 [n, L + Q, hidden], deepest first."""
        return self._prompts.hidden_states(prompt, None if images is None else self._checked(images))

    def encode_prompt(
        self,
        prompts: str | Sequence[str],
        images: ImageArgument = None,
        padding: Padding = "reference",
        pair_with: str | Sequence[str] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Condition of B prompts.

        Args:
          prompts, images: as ``prompt`` and ``image`` of :meth:`__call__`.
          padding: as there; "reference" pads each prompt to the longer of its pair.
          pair_with: the other prompts of each guidance pair.

        Returns:
          pooled float32 [B, P], sequence float32 [B, L, J] and mask bool [B, L]: True on real tokens, visible pads and
          think tokens, which are at the end of the sequence.
        """
        requests = self._requests(prompts, images, "" if pair_with is None else pair_with, 0)
        pairs = None if pair_with is None else requests.negative_prompts
        condition = self._prompts.condition(requests.prompts, requests.images, padding, pairs)
        pooled, sequence = (to_host(x)[: requests.count].astype(np.float32) for x in condition[:2])
        return pooled, sequence, to_host(condition.mask)[: requests.count]

    def velocity(
        self,
        latents: Sequence[np.ndarray],
        references: Sequence[Sequence[np.ndarray] | None] | None,
        timestep: np.ndarray,
        pooled: np.ndarray,
        sequence: np.ndarray,
        mask: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """The MMDiT's velocity for samples of any sizes.

        Args:
          latents: B noisy latents [C, h, w].
          references: reference latents [C, h, w] of each sample (None or empty for none); None for none at all.
          timestep: [B] on the 0..1000 scale.
          pooled: [B, P].
          sequence: [B, L, J].
          mask: [B, L] bool, condition tokens that are seen; None for all.

        Returns:
          B arrays [C, h, w], float32.
        """
        config = self.config.mmdit
        rows_of_references = [()] * len(latents) if references is None else [row or () for row in references]
        sizes = {"patch_size": config.patch_size, "max_size": config.pos_embed_max_size}
        packed = grids.pack(latents, rows_of_references, **sizes)
        seen = np.ones(np.shape(sequence)[:2], bool) if mask is None else np.asarray(mask, bool)
        inputs = [packed.patches, packed.position_ids, np.asarray(timestep, np.float32), np.asarray(pooled)]
        inputs += [np.asarray(sequence), packed.patch_mask, seen]
        rows = -len(latents) % batch_size_multiple(self.mesh)
        inputs = [np.concatenate([x, np.repeat(x[-1:], rows, axis=0)]) for x in inputs]
        device_inputs = [self._split(x) for x in inputs]
        mmdit = {"mmdit": self.params["mmdit"]}
        out = programs.velocity(self.model, mmdit, *device_inputs, num_targets=packed.num_targets)
        shapes = [np.shape(latent)[-2:] for latent in latents]
        return grids.unpack(to_host(out)[: len(latents)], shapes, config.patch_size, config.out_channels)

    def vae_encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [B, 3, H, W] in -1..1 -> posterior mean and log variance, float32 [B, C, H/8, W/8]."""
        moments = programs.vae_encode(self.model, self._vae, jnp.moveaxis(jnp.asarray(pixels), 1, -1))
        mean, logvar = (np.moveaxis(to_host(x).astype(np.float32), -1, 1) for x in moments)
        return mean, logvar

    def vae_decode(self, latents: np.ndarray) -> np.ndarray:
        """Normalised latents [B, C, h, w] -> pixels [B, 3, 8 h, 8 w], about -1..1."""
        pixels = programs.vae_decode(self.model, self._vae, jnp.asarray(latents), one_by_one=self.mesh.size == 1)
        return np.moveaxis(to_host(pixels), -1, 1)

    @property
    def _vae(self) -> programs.Params:
        return {"vae": self.params["vae"]}

    def _split(self, array: Any) -> jax.Array:
        return jax.device_put(array, batch_sharding(self.mesh, np.ndim(array)))

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

    def _check_size(self, height: int, width: int) -> None:
        unit = self.config.image_multiple
        if height % unit or width % unit or height < unit or width < unit:
            raise DeepGenError(f"size {width}x{height}: both sides must be multiples of {unit} pixels")
        largest = self.config.mmdit.pos_embed_max_size * self.config.mmdit.patch_size * self.config.vae.downscale
        if max(height, width) > largest:
            raise DeepGenError(
                f"image of {width}x{height} pixels: this model takes at most {largest} a side; shrink it"
            )

    def _checked(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures as their files would be read: upright, 8-bit sRGB, over white."""
        loaded = [load_image(image) for image in images]
        for image in loaded:
            self._check_size(image.height, image.width)
        return loaded

    def _requests(
        self,
        prompt: str | Sequence[str],
        image: ImageArgument,
        negative_prompt: str | Sequence[str | None] | None,
        seed: int | Sequence[int],
    ) -> Requests:
        """The arguments as one entry an image: checked, RGB, padded to what the mesh splits evenly."""
        requests = collect(prompt, image, negative_prompt, seed)
        distinct = {id(image): image for refs in requests.images for image in refs or ()}
        rgb = dict(zip(distinct, self._checked(list(distinct.values())), strict=True))
        images: list[Sequence[Image.Image] | None]
        images = [None if refs is None else [rgb[id(image)] for image in refs] for refs in requests.images]
        return replace(requests, images=images).padded(batch_size_multiple(self.mesh))

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
