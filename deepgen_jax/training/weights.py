"""Starting weights of a run, from a model folder and optionally an earlier run, as trainable and frozen trees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax.config import DeepGenConfig, LoRAConfig, SchedulerConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models.deepgen import abstract_params
from deepgen_jax.parallel import rules
from deepgen_jax.parallel.abstract import abstract_tree
from deepgen_jax.random_keys import Training
from deepgen_jax.stores import model_folder
from deepgen_jax.stores.checkpoint import load_weights, stored_weights
from deepgen_jax.stores.lineage import ADAPTED, Saved, adapter_scale, starting_point_of
from deepgen_jax.stores.merged_params import Adapters, load_merged, merge, part_dtypes, read_adapters
from deepgen_jax.training.inputs import sample_keys
from deepgen_jax.training.partition import Tree, init_lora, join, split
from deepgen_jax.training.run_config import RunConfig
from deepgen_jax.training.state import TrainState

#: Parts of the model that a step of flow matching or distillation runs.
STEP_PARTS = ("text", "bridge", "mmdit")


class Weights(NamedTuple):
    """Everything of the model that a run needs.

    Attributes:
      config: of the model; ``lora`` says which adapters train, None for none.
      scheduler: its noise schedule.
      tokenizer: folder of the tokenizer.
      trainable: {"params": float32 tree, "lora": float32 tree or {}} on the mesh.
      frozen: the other parameters, in the dtype of the computation.
      adapters_begun: trained adapters continue those of an earlier run, so ``frozen`` alone differs from its start.
    """

    config: DeepGenConfig
    scheduler: SchedulerConfig
    tokenizer: Path
    trainable: Tree
    frozen: Tree
    adapters_begun: bool = False

    @property
    def lora_scale(self) -> float:
        """Alpha over rank of the adapters that train; 0 without any."""
        return self.config.lora.scale if self.config.lora else 0.0


def load_start(run: RunConfig, mesh: Mesh) -> Weights:
    """Reads the weights straight to their devices and dtypes.

    What earlier runs trained replaces the model folder's; `deepgen_jax.stores.lineage` says what comes from where.
    Adapters are merged, except those that are trained further.

    Raises:
      DeepGenError: no such folder or run, or what it holds does not fit what the run trains.
    """
    folder = run.model_folder
    manifest = model_folder.read_manifest(folder)
    _refuse_untrainable(manifest.config, folder)
    adapted = _adapted_parts(run)
    config = _with_adapters(manifest.config, run)
    inherited = starting_point_of(run).inherited
    adapters = _read_adapters(folder, inherited, mesh)
    going_on = {part: adapters.pop(part) for part in adapted if part in adapters}
    for found in going_on.values():
        _check_adapters(found, config)

    shardings = rules.shardings(abstract_params(config), mesh)

    def earlier(part: str, dtype: DTypeLike) -> Tree:
        return _read_part(inherited[part], part, dtype, shardings[part]) if part in inherited else {}

    params = load_merged(folder, _dtypes(run, config), shardings, adapters, earlier)
    trainable, frozen = split(params, run.trains)
    trained = {part: found.tree for part, found in going_on.items()}
    trained |= {part: _new_adapters(frozen[part], part, run, mesh) for part in adapted if part not in going_on}
    return Weights(
        config,
        model_folder.read_scheduler(folder),
        folder / "tokenizer",
        {"params": trainable, "lora": _placed(trained, mesh)},
        frozen,
        bool(going_on),
    )


def abstract_start(run: RunConfig, model: DeepGenConfig, mesh: Mesh) -> Weights:
    """Abstract :func:`load_start`: shapes with shardings for a model of any size, without reading a folder.

    The schedule is the default one, and the tokenizer's folder is empty.
    """
    _refuse_untrainable(model, run.model_folder)
    config, shapes = _with_adapters(model, run), abstract_params(model)
    params: Tree = {}
    for part, dtype in _dtypes(run, config).items():
        params |= abstract_tree({part: shapes[part]}, mesh, dtype)
    trainable, frozen = split(params, run.trains)
    adapters: Tree = {}
    for part in _adapted_parts(run):
        new = jax.eval_shape(partial(init_lora, shapes[part], run.lora.rank, part=part), jax.random.key(0))
        adapters |= abstract_tree(new, mesh, jnp.float32)
    return Weights(config, SchedulerConfig(), Path(), {"params": trainable, "lora": adapters}, frozen)


def _refuse_untrainable(config: DeepGenConfig, folder: Path) -> None:
    """Raises a DeepGenError for 8-bit weights, which neither train nor export, and for few-step models."""
    if config.few_step:
        raise DeepGenError(
            f"{folder} was distilled to {config.num_inference_steps} evaluations, and no training continues from that; "
            "name the model folder or run that it was distilled from"
        )
    if config.quantization is not None:
        raise DeepGenError(
            f"{folder} has {config.quantization.weights} weights, which cannot be trained; name the model folder that "
            "it was made from"
        )


def _adapted_parts(run: RunConfig) -> list[str]:
    """Parts whose adapters train."""
    return [part for name, part in ADAPTED.items() if name in run.trains]


def _with_adapters(config: DeepGenConfig, run: RunConfig) -> DeepGenConfig:
    """The model's configuration with the adapters that train, instead of those that its folder holds."""
    return replace(config, lora=LoRAConfig(run.lora.rank, run.lora.alpha) if _adapted_parts(run) else None)


def _dtypes(run: RunConfig, config: DeepGenConfig) -> dict[str, Any]:
    """Dtype of each part's weights: float32 where they train."""
    dtypes = part_dtypes(config, jnp.dtype(run.dtype))
    return {part: jnp.float32 if part in run.trains else dtype for part, dtype in dtypes.items()}


def current_params(weights: Weights, state: TrainState, dtype: DTypeLike, mesh: Mesh) -> Tree:
    """All parameters as a pipeline takes them: trained ones (their moving average, if there is one) in ``dtype``,
    adapters merged."""
    trained = state.trainable if state.ema is None else state.ema
    layout = rules.shardings(abstract_params(weights.config), mesh)

    def cast(params: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(dtype), params)

    params = jax.jit(cast)(trained["params"])
    out = join(weights.frozen, params)
    for part, adapters in trained["lora"].items():
        out[part] = merge(out[part], adapters, weights.lora_scale, dtype, layout[part])
    return out


def _read_adapters(folder: Path, inherited: Mapping[str, Saved], mesh: Mesh) -> dict[str, Adapters]:
    """Adapters by part: the model folder's, and in their place those of earlier runs."""
    found = read_adapters(folder, mesh)
    for name, part in ADAPTED.items():
        if name in inherited:
            run, step = inherited[name]
            stored = {part: stored_weights(run, step)["lora"][part]}
            wanted = _laid_out(stored, jnp.float32, rules.shardings(stored, mesh))
            tree = load_weights(run, step, {"lora": wanted})["lora"]
            found[part] = Adapters(tree[part], adapter_scale(run), run)
    return found


def _read_part(at: Saved, part: str, dtype: Any, shardings: Mapping[str, Any]) -> Tree:
    """A part's weights that were trained (its tables that never train are absent)."""
    stored = stored_weights(at.run, at.step)["params"][part]
    wanted = {"params": {part: _laid_out(stored, dtype, shardings)}}
    return load_weights(at.run, at.step, wanted)["params"][part]


def _laid_out(stored: Tree, dtype: Any, shardings: Mapping[str, Any]) -> Tree:
    chosen = {name: shardings[name] for name in stored}
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where), stored, chosen)


def _check_adapters(adapters: Adapters, config: DeepGenConfig) -> None:
    assert config.lora is not None
    leaf = jax.tree.leaves(adapters.tree)[0]
    rank, scale = min(leaf.shape[-2:]), adapters.scale
    if rank != config.lora.rank or scale != config.lora.scale:
        raise DeepGenError(
            f"{adapters.where} has adapters of rank {rank} and alpha {scale * rank:g}, the run asks for rank "
            f"{config.lora.rank} and alpha {config.lora.alpha:g}; set lora.rank={rank} lora.alpha={scale * rank:g}"
        )


def _new_adapters(params: Tree, part: str, run: RunConfig, mesh: Mesh) -> Tree:
    stream = jnp.array([[Training.ADAPTERS, list(ADAPTED.values()).index(part)]], jnp.uint32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def make() -> Tree:
        return init_lora(shapes, run.lora.rank, sample_keys(run.seed, stream)[0], part)

    return jax.jit(make, out_shardings=rules.shardings(jax.eval_shape(make), mesh))()[part]


def _placed(adapters: Tree, mesh: Mesh) -> Tree:
    return jax.device_put(adapters, rules.shardings(adapters, mesh)) if adapters else {}
