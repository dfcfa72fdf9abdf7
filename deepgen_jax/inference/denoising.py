"""`Denoising`: a batch of images while it is sampled, a few steps at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from deepgen_jax.flow.samplers import State, get_sampler
from deepgen_jax.inference import programs
from deepgen_jax.inference.accelerated import Work
from deepgen_jax.models.deepgen import DeepGen


class Denoising:
    """Sampler state of a batch together with what its steps need; made by `DeepGenPipeline.start`.

    Attributes:
      noise: [B, C, h, w] float32, the initial noise.
      condition: of the prompts.
      sigmas: [N + 1] noise levels on the host.
      step: steps done.
      state: of the sampler; ``x`` and ``clean`` are tokens [B, T, D]. May be replaced between steps.
    """

    def __init__(
        self,
        model: DeepGen,
        params: programs.Params,
        noise: jax.Array,
        references: programs.References | None,
        condition: programs.Condition,
        sigmas: np.ndarray,
        guidance: jax.Array | np.float32 | None,
        sampler: str,
        keys: jax.Array | None,
        work: Work | None,
    ) -> None:
        """Takes the arguments of `programs.denoise_steps`."""
        self.noise, self.condition, self.sigmas = noise, condition, sigmas
        self._model, self._params, self._references = model, {"mmdit": params["mmdit"]}, references
        self._levels, self._guidance = jax.device_put(programs.padded_sigmas(sigmas)), guidance
        self._sampler, self._keys, self._work = sampler, keys, work
        self._size = (noise.shape[2], noise.shape[3])
        self.restart(noise, 0)

    def restart(self, sample: jax.Array, step: int) -> None:
        """Continues from ``sample`` [B, C, h, w], of noise level ``sigmas[step]``, instead."""
        self.state: State = programs.start_denoising(self._model, sample, self._sampler, self._work)
        self.step = step

    def advance(self, last: int) -> None:
        """Runs the steps before number ``last``."""
        self.state = programs.denoise_steps(
            self._model, self._params, self.state, self._references, self.condition, self._levels, self._guidance,
            np.int32(self.step), np.int32(last), self._keys, sampler=self._sampler, size=self._size,
        )  # fmt: skip
        self.step = last

    def latents(self) -> jax.Array:
        """The current sample, [B, C, h, w] float32."""
        return programs.to_latents(self._model, self.state.x, self._size)

    def clean_latents(self, row: int | None = None) -> jax.Array:
        """The clean latents predicted at the last step, [B, C, h, w] float32; of one row, B = 1, or of all."""
        clean = self.state.clean if row is None else self.state.clean[row : row + 1]
        return programs.to_latents(self._model, clean, self._size)


def prepare(
    model: DeepGen,
    params: programs.Params,
    rows: int,
    shape: tuple[int, int, int],
    length: int,
    references: programs.References | None,
    sampler: str,
    guided: bool,
    work: Work | None,
    decode: bool,
) -> None:
    """Begins to load or compile what images need after their condition, in the background.

    Args:
      model, params: of the pipeline, on one device.
      rows: images computed together.
      shape: [C, h, w] of the latents.
      length: of the condition.
      references, sampler, work: as `Denoising` takes them.
      guided: whether there is a negative prompt.
      decode: whether latents are decoded.
    """
    place, config = SingleDeviceSharding(next(iter(jax.tree.leaves(params)[0].devices()))), model.config

    def array(*shape: int, dtype: DTypeLike = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    noise, size, sides = array(rows, *shape), shape[1:], rows * (2 if guided else 1)
    condition = programs.Condition(
        array(sides, config.mmdit.pooled_projection_dim, dtype=model.dtype),
        array(sides, length, config.mmdit.joint_attention_dim, dtype=model.dtype),
        array(sides, length, dtype=jnp.bool_),
    )
    keys = None
    if get_sampler(sampler).stochastic:
        seeds = array(rows, dtype=jnp.uint32)
        keys = programs.sample_keys.prepare(seeds, seeds)
    state = programs.start_denoising.prepare(model, noise, sampler, work)
    levels = jax.tree.map(lambda x: array(*x.shape), programs.padded_sigmas(np.zeros(2, np.float32)))
    programs.denoise_steps.prepare(
        model, {"mmdit": params["mmdit"]}, state, references, condition, levels, array() if guided else None,
        np.int32(0), np.int32(1), keys, sampler=sampler, size=size,
    )  # fmt: skip
    if decode:
        programs.vae_decode.prepare(model, {"vae": params["vae"]}, noise, one_by_one=True)
    programs.to_latents.prepare(model, state.x, size)
