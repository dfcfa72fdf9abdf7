"""Knock-outs: measures how much the image changes when one component of the model is ablated.

Components are the selected layers of the language model (their channels into the bridge set to zero), blocks of think
tokens (their states replaced by the mean over all think tokens), and layers of the MMDiT (skipped in the residual
stream, as in Stable Flow, Avrahami et al. 2024, arXiv 2411.14430). The effect is the root mean square change of the
final latents relative to that between two seeds: 0 means no change, 1 a change as large as that of a new seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from deepgen_jax.evaluation.explain.heat_maps import encode, initial_noise, reference_latents, to_pixels
from deepgen_jax.flow.schedule import make_sigmas
from deepgen_jax.inference import programs
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.models import patches as grids
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.mmdit import block_runs
from deepgen_jax.models.qwen_text import selected_layers
from deepgen_jax.models.stack import restack

#: Number of blocks of think tokens.
THINK_BLOCKS = 8
# Paths within a layer of the projections that write to the residual stream.
_OUTPUTS = (("attn", "to_out"), ("attn", "add_out"), ("attn2", "to_out"), ("ff", "fc2"), ("ff_context", "fc2"))


class Effect(NamedTuple):
    """One knock-out.

    Attributes:
      kind: "vlm layer", "think tokens" or "mmdit layer".
      name: name of the component.
      effect: relative change, as defined in the module docstring.
      pixels: uint8 [H, W, 3], the image without the component.
    """

    kind: str
    name: str
    effect: float
    pixels: np.ndarray


@partial(jax.jit, static_argnames="model")
def _bridged(model: DeepGen, params: Any, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bridges states [n, 1, L, D] to the pooled and sequence condition, with all tokens visible."""
    visible = jnp.ones(states.shape[1:3], bool)
    found: Any = model.apply({"params": params}, states, visible, method=lambda whole, *x: whole.bridge(*x))
    return found


def without_layer(params: dict[str, Any], run: str, index: int) -> dict[str, Any]:
    """MMDiT parameters with one layer disabled: its output projections are zero.

    Args:
      params: MMDiT parameters.
      run: name of the stack of layers, such as "blocks_0".
      index: index of the layer within the stack.
    """

    def silenced(path: Any, x: jax.Array) -> jax.Array:
        names = tuple(entry.key for entry in path)
        return x.at[index].set(0) if names[:2] in _OUTPUTS else x

    return {**params, run: jax.tree_util.tree_map_with_path(silenced, params[run])}


def knock_out(
    pipe: DeepGenPipeline,
    prompt: str,
    images: Sequence[Image.Image] = (),
    *,
    width: int,
    height: int,
    steps: int,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Effect]:
    """Effects of all knock-outs on one image; takes the arguments of :func:`~.heat_maps.observe`.

    ``on_progress`` is called with the number of finished images and their total.
    """
    references = reference_latents(pipe, images)
    states = pipe.hidden_states(prompt, list(images) or None)[:, None]
    noise = initial_noise(pipe, width, height, seed)
    tokens = noise[0].size // pipe.config.mmdit.patch_size**2
    sigmas = np.asarray(make_sigmas(pipe.scheduler, steps, tokens))
    encode(pipe, prompt, images)  # rejects a prompt without words early

    def sample(x: np.ndarray, states: np.ndarray, mmdit: Any) -> np.ndarray:
        pooled, sequence = _bridged(pipe.model, {"bridge": pipe.params["bridge"]}, states)
        config = pipe.config.mmdit
        for sigma, following in itertools.pairwise(sigmas):
            packed = grids.pack([x], [references], patch_size=config.patch_size, max_size=config.pos_embed_max_size)
            velocity = programs.velocity(
                pipe.model, {"mmdit": mmdit}, packed.patches, packed.position_ids,
                np.array([sigma * 1000.0], np.float32), pooled, sequence, num_targets=packed.num_targets,
            )  # fmt: skip
            sizes = [x.shape[1:]]
            x = x + (following - sigma) * grids.unpack(velocity, sizes, config.patch_size, config.out_channels)[0]
        return x

    mmdit = restack({"mmdit": pipe.params["mmdit"]}, 1)["mmdit"]
    pieces = list(_pieces(pipe, states, mmdit))
    total = len(pieces) + 2
    whole = sample(noise, states, mmdit)
    on_progress(1, total)
    other = sample(initial_noise(pipe, width, height, seed + 1), states, mmdit)
    on_progress(2, total)
    unit = float(np.sqrt(np.mean((whole - other) ** 2)))
    effects = []
    for done, (kind, name, changed, weights) in enumerate(pieces, 3):
        latents = sample(noise, changed, weights())
        effect = float(np.sqrt(np.mean((latents - whole) ** 2))) / unit
        effects.append(Effect(kind, name, effect, to_pixels(pipe, latents)))
        on_progress(done, total)
    return effects


def _pieces(
    pipe: DeepGenPipeline, states: np.ndarray, mmdit: Any
) -> Iterator[tuple[str, str, np.ndarray, Callable[[], Any]]]:
    """Yields (kind, name, states, function that returns MMDiT parameters) of every knock-out."""
    config = pipe.config
    for row, layer in enumerate(selected_layers(config.text.num_layers, config.bridge.selection_stride)):
        changed = states.copy()
        changed[row] = 0
        yield "vlm layer", str(layer), changed, lambda: mmdit
    count = config.bridge.num_queries
    for block in np.array_split(np.arange(count), min(THINK_BLOCKS, count)) if count else ():
        changed = states.copy()
        think = changed[:, :, -count:]
        think[:, :, block] = think.mean(axis=2, keepdims=True)
        yield "think tokens", f"{block[0]} to {block[-1]}", changed, lambda: mmdit
    for i, run in enumerate(block_runs(config.mmdit)):
        for index in range(run.length):
            name = f"blocks_{i}"
            yield "mmdit layer", str(run.start + index), states, partial(without_layer, mmdit, name, index)
