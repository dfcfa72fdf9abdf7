"""The pipeline's weights, inputs and programs as shapes; see `deepgen_jax.parallel.abstract`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.tokens import round_up
from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow.samplers import get_sampler
from deepgen_jax.inference import programs
from deepgen_jax.inference.conditioning import SEQUENCE_BUCKET
from deepgen_jax.inference.guidance import Condition
from deepgen_jax.models import flops
from deepgen_jax.models.deepgen import DeepGen, abstract_params, make_network
from deepgen_jax.models.quantized import keeps_dtype
from deepgen_jax.models.stack import unrolls, unstack
from deepgen_jax.parallel.abstract import AbstractProgram, Tree, abstract_array, abstract_tree
from deepgen_jax.stores.merged_params import part_dtypes


def abstract_weights(config: DeepGenConfig, mesh: Mesh, dtype: DTypeLike, *, stacked: bool = False) -> Tree:
    """Weights of all parts as the pipeline holds them.

    Args:
      config: of the model.
      mesh: that weights are split over.
      dtype: of the computation.
      stacked: keep layers stacked where the pipeline would split them (`deepgen_jax.models.stack.unrolls`).
    """
    dtypes = part_dtypes(config, jnp.dtype(dtype))
    weights: Tree = {}
    for part, tree in abstract_params(config).items():
        held = {part: jax.tree_util.tree_map_with_path(partial(_held, dtypes[part]), tree)}
        if unrolls(mesh) and not stacked:
            held = unstack(held)
        weights |= abstract_tree(held, mesh, None)
    return weights


def _held(dtype: DTypeLike, path: tuple[Any, ...], leaf: Any) -> Any:
    return leaf if keeps_dtype(path[-1].key, leaf.dtype) else jax.ShapeDtypeStruct(leaf.shape, dtype)


def abstract_condition(
    config: DeepGenConfig, mesh: Mesh, rows: int, length: int, dtype: DTypeLike, axis: int | None
) -> Condition:
    """A condition of ``rows`` sequences of ``length`` tokens, split over the batch along ``axis``."""
    mmdit = config.mmdit

    def array(*shape: int, dtype: DTypeLike = dtype) -> Any:
        return abstract_array(mesh, rows, *shape, dtype=dtype, axis=axis)

    return Condition(
        array(mmdit.pooled_projection_dim), array(length, mmdit.joint_attention_dim), array(length, dtype=jnp.bool_)
    )


def sequence_length(config: DeepGenConfig, prompt_tokens: int) -> int:
    """Length of the sequence of a prompt with its think tokens, padded as the pipeline pads it."""
    return round_up(prompt_tokens + config.bridge.num_queries, SEQUENCE_BUCKET)


def image_tokens(config: DeepGenConfig, side: int) -> int:
    """MMDiT tokens of a square image of ``side`` pixels.

    Raises:
      DeepGenError: the image is not a whole number of patches.
    """
    unit = config.vae.downscale * config.mmdit.patch_size
    if side % unit:
        raise DeepGenError(f"images of {side} pixels do not divide into patches of {unit}; change the image size")
    return (side // unit) ** 2


@dataclass(frozen=True)
class AbstractImages:
    """Text-to-image generation of a batch of square images, as programs on shapes.

    Attributes:
      config: of the model.
      mesh: that images are split over.
      dtype: of the computation.
      batch: images.
      side: height and width of the images in pixels.
      steps: of the sampler.
      sampler: its name.
      guided: with classifier-free guidance.
      prompt_tokens: of a prompt with its template.
      stacked: keep layers stacked where the pipeline would split them.
    """

    config: DeepGenConfig
    mesh: Mesh
    dtype: DTypeLike
    batch: int
    side: int
    steps: int
    prompt_tokens: int
    sampler: str = "euler"
    guided: bool = True
    stacked: bool = False

    @cached_property
    def _model(self) -> DeepGen:
        return make_network(self.config, self.mesh, self.dtype)

    @cached_property
    def _weights(self) -> Tree:
        return abstract_weights(self.config, self.mesh, self.dtype, stacked=self.stacked)

    @property
    def _rows(self) -> int:
        """Sequences of a batch: with guidance, prompt and negative prompt of each image."""
        return self.batch * (2 if self.guided else 1)

    @property
    def _length(self) -> int:
        return sequence_length(self.config, self.prompt_tokens)

    @property
    def _latents(self) -> Any:
        edge = self.side // self.config.vae.downscale
        return abstract_array(self.mesh, self.batch, self.config.mmdit.in_channels, edge, edge, axis=0)

    def denoising(self) -> AbstractProgram:
        """All steps of the sampler."""
        config, model = self.config, self._model
        tokens, length = image_tokens(config, self.side), self._length
        noise = self._latents
        condition = abstract_condition(config, self.mesh, self._rows, length, model.dtype, axis=0)
        sigmas = abstract_array(self.mesh, self.steps + 1)
        scale = abstract_array(self.mesh) if self.guided else None
        arguments = ({"mmdit": self._weights["mmdit"]}, noise, None, condition, sigmas, scale)
        evaluations = self.steps * get_sampler(self.sampler).evaluations
        how = f"{self.steps} {'guided ' if self.guided else ''}steps of {self.sampler}"
        return self._program(
            "inference",
            lambda: programs.denoise.lower(model, *arguments, sampler=self.sampler),
            arguments,
            (noise, condition),
            self._rows * evaluations * flops.mmdit(config.mmdit, tokens, length),
            f"{self.batch} images of {self.side}x{self.side}, {how}, sequence {length}",
        )

    def prompts(self) -> AbstractProgram:
        """Language model and bridge."""
        rows, length, model = self._rows, self._length, self._model
        ids = abstract_array(self.mesh, rows, length - self.config.bridge.num_queries, dtype=jnp.int32, axis=0)
        positions = abstract_array(self.mesh, 3, rows, length, dtype=jnp.int32, axis=1)
        real = abstract_array(self.mesh, rows, length, dtype=jnp.bool_, axis=0)
        arguments = ({part: self._weights[part] for part in ("text", "bridge")}, ids, positions, real, real)
        return self._program(
            "prompts",
            lambda: programs.condition.lower(model, *arguments),
            arguments,
            arguments[1:],
            rows * flops.condition(self.config, length),
            f"{rows} prompts, sequence {length}",
        )

    def decoding(self) -> AbstractProgram:
        """The VAE's decoder."""
        model, latents = self._model, self._latents
        arguments = ({"vae": self._weights["vae"]}, latents)
        return self._program(
            "decoder",
            lambda: programs.vae_decode.lower(model, *arguments, one_by_one=self.mesh.size == 1),
            arguments,
            latents,
            self.batch * flops.vae_decoder(self.config.vae, self.side, self.side),
            f"{self.batch} images of {self.side}x{self.side}",
        )

    def _program(
        self, name: str, lower: Callable[[], Any], arguments: Any, inputs: Any, operations: int, summary: str
    ) -> AbstractProgram:
        how = self.config.quantization
        weights = "" if how is None else f", {how.weights} {'weights and products' if how.products else 'weights'}"
        return AbstractProgram(
            name=name,
            unit="images",
            batch=self.batch,
            micro_batch=self.batch,
            lower=lower,
            arguments=arguments,
            memory={"frozen weights": self._weights, "batch": inputs},
            flops=float(operations),
            summary=(summary, f"attention {self._model.plan.kernel}{weights}"),
            half_batch=f"--batch {self.batch // 2}",
        )
