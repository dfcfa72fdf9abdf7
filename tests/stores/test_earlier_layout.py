"""A model folder and a run of an earlier version of the package load, and the run continues as it would have.

`tests/fixtures/earlier_layout.tar.xz` was written before modules moved into ``deepgen_jax.stores``: a model folder, a
run of stage 2 with adapters and a moving average that was stopped after 2 of 4 steps, its pictures, and what the
earlier version logged of all 4 steps.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from support import runs

from deepgen_jax.convert import export
from deepgen_jax.models.deepgen import abstract_params
from deepgen_jax.stores import model_folder
from deepgen_jax.stores.lineage import read_starting_point
from deepgen_jax.stores.run_folder import read_run, saved_steps

CONFIG = """
from deepgen_jax.data.data_config import DataConfig, SourceConfig
from deepgen_jax.training.run_config import AdapterConfig, CheckpointConfig, LogConfig, SupervisedConfig
from deepgen_jax.training.optimizer import OptimizerConfig

def get_config():
    sources = (
        SourceConfig("pictures", "json", "{folder}/pictures.json"),
        SourceConfig("edits", "json", "{folder}/edits.json", task="edit"),
    )
    return SupervisedConfig(
        model="{folder}/model", out="{folder}/run", steps=4, trains=("bridge", "lora"), dtype="float32", remat="none",
        lora=AdapterConfig(rank=1, alpha=2, dropout=0.0), optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.1),
        ema_decay=0.9, seed=3,
        data=DataConfig(sources, micro_batch=2, image_size=32, min_side=16, token_multiple=64,
                        cache_dir="{folder}/index"),
        checkpoints=CheckpointConfig(every=2, keep_last=5), log=LogConfig(tensorboard=False, sample_ids=True),
    )
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).parents[1] / "fixtures" / "earlier_layout.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    # The run names the model where it was; it moved with the run.
    description = tmp_path / "run" / "config.json"
    text = description.read_text().replace("/old/", f"{tmp_path}/")
    text = text.replace('"model": "model"', f'"model": "{tmp_path}/model"')
    description.write_text(text)
    (tmp_path / "config.py").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def test_the_model_folder_loads(folder: Path):
    manifest = model_folder.read_manifest(folder / "model")
    params = model_folder.load_params(folder / "model")
    expected = abstract_params(manifest.config)
    assert jax.tree.structure(params) == jax.tree.structure({part: expected[part] for part in params})
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), params, {p: expected[p] for p in params})
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params))
    assert model_folder.read_scheduler(folder / "model").shift == 3.0


def test_the_run_loads_and_exports(folder: Path):
    assert read_run(folder / "run")["kind"] == "supervised"
    assert saved_steps(folder / "run") == [2]
    assert read_starting_point(folder / "run").model == folder / "model"
    export(folder / "run", "model", folder / "exported")
    before, after = (model_folder.load_params(folder / name, dtype="float32") for name in ("model", "exported"))
    changed = {
        part: any(bool((np.asarray(x) != np.asarray(y)).any()) for x, y in
                  zip(jax.tree.leaves(before[part]), jax.tree.leaves(after[part]), strict=True))
        for part in before
    }  # fmt: skip
    assert changed == {part: part == "bridge" for part in changed} | {"text": changed["text"]}


def test_the_run_continues_unchanged(folder: Path):
    runs.finish(runs.start(folder))
    expected = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = runs.metrics(folder / "run")
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm/bridge", "grad_norm/lora", "update_norm", "learning_rate"):
        np.testing.assert_allclose(
            [line[name] for line in found], [line[name] for line in expected], rtol=1e-4, err_msg=name
        )
    ids = (folder / "run" / "samples-0.jsonl").read_text()
    assert ids.splitlines() == (folder / "samples-0.jsonl").read_text().splitlines()
