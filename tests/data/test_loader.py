"""Batches from files: same samples on any host count, exact continuation, pixels and tokens of the reference rules."""

from __future__ import annotations

import gc
import io
import json
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.make_data import (
    TOKENIZER,
    edit_samples,
    model,
    t2i_samples,
    write_array_record,
    write_folder,
    write_json,
    write_parquet,
    write_tar,
)

from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.data.loader import Loader
from deepgen_jax.data.reader import Batch
from deepgen_jax.data.tokens import PromptTokenizer
from deepgen_jax.data.transforms import resize
from deepgen_jax.errors import DeepGenError

MODEL = model()
SIZES = ((96, 96), (128, 96), (96, 128))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Six sources in five formats; the images are small."""
    folder = tmp_path_factory.mktemp("data")
    write_json(folder / "json", t2i_samples(30, SIZES))
    write_tar(folder / "tar", t2i_samples(12, SIZES))
    write_parquet(folder / "parquet", t2i_samples(9, SIZES), "struct")
    write_folder(folder / "folder", t2i_samples(6, SIZES))
    write_json(folder / "edits", edit_samples(11))
    write_array_record(folder / "more", edit_samples(8, references=(1, 2)))
    kinds = [("json", "json"), ("tar", "webdataset"), ("parquet", "parquet"), ("folder", "image_folder")]
    sources = [SourceConfig(name, kind, str(folder / name)) for name, kind in kinds]
    sources += [
        SourceConfig("edits", "json", str(folder / "edits"), "edit"),
        SourceConfig("more", "array_record", str(folder / "more"), "edit"),
    ]
    return DataConfig(tuple(sources), 4, image_size=64, cache_dir=str(folder / "cache"), token_multiple=32, threads=2)


@pytest.fixture
def open_loader(data: DataConfig) -> Callable[..., Loader]:
    opened = []

    def make(config: DataConfig = data, **options) -> Loader:
        opened.append(Loader(config, options.pop("model", MODEL), TOKENIZER, **options))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


def take(loader: Loader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name in ("task", "bucket"):
            assert value == b[name]
        else:
            for x, y in zip(value, b[name], strict=True):
                assert np.array_equal(x, y), name


def joined(shares: list[Batch]) -> Batch:
    """The global micro-batch of the hosts' shares."""
    out: Batch = {}
    for name, first in shares[0].items():
        values = [share[name] for share in shares]
        if name == "references":
            out[name] = tuple(np.concatenate(parts) for parts in zip(*values, strict=True))
        elif isinstance(first, np.ndarray):
            out[name] = np.concatenate(values, axis=1 if name == "position_ids" else 0)
        else:
            assert all(value == first for value in values), name
            out[name] = first
    return out


def test_shapes_and_types(open_loader):
    loader = open_loader()
    for batch in take(loader, 9):
        (width, height), references = batch["bucket"]
        assert batch["target"].shape == (4, height, width, 3)
        assert [image.shape for image in batch["references"]] == [(4, h, w, 3) for w, h in references]
        assert batch["target"].dtype == np.uint8
        length = batch["input_ids"].shape[1]
        assert (length + 8) % 32 == 0
        assert batch["position_ids"].shape == (3, 4, length + 8)
        assert batch["real"].shape == batch["visible"].shape == (4, length + 8)
        assert np.array_equal(batch["real"], batch["visible"])
        tokens = sum(w * h for w, h in references) // 32**2
        assert (batch["image_index"].max(axis=1) == tokens - 1).all()
        assert batch["weight"].tolist() == [1.0] * 4
        assert batch["task"] == ("edit" if references else "t2i")
    assert batch["sample_index"].tolist() == [32, 33, 34, 35]


@given(st.integers(0, 40), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resume_anywhere_on_any_host_count(data, position, count, before, after):
    """A run saved on ``before`` hosts resumes on ``after`` hosts like an uninterrupted run on one host."""
    alone = Loader(data, MODEL, TOKENIZER)
    alone.set_state({**alone.get_state(), "position": position})
    expected = take(alone, 2 * count)
    alone.close()
    got = []
    state = {**alone.get_state(), "position": position}
    for hosts in (before, after):
        loaders = [Loader(data, MODEL, TOKENIZER, process_index=h, process_count=hosts) for h in range(hosts)]
        for loader in loaders:
            loader.set_state(state)
        got += [joined([next(loader) for loader in loaders]) for _ in range(count)]
        states = [json.loads(json.dumps(loader.get_state())) for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
        for loader in loaders:
            loader.close()
    for a, b in zip(expected, got, strict=True):
        assert_equal(a, b)


def test_worker_processes_change_nothing(data, open_loader):
    expected = take(open_loader(), 8)
    loader = open_loader(replace(data, workers=2, prefetch=1))
    loader.set_state({**loader.get_state(), "position": 3})
    for a, b in zip(expected[3:], take(loader, 5), strict=True):
        assert_equal(a, b)
    assert loader.get_state()["position"] == 8


def test_every_sample_once(open_loader, data):
    names = [(str(name), batch["task"]) for batch in open_loader(once=True) for name in batch["sample_ids"] if name]
    assert len(names) == len(set(names)) == 30 + 12 + 9 + 6 + 11 + 8
    hosts = [open_loader(once=True, process_index=h, process_count=2) for h in range(2)]
    both = [str(name) for loader in hosts for batch in loader for name in batch["sample_ids"] if name]
    assert sorted(both) == sorted(name for name, _ in names)
    weights = [batch["weight"] for batch in open_loader(once=True)]
    assert np.concatenate(weights).sum() == len(names)
    assert all(len(weight) == 4 for weight in weights)


def test_exact_mode_gives_the_reference_pixels_and_tokens(data, open_loader):
    loader = open_loader(replace(data, exact_sizes=True, text_drop=0.0))
    samples = {name: t2i_samples(30, SIZES) for name in ("json", "tar", "parquet", "folder")}
    samples |= {"edits": edit_samples(11), "more": edit_samples(8, references=(1, 2))}
    tokenizer = PromptTokenizer(TOKENIZER, MODEL)
    for batch in take(loader, 12):
        for place, name in enumerate(batch["sample_ids"].tolist()):
            source, row = name.partition("@")[0].split("/")
            sample = samples[source][int(row)]
            images = [resize(Image.open(io.BytesIO(d)).convert("RGB"), 64, "fix_pixels") for d in sample[1:2]]
            images += [resize(Image.open(io.BytesIO(d)).convert("RGB"), 64, "fix_pixels") for d in sample.references]
            for image, pixels in zip(images, (batch["target"], *batch["references"]), strict=True):
                np.testing.assert_array_equal(pixels[place], image)
            text = sample.text.strip() if source == "folder" else sample.text
            prompt = tokenizer(text, [image.size for image in images[1:]] or None)
            real = batch["real"][place]
            np.testing.assert_array_equal(batch["input_ids"][place][real[:-8]], prompt.input_ids)
            np.testing.assert_array_equal(batch["position_ids"][:, place][:, real], prompt.position_ids)


def test_long_prompts_are_cut_from_the_left(data, open_loader):
    short = model(max_prompt_tokens=24)
    tokenizer = PromptTokenizer(TOKENIZER, short)
    samples = {name: t2i_samples(30, SIZES) for name in ("json", "tar", "parquet", "folder")}
    samples |= {"edits": edit_samples(11), "more": edit_samples(8, references=(1, 2))}
    cut = 0
    for batch in take(open_loader(replace(data, text_drop=0.0), model=short), 12):
        for place, name in enumerate(batch["sample_ids"].tolist()):
            source, row = name.partition("@")[0].split("/")
            sizes = batch["bucket"][1]
            tokens = sum(w * h for w, h in sizes) // 32**2
            text = samples[source][int(row)].text
            whole = tokenizer(text.strip() if source == "folder" else text, sizes or None)
            ids = batch["input_ids"][place][batch["real"][place][:-8]]
            assert len(ids) == min(24 + tokens, len(whole.input_ids))
            assert (ids == short.text.image_token_id).sum() == tokens
            assert np.array_equal(ids[-10:], whole.input_ids[-10:])
            cut += len(ids) < len(whole.input_ids)
    assert cut > 5


def test_dropped_texts_are_empty_prompts(data, open_loader):
    loader = open_loader(replace(data, text_drop=1.0))
    empty = PromptTokenizer(TOKENIZER, MODEL)("").input_ids
    edit, *generation = take(loader, 3)
    for batch in generation:
        for ids, real in zip(batch["input_ids"], batch["real"], strict=True):
            np.testing.assert_array_equal(ids[real[:-8]], empty)
    assert (edit["real"][:, :-8].sum(axis=1) > len(empty)).all()


def broken_copy(tmp_path: Path, spoilt: dict[int, bytes | None], samples: int = 24) -> DataConfig:
    """A source whose files go bad after they were indexed."""
    path = write_json(tmp_path, t2i_samples(samples, ((96, 96),)))
    source = SourceConfig("s", "json", str(path))
    config = DataConfig((source,), 8, MixtureConfig(("t2i",)), image_size=64, cache_dir=str(tmp_path / "cache"))
    Loader(config, MODEL, TOKENIZER)
    for number, content in spoilt.items():
        file = tmp_path / f"{number}.img"
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
    return config


def test_samples_that_break_during_a_run_are_replaced_alike(tmp_path: Path, open_loader):
    whole = t2i_samples(24, ((96, 96),))
    smaller = t2i_samples(1, ((96, 64),))[0].image
    config = broken_copy(tmp_path, {3: None, 7: whole[7].image[:-200], 11: b"", 12: smaller})
    alone = open_loader(config)
    expected = take(alone, 6)
    reasons = ("missing file", "damaged file", "empty file", "changed since indexed")
    assert alone.skipped == {("s", reason): 2 for reason in reasons}
    good = Counter(name for batch in expected for name in batch["sample_ids"].tolist() if name)
    rows = [row for row in range(24) if row not in (3, 7, 11, 12)]
    assert set(good) == {f"s/{row}@{epoch}" for row in rows for epoch in (0, 1)}
    assert set(good.values()) == {1}
    assert sum(batch["weight"].sum() for batch in expected) == 40
    hosts = [open_loader(config, process_index=h, process_count=4) for h in range(4)]
    for batch in expected:
        assert_equal(batch, joined([next(loader) for loader in hosts]))


def test_too_many_unreadable_samples_stop_the_run(tmp_path: Path, open_loader):
    config = broken_copy(tmp_path, dict.fromkeys(range(12)))
    with pytest.raises(DeepGenError, match=r"source s: 11 samples could not be read.*missing file \(.*img"):
        take(open_loader(config), 100)
    config = broken_copy(tmp_path / "all", dict.fromkeys(range(24)))
    with pytest.raises(DeepGenError, match="no sample of micro-batch 0 can be read"):
        next(open_loader(config))


def test_a_state_of_other_data_is_refused(data, open_loader):
    state = open_loader().get_state()
    with pytest.raises(DeepGenError, match="seed 0 -> 1"):
        open_loader(replace(data, seed=1)).set_state(state)
    fewer = open_loader(replace(data, sources=tuple(source for source in data.sources if source.name != "edits")))
    with pytest.raises(DeepGenError, match=r"source edits .+ -> None"):
        fewer.set_state(state)
    # How data are read is no part of it.
    open_loader(replace(data, threads=1, prefetch=5, workers=3)).set_state(state)


def test_uneven_shares_are_refused(open_loader):
    with pytest.raises(DeepGenError, match="micro_batch 4 cannot be shared by 3"):
        open_loader(process_count=3)


def test_memory_stays_flat(open_loader):
    loader = open_loader()
    kept = []
    take(loader, 60)
    tracemalloc.start()
    try:
        for batches in (20, 300):
            for _ in range(batches):
                next(loader)
            loader.close()
            kept.append(_memory_at_rest())
    finally:
        tracemalloc.stop()
    # One picture kept of each of the 280 batches between would be 3.4 MB; all that they held was 20 MB.
    assert kept[1] - kept[0] < 1_000_000


def _memory_at_rest() -> int:
    """Least of the traced bytes over two seconds, in which threads finish what they were reading."""
    least = tracemalloc.get_traced_memory()[0]
    for _ in range(20):
        gc.collect()
        least = min(least, tracemalloc.get_traced_memory()[0])
        time.sleep(0.1)
    return least
