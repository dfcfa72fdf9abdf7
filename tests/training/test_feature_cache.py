"""Cached features: losses as from pictures, resumption, refusals, bad samples, and the loader's continuation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.make_data import Sample, edit_samples, encoded, t2i_samples, write_json

from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.data.feature_files import read_features, write_features
from deepgen_jax.data.loader import Loader
from deepgen_jax.data.sources.array_record import ShardReaders
from deepgen_jax.data.sources.base import CachedImage
from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import PARTIAL_PREFIX
from deepgen_jax.inference.cache import enable_compilation_cache
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.stores import model_folder
from deepgen_jax.stores.run_folder import RUN_FORMAT, RUN_VERSION
from deepgen_jax.training.encoders import check_untrained, digest_for, encoder_digest
from deepgen_jax.training.feature_cache import cache_features
from deepgen_jax.training.inputs import Features, MicroBatch, Moments, Text, TokenBudget, assemble, encode
from deepgen_jax.training.run_config import SupervisedConfig
from deepgen_jax.training.step_batches import open_loader
from deepgen_jax.training.supervised import Draws, supervised_losses

NUMBERS = ("input_ids", "position_ids", "real", "visible", "image_index", "weight")
EVERY = MixtureConfig(cycle=("edit", "t2i"))


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Compiles every program once, in this process or in another: gives the environment of others."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    before = {name: jax.config.values[name] for name in names}
    folder = enable_compilation_cache(tmp_path_factory.mktemp("programs"))
    yield {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder)}
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, edits with one and with two references."""
    folder = tmp_path_factory.mktemp("pictures")
    write_json(folder / "pairs", t2i_samples(9, ((96, 160),)))
    write_json(folder / "edits", edit_samples(6, references=(1, 2)))
    return folder


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    """A model with adapters on its vision tower, kept apart."""
    return folders("sft_adapters")


def config(pictures: Path, cache: Path | None = None, micro_batch: int = 3) -> DataConfig:
    """The pictures, or what was cached of them."""
    sources = tuple(
        SourceConfig(name, "features" if cache else "json", str((cache or pictures) / name), task)
        for name, task in (("pairs", "t2i"), ("edits", "edit"))
    )
    return DataConfig(
        sources, micro_batch, EVERY, image_size=64, token_multiple=128, text_drop=0.0,
        cache_dir=str(pictures / "indices"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(pictures: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "features"
    cached = cache_features(config(pictures), folder, "float32", out, shard_size=4, batch_size=2)
    assert [(source.entry.name, *source.shards[:2]) for source in cached] == [("pairs", 3, 9), ("edits", 2, 6)]
    return out


def load(data: DataConfig, folder: Path, **options) -> Loader:
    model = model_folder.read_manifest(folder).config
    return Loader(data, model, folder / "tokenizer", weights=digest_for(data, folder), **options)


def batches(data: DataConfig, folder: Path) -> list[dict]:
    with load(data, folder, once=True) as loader:
        return list(loader)


def fold(folder: Path):
    """Model and parameters with all adapters merged."""
    from deepgen_jax.inference.loading import load_model

    config, _, params, *_ = load_model(folder, "float32", None)
    return DeepGen(config), params


@partial(jax.jit, static_argnums=0)
def prepared(model: DeepGen, features: Features, batch: dict) -> MicroBatch:
    """A micro-batch of one shape, whatever its bucket."""
    text = Text(*(batch[name] for name in ("input_ids", "position_ids", "real", "visible", "image_index")))

    def noise(place: int, like: np.ndarray) -> jax.Array:
        return jax.random.normal(jax.random.key(place), like.shape)

    others = [noise(1 + i, moments.mean) for i, moments in enumerate(features.references)]
    budget = TokenBudget(32, 64, 16)
    return assemble(model, features, text, batch["weight"], noise(0, features.target.mean), others, budget)


@partial(jax.jit, static_argnums=0)
def losses(model: DeepGen, params: dict, micro: MicroBatch) -> jax.Array:
    noise = jax.random.normal(jax.random.key(9), micro.latents.shape)
    draws = Draws(jnp.linspace(0.2, 0.9, len(noise)), noise, None)
    return supervised_losses(model, {"params": {}}, params, micro, draws, 0.0)


def test_losses_equal_those_from_pictures(pictures: Path, cache: Path, folder: Path):
    """Both sequences are the same here, because sources, counts and sizes are; only the row numbers differ."""
    model, params = fold(folder)
    plain, cached = batches(config(pictures), folder), batches(config(pictures, cache), folder)
    assert [batch["bucket"] for batch in plain] == [batch["bucket"] for batch in cached]
    assert {len(batch["bucket"][1]) for batch in plain} == {0, 1, 2}
    seen = set()
    encoded = jax.jit(encode, static_argnums=0)
    for raw, stored in zip(plain, cached, strict=True):
        assert not {"target", "references"} & set(stored)
        np.testing.assert_array_equal(raw["weight"], stored["weight"])
        np.testing.assert_array_equal(raw["input_ids"], stored["input_ids"])
        if raw["bucket"] in seen:
            continue
        seen.add(raw["bucket"])
        want = jax.tree.map(np.asarray, encoded(model, params, raw["target"], raw["references"]))
        kept = stored["features"]
        assert kept["image_tokens"].shape == want.image_tokens.shape
        references = tuple(Moments(*moments) for moments in kept["references"])
        got = Features(Moments(*kept["target"]), references, kept["image_tokens"])
        prompts = {name: array for name, array in raw.items() if name in NUMBERS}
        want_losses = losses(model, params, prepared(model, want, prompts))
        prompts = {name: array for name, array in stored.items() if name in NUMBERS}
        got_losses = losses(model, params, prepared(model, got, prompts))
        np.testing.assert_allclose(got_losses, want_losses, atol=1e-5)
        assert float(np.abs(np.diff(want_losses)).max()) > 1e-3


def test_text_drop_mixture_and_continuation(pictures: Path, cache: Path, folder: Path):
    data = replace(config(pictures, cache), text_drop=0.5)
    with load(data, folder) as loader:
        first = [next(loader) for _ in range(6)]
        state = json.loads(json.dumps(loader.get_state()))
        rest = [next(loader) for _ in range(4)]
    assert [batch["task"] for batch in first] == ["edit", "t2i"] * 3
    shares = [load(data, folder, process_index=host, process_count=3) for host in range(3)]
    for share in shares:
        share.set_state(state)
    for batch in rest:
        parts = [next(share) for share in shares]
        assert [name for part in parts for name in part["sample_ids"]] == list(batch["sample_ids"])
        for got, want in zip(zip(*(jax.tree.leaves(part["features"]) for part in parts), strict=True),
                             jax.tree.leaves(batch["features"]), strict=True):  # fmt: skip
            np.testing.assert_array_equal(np.concatenate(got), want)
    for share in shares:
        share.close()


def contents(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def test_killed_and_run_again(pictures: Path, cache: Path, folder: Path, tmp_path: Path, programs: dict[str, str]):
    """SIGKILL between and within shards; what is there in the end is the uninterrupted cache, byte for byte."""
    out = tmp_path / "features"
    data = config(pictures)
    script = f"""
import os, signal, sys, time
from pathlib import Path
from deepgen_jax.data import feature_shards
from deepgen_jax.data.data_config import *
from deepgen_jax.training.feature_cache import cache_features
add, calls = feature_shards.ShardWriter.add, []
def slow(*args):
    calls.append(1)
    if len(calls) == 6:
        open(sys.argv[1], "w").close()
        time.sleep(60)
    return add(*args)
feature_shards.ShardWriter.add = slow
cache_features({data!r}, Path({str(folder)!r}), "float32", Path({str(out)!r}), shard_size=4, batch_size=2)
"""
    mark = tmp_path / "in the middle"
    process = subprocess.Popen([sys.executable, "-c", script, str(mark)], env=programs)
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = contents(out)
    assert "pairs/00000.array_record" in left
    assert any(name.startswith(f"pairs/{PARTIAL_PREFIX}") for name in left)
    assert "pairs/00001.array_record" not in left
    stamp = os.stat(out / "pairs" / "00000.array_record").st_mtime_ns
    with pytest.raises(DeepGenError, match=r"holds 1 of 3 shards; run the same `deepgen data cache` again"):
        load(config(pictures, out), folder)
    cache_features(data, folder, "float32", out, shard_size=4, batch_size=2)
    assert os.stat(out / "pairs" / "00000.array_record").st_mtime_ns == stamp
    assert contents(out) == contents(cache)


def test_other_models_and_settings_are_refused(pictures: Path, cache: Path, folder: Path, folders, tmp_path: Path):
    data = config(pictures, cache)
    for changed, message in (
        (replace(data, image_size=96), "source pairs was cached with image_size 64, and this run has 96; run `deepgen"),
        (replace(data, transform="dynamic"), "cached with transform fix_pixels, and this run has dynamic"),
    ):
        with pytest.raises(DeepGenError, match=message):
            load(changed, folder)
    with pytest.raises(DeepGenError, match="another model: its encoders have other weights"):
        load(data, folders("none"))
    with pytest.raises(DeepGenError, match="give `weights`, the digest"):
        Loader(data, model_folder.read_manifest(folder).config, folder / "tokenizer")
    with pytest.raises(DeepGenError, match="holds features for edit; set task"):
        load(replace(data, sources=tuple(replace(s, path=str(cache / "edits")) for s in data.sources)), folder)
    mixed = (*data.sources, SourceConfig("more", "json", str(pictures / "pairs")))
    with pytest.raises(DeepGenError, match=r"task t2i are cached features and some are not \(more\)"):
        replace(data, sources=mixed)
    plain = config(pictures)
    for options, message in (
        ({"shard_size": 5}, "was made with shard_size 4 in the place of 5"),
        ({"dtype": "bfloat16"}, "was made with dtype float32 in the place of bfloat16"),
        ({"data": replace(plain, image_size=96)}, "other data, or other settings that choose samples and sizes"),
        ({"model": folders("none")}, "was made with the weights of another model"),
        ({"data": data}, "source pairs is cached already"),
        ({"out": pictures}, "holds indices, no cache of a source"),
        ({"out": pictures / "pairs" / "list.json"}, "is a file"),
        ({"batch_size": 0}, "--batch-size is 0"),
    ):
        arguments = {"data": plain, "model": folder, "dtype": "float32", "out": cache, "shard_size": 4, **options}
        with pytest.raises(DeepGenError, match=message):
            cache_features(**arguments)
    (tmp_path / "out" / "pairs").mkdir(parents=True)
    (tmp_path / "out" / "pairs" / "thesis.txt").touch()
    with pytest.raises(DeepGenError, match="is no cache of features"):
        cache_features(plain, folder, "float32", tmp_path / "out")
    assert (tmp_path / "out" / "pairs" / "thesis.txt").exists()


def test_digest_distinguishes_encoders(folders):
    """Stages that share their frozen encoders agree; adapters on the vision tower count."""
    assert encoder_digest(folders("none")) == encoder_digest(folders("pretrain"))
    assert encoder_digest(folders("none")) != encoder_digest(folders("sft"))


def test_bad_samples_are_counted(folder: Path, tmp_path: Path):
    """One is known when the index is built, one breaks afterwards, one is alone in its bucket."""
    samples = [*t2i_samples(12, ((96, 96),)), Sample("alone", encoded(96, 160, 1))]
    write_json(tmp_path / "pairs", samples)
    (tmp_path / "pairs" / "3.img").unlink()
    pairs = SourceConfig("pairs", "json", str(tmp_path / "pairs"))
    data = DataConfig(
        (pairs,), 4, MixtureConfig(("t2i",)), image_size=64, max_bad_share=0.3, cache_dir=str(tmp_path / "indices")
    )
    with load(data, folder):
        pass
    for name in ("5.img", "12.img"):
        (tmp_path / "pairs" / name).write_bytes(b"")
    out = tmp_path / "features"
    (cached,) = cache_features(data, folder, "float32", out, shard_size=5, batch_size=2)
    assert (cached.shards.shards, cached.shards.samples, dict(cached.shards.bad)) == (3, 10, {"empty file": 2})
    assert "12.img" in cached.shards.examples["empty file"] or "5.img" in cached.shards.examples["empty file"]
    trained = replace(data, sources=(replace(cached.entry),))
    loader = load(trained, folder, once=True)
    ids = [name for batch in loader for name in batch["sample_ids"] if name]
    loader.close()
    assert len(ids) == len(set(ids)) == 10
    assert loader.plan.indices[0].meta["counts"] == {"empty file": 2}
    with pytest.raises(DeepGenError, match="2 of 12 samples are bad"):
        load(replace(trained, max_bad_share=0.1), folder)
    for number in range(12):
        (tmp_path / "pairs" / f"{number}.img").write_bytes(b"")
    with pytest.raises(DeepGenError, match="11 samples could not be read, more than max_bad_share"):
        cache_features(data, folder, "float32", tmp_path / "again", batch_size=2)
    assert not list((tmp_path / "again").rglob("*.array_record*"))


def test_damaged_shards(pictures: Path, cache: Path, folder: Path, tmp_path: Path):
    import shutil

    copy = tmp_path / "features"
    shutil.copytree(cache, copy)
    (copy / "pairs" / "00001.array_record").write_bytes(b"nothing of the kind")
    with pytest.raises(DeepGenError, match="damaged shard"):
        load(config(pictures, copy), folder)


def test_bfloat16_and_several_devices(folder: Path, tmp_path: Path, programs: dict[str, str]):
    """On four devices; tokens stay bfloat16 through workers, and the moments come from a float32 VAE."""
    out = tmp_path / "features"
    write_json(tmp_path / "edits", edit_samples(5))
    edits = SourceConfig("edits", "json", str(tmp_path / "edits"), "edit")
    mixture = MixtureConfig(cycle=("edit",))
    data = DataConfig((edits,), 2, mixture, image_size=64, cache_dir=str(tmp_path / "indices"))
    script = f"""
from pathlib import Path
import jax
from deepgen_jax.data.data_config import *
from deepgen_jax.training.feature_cache import cache_features
assert len(jax.devices()) == 4
cache_features({data!r}, Path({str(folder)!r}), "bfloat16", Path({str(out)!r}), batch_size=2)
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", script], check=True, env={**programs, **flags})
    cached = replace(edits, kind="features", path=str(out / "edits"))
    with load(replace(data, sources=(cached,), workers=1), folder) as loader:
        batch = next(loader)
    tokens = batch["features"]["image_tokens"]
    assert tokens.dtype == jnp.bfloat16
    assert np.isfinite(tokens.astype(np.float32)).all()
    assert batch["features"]["target"][0].dtype == np.float32


def test_records(cache: Path):
    text, images = read_features(ShardReaders().read(str(cache / "edits" / "00001.array_record"), 0))
    assert text.startswith("make it")
    assert [image.size for image in images] == [(64, 64)] * 3
    again = read_features(write_features("edits/1@0", "edits", text, images))
    assert again[0] == text
    for one, other in zip(images, again[1], strict=True):
        for a, b in zip(one[1:], other[1:], strict=True):
            assert (a is None) == (b is None)
            assert a is None or np.array_equal(a, b)
    with pytest.raises(ValueError, match="without its features"):
        write_features("a", "b", "c", [CachedImage((64, 64))])
    for data in (b"", b"\x01\x02", write_features("a", "b", "c", images)[:500]):
        with pytest.raises(ValueError):
            read_features(data)


def test_features_of_encoders_that_an_earlier_run_has_trained_are_refused(
    pictures: Path, folders, tmp_path: Path
):
    model, start = folders("none"), tmp_path / "vae"
    (start / "checkpoints" / "5").mkdir(parents=True)
    origin = {"model": str(model), "start": "", "inherited": {}}
    description = {"format": RUN_FORMAT, "version": RUN_VERSION, "config": {"trains": ["vae"]}, "origin": origin}
    (start / "config.json").write_text(json.dumps(description))
    run = SupervisedConfig(
        model=str(model), start=str(start), out=str(tmp_path / "run"), steps=1, trains=("bridge",),
        data=config(pictures, pictures),
    )  # fmt: skip
    with pytest.raises(DeepGenError, match=r"was trained with another vae than that of .* run `deepgen export .*/vae"):
        open_loader(run, run.data, None, None)  # type: ignore[arg-type]
    check_untrained(replace(run, start=""))
