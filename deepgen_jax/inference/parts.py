"""The parts of a model as functions of prompts and pictures: tokens, conditions, velocities and latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from PIL import Image

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.images import load_image
from deepgen_jax.data.tokens import Padding, PromptTokenizer
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference import programs
from deepgen_jax.inference.conditioning import PromptEncoder
from deepgen_jax.inference.requests import ImageArgument, Requests, collect
from deepgen_jax.models import patches as grids
from deepgen_jax.models.deepgen import make_network
from deepgen_jax.parallel.mesh import batch_sharding, batch_size_multiple, to_host


class ModelParts:
    """A loaded model's language model with bridge, vision tower, MMDiT and VAE, each by itself.

    Attributes:
      config: the model.
      params: parameters, on ``mesh`` in their dtypes.
      tokenizer: of prompts.
      mesh: devices that batches are split over.
      model: the network.
    """

    def __init__(
        self,
        config: DeepGenConfig,
        params: programs.Params,
        tokenizer: PromptTokenizer,
        mesh: Mesh,
        dtype: DTypeLike,
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.params = params
        self.tokenizer = tokenizer
        self.model = make_network(config, mesh, dtype)
        self._prompts = PromptEncoder(self.model, params, tokenizer, mesh)

    @property
    def batch_multiple(self) -> int:
        """The mesh splits batches of multiples of this size evenly."""
        return batch_size_multiple(self.mesh)

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
