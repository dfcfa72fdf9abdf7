"""What a run starts from: a model folder, perhaps with an earlier run's weights, as a trainable and a frozen tree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax import model_folder
from deepgen_jax.config import DeepGenConfig, LoRAConfig, SchedulerConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.loading import ADAPTED_PARTS, part_dtypes
from deepgen_jax.models import lora
from deepgen_jax.models.deepgen import abstract_params
from deepgen_jax.parallel import rules
from deepgen_jax.parallel.mesh import replicated
from deepgen_jax.training.checkpoint import load_weights, newest_step, stored_weights
from deepgen_jax.training.config import RunConfig
from deepgen_jax.training.inputs import sample_keys
from deepgen_jax.training.supervised import TrainState
from deepgen_jax.training.trees import Tree, init_lora, join, split

#: The name of a run's description, in its folder.
RUN_FILE = "config.json"
RUN_FORMAT, RUN_VERSION = "deepgen-jax-run", 1
# Keys of samples have a high word far below this.
_ADAPTERS_STREAM = 2**32 - 1


class Weights(NamedTuple):
    """Everything of the model that a run needs.

    Attributes:
      config: of the model; ``lora`` says which adapters train, None for none.
      scheduler: its noise schedule.
      tokenizer: folder of the tokenizer.
      trainable: {"params": float32 tree, "lora": float32 tree or {}} on the mesh.
      frozen: the other parameters, in the dtype of the computation.
    """

    config: DeepGenConfig
    scheduler: SchedulerConfig
    tokenizer: Path
    trainable: Tree
    frozen: Tree

    @property
    def lora_scale(self) -> float:
        """Alpha over rank of the adapters that train; 0 without any."""
        return self.config.lora.scale if self.config.lora else 0.0


def load_start(run: RunConfig, mesh: Mesh) -> Weights:
    """Reads the weights straight to their devices and dtypes.

    A model folder's adapters are merged, except those that go on training; the same holds for an earlier run's.

    Raises:
      DeepGenError: no such folder or run, or what it holds does not fit what the run trains.
    """
    folder = Path(run.model)
    manifest = model_folder.read_manifest(folder)
    adapts = "lora" in run.trains
    wanted = LoRAConfig(run.lora.rank, run.lora.alpha) if adapts else None
    config = replace(manifest.config, lora=wanted)
    earlier = _Earlier(Path(run.start), folder) if run.start else None
    adapters = model_folder.load_lora(folder, ADAPTED_PARTS, jnp.float32, replicated(mesh)) or {}
    scale = manifest.config.lora.scale if manifest.config.lora else 0.0
    going_on: Tree = {}
    if earlier and (later := earlier.adapters(mesh)):
        if "text" in adapters:
            raise DeepGenError(f"{folder} and {run.start} both hold adapters; convert the model without --keep-lora")
        adapters["text"], earlier_scale = later["text"], earlier.scale
    else:
        earlier_scale = scale
    if adapts and "text" in adapters:
        _check_adapters(adapters["text"], earlier_scale, config, run.start or str(folder))
        going_on = {"text": adapters.pop("text")}
    scales = {part: earlier_scale if part == "text" else scale for part in adapters}

    shardings = rules.shardings(abstract_params(config), mesh)
    params: Tree = {}
    for part, dtype in part_dtypes(config, jnp.dtype(run.dtype)).items():
        exact = part in run.trains
        read = jnp.float32 if exact or part in adapters else dtype
        params |= model_folder.load_params(folder, (part,), read, shardings)
        if earlier and part in earlier.parts:
            params[part] = {**params[part], **earlier.params(part, read, shardings[part])}
        if part in adapters:
            params[part] = _merged(params[part], adapters[part], scales[part], dtype, shardings[part])
    trainable, frozen = split(params, run.trains)
    if adapts and not going_on:
        going_on = _fresh_adapters(frozen["text"], run, mesh)
    return Weights(
        config,
        model_folder.read_scheduler(folder),
        folder / "tokenizer",
        {"params": trainable, "lora": _placed(going_on, mesh)},
        frozen,
    )


def current_params(weights: Weights, state: TrainState, dtype: DTypeLike, mesh: Mesh) -> Tree:
    """All parameters as a pipeline takes them: trained ones (their moving average, where there is one) in ``dtype``,
    adapters merged."""
    trained = state.trainable if state.ema is None else state.ema
    layout = rules.shardings(abstract_params(weights.config), mesh)

    def cast(params: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(dtype), params)

    params = jax.jit(cast)(trained["params"])
    out = join(weights.frozen, params)
    if trained["lora"]:
        out["text"] = _merged(out["text"], trained["lora"]["text"], weights.lora_scale, dtype, layout["text"])
    return out


def read_run(folder: Path) -> dict[str, Any]:
    """The description of a training run: {"kind", "config", ...}.

    Raises:
      DeepGenError: the folder is none of a training run.
    """
    path = folder / RUN_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        values = {}
    except ValueError as error:
        raise DeepGenError(f"{path} cannot be read ({error}); give the folder of another training run") from None
    if not isinstance(values, Mapping) or values.get("format") != RUN_FORMAT:
        raise DeepGenError(f"{folder} is no training run; give a folder that `deepgen train` wrote")
    if values.get("version") != RUN_VERSION:
        raise DeepGenError(f"{path} is of version {values.get('version')}, expected {RUN_VERSION}; update the package")
    return dict(values)


class _Earlier:
    """The newest weights of a run that came before."""

    def __init__(self, run: Path, model: Path) -> None:
        self._run = run
        description = read_run(run)
        base = Path(description["config"]["model"])
        if not _same_model(base, model):
            raise DeepGenError(f"{run} was trained on {base}, another model than {model}; give model={base}")
        self._step = newest_step(run)
        self._stored = stored_weights(run, self._step)
        self.parts = tuple(self._stored["params"])
        settings = description["config"]["lora"]
        self.scale = settings["alpha"] / settings["rank"]

    def params(self, part: str, dtype: Any, shardings: Mapping[str, Any]) -> Tree:
        """A part's weights that were trained (its tables that never train are absent)."""
        stored = self._stored["params"][part]
        return self._read("params", {part: _laid_out(stored, dtype, shardings)})[part]

    def adapters(self, mesh: Mesh) -> Tree:
        """{"text": float32 adapters}, or {}."""
        stored = self._stored["lora"]
        return self._read("lora", _laid_out(stored, jnp.float32, rules.shardings(stored, mesh))) if stored else {}

    def _read(self, name: str, wanted: Tree) -> Tree:
        return load_weights(self._run, self._step, {name: wanted})[name]


def _laid_out(stored: Tree, dtype: Any, shardings: Mapping[str, Any]) -> Tree:
    chosen = {name: shardings[name] for name in stored}
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where), stored, chosen)


def _same_model(one: Path, other: Path) -> bool:
    """Folders of the same model: the same place, or the same weights in another."""
    if one.absolute() == other.absolute() or not (one / "config.json").is_file():
        return True
    first, second = model_folder.read_manifest(one), model_folder.read_manifest(other)
    return first.config == second.config and first.files == second.files


def _check_adapters(adapters: Tree, scale: float, config: DeepGenConfig, where: str) -> None:
    assert config.lora is not None
    leaf = jax.tree.leaves(adapters)[0]
    rank = min(leaf.shape[-2:])
    if rank != config.lora.rank or scale != config.lora.scale:
        raise DeepGenError(
            f"{where} has adapters of rank {rank} and alpha {scale * rank:g}, the run asks for rank {config.lora.rank} "
            f"and alpha {config.lora.alpha:g}; set lora.rank={rank} lora.alpha={scale * rank:g}"
        )


def _merged(base: Tree, adapters: Tree, scale: float, dtype: Any, shardings: Any) -> Tree:
    fold = jax.jit(
        lambda base, low: jax.tree.map(lambda x: x.astype(dtype), lora.merged(base, low, scale)),
        out_shardings=shardings,
    )
    return fold(base, adapters)


def _fresh_adapters(text: Tree, run: RunConfig, mesh: Mesh) -> Tree:
    stream = jnp.array([[_ADAPTERS_STREAM, 0]], jnp.uint32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), text)

    def make() -> Tree:
        return init_lora(shapes, run.lora.rank, sample_keys(run.seed, stream)[0])

    return jax.jit(make, out_shardings=rules.shardings(jax.eval_shape(make), mesh))()


def _placed(adapters: Tree, mesh: Mesh) -> Tree:
    return jax.device_put(adapters, rules.shardings(adapters, mesh)) if adapters else {}
