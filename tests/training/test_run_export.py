"""A run's checkpoint exported to a model folder or a release is the model that the run itself makes pictures with."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from deepgen_jax.cli.main import main
from deepgen_jax.convert import convert, export
from deepgen_jax.convert.random_release import tiny_config, write_release
from deepgen_jax.data.data_config import DataConfig, SourceConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.loading import load_model
from deepgen_jax.parallel.mesh import make_mesh
from deepgen_jax.stores.checkpoint import Checkpoints
from deepgen_jax.stores.lineage import Saved, starting_point_of, trained_until
from deepgen_jax.stores.model_folder import read_manifest
from deepgen_jax.stores.run_folder import saved_steps
from deepgen_jax.training.loop import describe
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.run_config import AdapterConfig, CheckpointConfig, SupervisedConfig
from deepgen_jax.training.state import TrainState
from deepgen_jax.training.weights import Weights, current_params, load_start

#: Never read.
SOURCES = tuple(SourceConfig(task, "json", "none.json", task=task) for task in ("t2i", "edit"))


@dataclasses.dataclass
class Run:
    """A run after some steps, with random instead of trained weights."""

    config: SupervisedConfig
    weights: Weights
    state: TrainState
    mesh: Mesh

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    def params(self, *, ema: bool) -> Tree:
        """What the stage's pipeline computes with."""
        state = self.state if ema else self.state._replace(ema=None)
        return current_params(self.weights, state, "float32", self.mesh)

    def train_on(self, step: int) -> Run:
        """Other weights at a later step."""
        state = self.state._replace(trainable=moved(self.state.trainable, step), step=jnp.int32(step))
        with Checkpoints(self.folder, self.config.checkpoints.keep_last) as checkpoints:
            checkpoints.save(step, state, {"stage": {}, "skipped": 0})
        return dataclasses.replace(self, state=state)


def moved(tree: Tree, seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.02 * rng.standard_normal(x.shape, np.float32)), tree)


def begin(folder: Path, model: Path, trains: tuple[str, ...], step: int = 3, **changes: Any) -> Run:
    """Launches a run as the loop does, and saves its checkpoint of a step."""
    config = SupervisedConfig(
        model=str(model), out=str(folder), steps=9, trains=trains, dtype="float32", remat="none",
        data=DataConfig(sources=SOURCES, micro_batch=1),
        lora=AdapterConfig(rank=4, alpha=8), checkpoints=CheckpointConfig(keep_last=9), **changes,
    )  # fmt: skip
    mesh = make_mesh(None)
    describe(folder, config)
    weights = load_start(config, mesh)
    average = moved(weights.trainable, 77) if config.ema_decay else None
    state = TrainState(jnp.int32(0), weights.trainable, {"count": jnp.int32(0)}, average, jnp.int32(0))
    return Run(config, weights, state, mesh).train_on(step)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder in bfloat16."""
    folder = tmp_path_factory.mktemp("tiny")
    write_release(folder / "release", tiny_config())
    convert(out=folder / "model", diffusers=folder / "release")
    return folder / "model"


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Stage 1."""
    return begin(tmp_path_factory.mktemp("runs") / "first", model, ("bridge",))


@pytest.fixture(scope="module")
def second(model: Path, first: Run) -> Run:
    """Stage 2 after it, with a moving average."""
    trains = ("bridge", "mmdit", "lora")
    run = begin(first.folder.parent / "second", model, trains, start=str(first.folder), ema_decay=0.9)
    return run.train_on(6)


def assert_same_model(folder: Path, params: Tree, tolerance: float = 1e-6) -> None:
    """A model folder's pipeline computes with ``params``."""
    got = flatten_dict(load_model(folder, "float32", None)[2], sep="/")
    wanted = flatten_dict(params, sep="/")
    assert got.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_allclose(np.asarray(got[path]), np.asarray(value), rtol=0, atol=tolerance, err_msg=path)


def test_stage_1(first: Run, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        export(first.folder, "model", tmp_path / "m")
    assert not caplog.records
    assert_same_model(tmp_path / "m", first.params(ema=False), 0)
    base, ours = read_manifest(model), read_manifest(tmp_path / "m")
    assert ours.config == base.config
    assert {part: summary.count for part, summary in ours.parameters.items()} == {
        part: summary.count for part, summary in base.parameters.items()
    }
    assert set(ours.parameters["bridge"].dtypes) == {"float32"}
    assert set(ours.parameters["mmdit"].dtypes) == set(ours.parameters["unused"].dtypes) == {"bfloat16"}
    run, folder = ours.provenance["sources"]
    assert (run["path"], run["step"], run["ema"]) == (str(first.folder), 3, False)
    assert (folder["path"], folder["provenance"]) == (str(model), base.provenance)
    for name in ("scheduler_config.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "m" / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize(("ema", "keep_lora"), [(False, False), (True, True), (True, False)])
def test_stage_2(second: Run, tmp_path: Path, ema: bool, keep_lora: bool) -> None:
    export(second.folder, "model", tmp_path / "m", ema=ema, keep_lora=keep_lora)
    assert_same_model(tmp_path / "m", second.params(ema=ema))
    manifest = read_manifest(tmp_path / "m")
    assert ("lora" in manifest.parameters) == (manifest.config.lora is not None) == keep_lora
    assert set(manifest.parameters["text"].dtypes) == {"bfloat16"} if keep_lora else {"float32"}
    assert bool(manifest.provenance["merged_adapters"]) != keep_lora
    assert manifest.provenance["sources"][0]["ema"] == ema


def test_releases(second: Run, data_dir: Path, tmp_path: Path) -> None:
    """The layouts without a model folder in between equal those of the model folder."""
    export(second.folder, "diffusers", tmp_path / "release")
    convert(out=tmp_path / "m", diffusers=tmp_path / "release")
    assert_same_model(tmp_path / "m", second.params(ema=False))
    export(second.folder, "model", tmp_path / "kept", keep_lora=True)
    export(tmp_path / "kept", "pth", tmp_path / "by_folder.pth")
    export(second.folder, "pth", tmp_path / "at_once.pth", keep_lora=True)
    at_once = (tmp_path / "at_once.pth").read_bytes()
    assert at_once == (tmp_path / "by_folder.pth").read_bytes()
    export(second.folder, "pth", tmp_path / "earlier.pth", keep_lora=True, step=3)
    assert at_once != (tmp_path / "earlier.pth").read_bytes()


def test_half_the_size(first: Run, tmp_path: Path) -> None:
    export(first.folder, "model", tmp_path / "m", dtype="bfloat16")
    dtypes = {dtype for summary in read_manifest(tmp_path / "m").parameters.values() for dtype in summary.dtypes}
    assert dtypes == {"bfloat16"}
    assert_same_model(tmp_path / "m", first.params(ema=False), 0.02)


def test_weights_from_several_runs_back(first: Run, second: Run, model: Path, tmp_path: Path) -> None:
    """Adapters on the MMDiT, then the MMDiT itself: the bridge and the language model's adapters stay stage 2's."""
    third = begin(tmp_path / "third", model, ("mmdit_lora",), start=str(second.folder))
    assert third.weights.trainable["lora"].keys() == {"mmdit"}
    fourth = begin(tmp_path / "fourth", model, ("mmdit",), start=str(third.folder))
    stage_2 = flatten_dict(second.params(ema=False), sep="/")
    for run in (third, fourth):
        now = run.params(ema=False)
        for path, value in flatten_dict({part: now[part] for part in ("bridge", "text")}, sep="/").items():
            np.testing.assert_allclose(np.asarray(value), np.asarray(stage_2[path]), rtol=0, atol=1e-6, err_msg=path)
        export(run.folder, "model", tmp_path / f"{run.folder.name}-model")
        assert_same_model(tmp_path / f"{run.folder.name}-model", now)
    sources = read_manifest(tmp_path / "third-model").provenance["sources"]
    assert [(source["path"], source.get("trained")) for source in sources] == [
        (str(third.folder), ["mmdit_lora"]),
        (str(second.folder), ["bridge", "mmdit", "lora"]),
        (str(model), None),
    ]
    with pytest.raises(DeepGenError, match="no adapters on the MMDiT; leave out --keep-lora"):
        export(third.folder, "model", tmp_path / "n", keep_lora=True)
    # What trains in full has taken the adapters in, and those that train again replace the earlier ones.
    second_at, fourth_at = Saved(second.folder, 6), Saved(fourth.folder, 3)
    assert trained_until(fourth.folder, 3) == {"bridge": second_at, "lora": second_at, "mmdit": fourth_at}
    again = dataclasses.replace(third.config, start=str(third.folder), out=str(tmp_path / "again"))
    assert starting_point_of(again).inherited["mmdit_lora"] == Saved(third.folder, 3)


def test_the_starting_point_is_pinned_and_may_move(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither training the earlier run on nor working in another folder changes it."""
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    earlier = begin(Path("earlier"), Path("model"), ("mmdit",))
    run = begin(Path("run"), Path("model"), ("bridge",), start="earlier")
    earlier.train_on(6)
    describe(run.folder, run.config)
    again = flatten_dict(load_start(run.config, run.mesh).frozen, sep="/")
    for path, value in flatten_dict(run.weights.frozen, sep="/").items():
        np.testing.assert_array_equal(np.asarray(again[path]), np.asarray(value), err_msg=path)
    params = run.params(ema=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    export(tmp_path / "run", "model", "m")
    assert_same_model(Path("m"), params, 0)
    assert read_manifest("m").provenance["sources"][1]["step"] == 3
    (tmp_path / "model").rename("model")
    (tmp_path / "earlier").rename("earlier")
    with pytest.raises(DeepGenError, match=r"/model, which is gone; give --model FOLDER, its place now"):
        export(tmp_path / "run", "model", "n")
    with pytest.raises(DeepGenError, match=r"has its mmdit from .*/earlier, which is gone; give --start FOLDER"):
        export(tmp_path / "run", "model", "n", model="model")
    export(tmp_path / "run", "pth", "by_run.pth", model="model", start="earlier")
    export("m", "pth", "by_folder.pth")
    assert Path("by_run.pth").read_bytes() == Path("by_folder.pth").read_bytes()


def test_checkpoints_that_runs_start_from_are_kept(model: Path, tmp_path: Path) -> None:
    """However many checkpoints come after it; the rest go as the run's settings say."""
    earlier = begin(tmp_path / "earlier", model, ("bridge",))
    begin(tmp_path / "run", model, ("mmdit",), start=str(tmp_path / "earlier"))
    settings = dataclasses.replace(earlier.config, checkpoints=CheckpointConfig(keep_last=2))
    for step in (4, 5, 6):
        dataclasses.replace(earlier, config=settings).train_on(step)
    assert saved_steps(earlier.folder) == [3, 5, 6]


def test_another_model_is_refused(first: Run, tmp_path: Path) -> None:
    config = tiny_config()
    wider = dataclasses.replace(config, bridge=dataclasses.replace(config.bridge, intermediate_size=64))
    write_release(tmp_path / "release", wider)
    convert(out=tmp_path / "m", diffusers=tmp_path / "release")
    with pytest.raises(DeepGenError, match=r"does not fit .* at bridge/layers/fc1/bias; give the model"):
        export(first.folder, "model", tmp_path / "n", model=tmp_path / "m")


def test_an_interrupted_export_leaves_nothing(
    first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepgen_jax.convert import stored_params

    def fail(batch: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(stored_params, "_read", fail)
    (tmp_path / "place").mkdir()
    for format in ("model", "diffusers", "pth"):
        with pytest.raises(KeyboardInterrupt):
            export(first.folder, format, tmp_path / "place" / "x")  # type: ignore[arg-type]
        assert list((tmp_path / "place").iterdir()) == []


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """What the command says when it refuses, in one line with status 2."""

    def check(*words: str | Path) -> str:
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("deepgen: error: ")
        assert said.count("\n") == 1
        return said

    return check


def test_refusals(first: Run, second: Run, model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = ("--out", tmp_path / "place" / "x", "--format")
    assert "has no checkpoint of step 4; it has 3, 6" in refused("export", second.folder, *out, "model", "--step", "4")
    assert "has no moving average" in refused("export", first.folder, *out, "model", "--ema")
    assert "no adapters to keep" in refused("export", first.folder, *out, "model", "--keep-lora")
    assert "no place for adapters" in refused("export", second.folder, *out, "diffusers", "--keep-lora")
    assert "is a model folder already" in refused("export", model, *out, "model")
    assert "--step is for training runs" in refused("export", model, *out, "pth", "--step", "3")
    describe(tmp_path / "new", dataclasses.replace(first.config, out=str(tmp_path / "new")))
    assert "has no checkpoint; give the folder" in refused("export", tmp_path / "new", *out, "model")
    assert f"run `deepgen export {first.folder} --format model --out FOLDER`" in refused("generate", first.folder, "x")
    assert not (tmp_path / "place").exists()


def test_the_command_and_the_summary_of_both(
    second: Run, first: Run, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = '{"step": 5, "loss": 2.0}\n{"step": 6, "time": 1.0, "loss": 1.25}\n{"s'
    (second.folder / "metrics.jsonl").write_text(lines)
    assert main(["info", str(second.folder)]) == 0
    told = capsys.readouterr().out
    for wanted in (
        "supervised, 9 steps, trains bridge, mmdit, lora",
        "step 6 (and 3), with moving average",
        f"model           {model}",
        f"continues       {first.folder}, step 3 (bridge)",
        "step 6: loss 1.25",
    ):
        assert wanted in told
    assert main(["info", str(second.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"] == [3, 6]

    words = ["export", str(second.folder), "--format", "model", "--out", str(tmp_path / "m"), "--ema"]
    done = subprocess.run([sys.executable, "-m", "deepgen_jax.cli.main", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {tmp_path / 'm'}\n", "")
    assert main(["info", str(tmp_path / "m")]) == 0
    told = capsys.readouterr().out
    assert f"{second.folder} (supervised run, step 6, moving average)" in told
    assert "adapters merged into the weights" in told


def test_summary_of_a_run_needs_no_jax(first: Run) -> None:
    program = f"""
import sys
from deepgen_jax.cli.main import main
assert main(["info", {str(first.folder)!r}]) == 0
assert not {{"jax", "orbax", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
