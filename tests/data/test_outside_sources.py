"""A data source from outside the package: registered, installed as a wheel, or named as a class on the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.make_data import TOKENIZER, model, t2i_samples
from support.plugins import install_wheel

from deepgen_jax import settings
from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.data.loader import Loader
from deepgen_jax.data.sources import open_source, register
from deepgen_jax.errors import DeepGenError
from deepgen_jax.training import config_files

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
#: The example of the page: pictures named after their captions, 0001-a_red_circle.png.
SOURCE = next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "class " in block)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, sample in enumerate(t2i_samples(8, ((96, 96),))):
        (folder / f"{number:04d}-a_red_circle_{number}.jpg").write_bytes(sample.image)
    return folder


def deepgen(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deepgen_jax.cli.main", *words]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def inspect(kind: str, path: Path, model_folder: Path, tmp_path: Path, *more: str, **environment: str) -> dict:
    source = f"data.sources.pairs.kind={kind}"
    config = tmp_path / "config.py"
    config.write_text(
        "from dataclasses import replace\n"
        "from deepgen_jax.configs.tiny_pretrain import get_config as tiny\n"
        "from deepgen_jax.data.data_config import MixtureConfig, SourceConfig\n"
        "def get_config():\n"
        "    config = tiny()\n"
        "    sources = (SourceConfig('pairs', 'json', 'list.json'),)\n"
        "    return replace(config, data=replace(config.data, sources=sources, mixture=MixtureConfig(('t2i',))))\n"
    )
    words = [str(config), source, f"data.sources.pairs.path={path}", f"model={model_folder}", *more]
    run = deepgen(
        "data", "inspect", *words, f"data.cache_dir={tmp_path}/cache", "data.workers=1",
        "--contact-sheet", "", "--seconds", "0.01", "--json", **environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_file_on_the_command_line(tmp_path: Path, pictures: Path, folders):
    (tmp_path / "my_source.py").write_text(SOURCE)
    (pictures / "nameless.jpg").write_bytes(t2i_samples(1)[0].image)
    report = inspect(
        f"{tmp_path}/my_source.py:NamedPictures", pictures, folders("none"), tmp_path, "data.max_bad_share=0.2"
    )
    assert report["sources"][0]["usable"] == 8
    assert report["sources"][0]["bad"] == {"no caption in name": 1}
    assert report["sources"][0]["examples"]["no caption in name"] == f"{pictures}/nameless.jpg"


def test_an_installed_wheel(tmp_path: Path, pictures: Path, folders):
    point = {"deepgen_jax.data_sources": "named_pictures = my_pictures:NamedPictures"}
    site = str(install_wheel(tmp_path, "my_pictures", SOURCE, point))
    for kind in ("named_pictures", "my_pictures:NamedPictures"):
        report = inspect(kind, pictures, folders("none"), tmp_path, PYTHONPATH=site)
        assert report["sources"][0]["usable"] == 8


def test_a_registered_class_reaches_worker_processes(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "registered_pictures.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    register("registered_pictures", "registered_pictures:NamedPictures")
    source = SourceConfig("s", "registered_pictures", str(pictures))
    runs = []
    for workers in (0, 1):
        config = DataConfig(
            (source,), 4, MixtureConfig(("t2i",)), image_size=64, cache_dir=str(tmp_path / "cache"), workers=workers,
            index_workers=2,
        )  # fmt: skip
        with Loader(config, model(), TOKENIZER) as loader:
            runs.append([next(loader) for _ in range(3)])
    names = {name.partition("@")[0] for batch in runs[0] for name in batch["sample_ids"]}
    assert names == {f"s/{row}" for row in range(8)}
    for one, other in zip(*runs, strict=True):
        np.testing.assert_array_equal(one["target"], other["target"])


def test_mistakes_name_the_source(tmp_path: Path):
    config = config_files.load_config("tiny_pretrain")
    names = [source.name for source in config.data.sources]
    with pytest.raises(DeepGenError, match=f"source {names[0]}: kind: 'jsn' is unknown; did you mean json"):
        settings.apply(config, [f"data.sources.{names[0]}.kind=jsn"])
    (tmp_path / "mine.py").write_text("class Mine: pass\n")
    with pytest.raises(DeepGenError, match=r"source s: kind: .*mine.py:Mine is no subclass of .*\.Source"):
        open_source(SourceConfig("s", f"{tmp_path}/mine.py:Mine", "x"))


def test_the_embedded_world_is_an_entry_point(tmp_path: Path):
    from deepgen_jax.data.source_kinds import SOURCE_KINDS

    assert SOURCE_KINDS.target("synthetic") == "deepgen_jax.nano.source:Synthetic"
    assert len(list(open_source(SourceConfig("w", "synthetic", "size=64,samples=3")).scan(""))) == 3


