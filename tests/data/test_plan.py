"""The global sequence: every sample once an epoch, exact shares, random access, filters and buckets."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.make_data import TOKENIZER, model

from deepgen_jax.data.checks import SampleInfo
from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.data.index import Index, IndexWriter
from deepgen_jax.data.plan import Plan
from deepgen_jax.data.prompt_encoder import PromptEncoder
from deepgen_jax.data.sources import BadSample
from deepgen_jax.errors import DeepGenError

PROMPTS = PromptEncoder(TOKENIZER, model(max_prompt_tokens=100))
SQUARE, WIDE, TALL = (600, 600), (800, 600), (600, 800)


def write_index(folder: Path, name: str, facts: list[SampleInfo | BadSample]) -> Index:
    (folder / name).mkdir(parents=True)
    writer = IndexWriter(folder / name, name)
    writer.add_rows([b"0"] * len(facts))
    writer.finish_rows()
    writer.add_samples(facts)
    writer.finish()
    return Index(folder / name)


@pytest.fixture(scope="module")
def indices(tmp_path_factory: pytest.TempPathFactory) -> list[Index]:
    """Two text-to-image sources of 60 and 20 samples, edits of 31 with one or two references."""
    folder = tmp_path_factory.mktemp("indices")
    rng = np.random.default_rng(0)
    large = [SampleInfo(int(rng.integers(20, 140)), ((SQUARE, WIDE, TALL)[i % 3],)) for i in range(60)]
    small = [SampleInfo(30, ((SQUARE, WIDE)[i % 2],)) for i in range(20)]
    edits = [SampleInfo(40, (SQUARE, SQUARE) if i % 4 else (WIDE, WIDE, SQUARE)) for i in range(31)]
    return [write_index(folder, name, facts) for name, facts in (("a", large), ("b", small), ("e", edits))]


def config(size: int = 4, **options) -> DataConfig:
    weights = options.pop("weights", (None, None, None))
    names = (("a", "t2i"), ("b", "t2i"), ("e", "edit"))
    sources = [
        SourceConfig(name, "json", "x", task, weight) for (name, task), weight in zip(names, weights, strict=True)
    ]
    return DataConfig(tuple(sources), size, **options)


def contents(batch) -> list[tuple[int, int, int]]:
    return list(zip(batch.sources.tolist(), batch.rows.tolist(), batch.epochs.tolist(), strict=True))


@given(st.integers(1, 12), st.integers(0, 2**40), st.booleans())
@settings(max_examples=25)
def test_no_sample_is_repeated_or_left_out_in_an_epoch(indices, size, seed, cycle):
    mixture = MixtureConfig() if cycle else MixtureConfig((), (("t2i", 5), ("edit", 2)))
    plan = Plan(config(size, seed=seed, mixture=mixture), indices, PROMPTS)
    seen: Counter[tuple[int, int, int]] = Counter()
    for number in range(600 // size):
        seen.update(contents(plan[number]))
    assert max(seen.values()) == 1
    # Once an epoch drops a cell, all its samples have been used.
    for source, (index, last) in enumerate(zip(indices, plan.indices, strict=True)):
        assert index is last
        epochs = [{row for s, row, e in seen if s == source and e == epoch} for epoch in range(20)]
        complete = next(e for e in range(20) if len(epochs[e]) < len(index))
        for cell in plan_cells(plan, source):
            reached = max((e for e in range(20) if epochs[e] & cell), default=0)
            assert all(cell <= epochs[e] for e in range(reached))
        assert complete >= (1 if size <= 4 else 0)


def plan_cells(plan: Plan, source: int) -> list[set[int]]:
    """Rows of a source by bucket."""
    sizes = np.asarray(plan.indices[source].sizes)
    groups: dict[bytes, set[int]] = {}
    for row, size in enumerate(sizes):
        groups.setdefault(size.tobytes(), set()).add(row)
    return list(groups.values())


def test_batches_hold_one_task_and_one_bucket(indices):
    plan = Plan(config(), indices, PROMPTS)
    exact = {SQUARE: (512, 512), WIDE: (608, 448), TALL: (448, 608)}
    for number in range(60):
        batch = plan[number]
        assert batch.bucket.task == ("edit", "t2i", "t2i")[number % 3]
        for source, row, _ in contents(batch):
            assert plan.config.sources[source].task == batch.bucket.task
            sizes = [exact[tuple(size)] for size in indices[source].sizes[row].tolist() if size[0]]
            assert sizes == [batch.bucket.target, *batch.bucket.references]
    assert {bucket.samples for bucket in plan.buckets} == {20 + 10, 20, 8, 23}
    assert sum(bucket.samples for bucket in plan.buckets) == 111


@pytest.mark.parametrize(
    ("weights", "share"), [((None, None, None), 0.75), ((1.0, 1.0, 1.0), 0.5), ((1.0, 9.0, 1.0), 0.1)]
)
def test_weights_of_sources(indices, weights, share):
    plan = Plan(config(weights=weights), indices, PROMPTS)
    assert plan.shares == pytest.approx([share, 1 - share, 1.0], abs=1e-6)
    counts = Counter(source for number in range(3000) for source in plan[number].sources.tolist())
    assert counts[0] / (counts[0] + counts[1]) == pytest.approx(share, abs=0.005)
    assert counts[2] == 4 * 1000


def test_lengths_hold_the_longest_prompt_after_the_cut(indices):
    plan = Plan(config(text_drop=0.0, token_multiple=16), indices, PROMPTS)
    queries = 8
    for number in range(30):
        batch = plan[number]
        words = [min(100, int(plan.indices[s].lengths[r])) for s, r, _ in contents(batch)]
        images = sum(w * h for w, h in batch.bucket.references) // 32**2
        need = max(words) + images + queries
        assert batch.length % 16 == 0
        assert 0 <= batch.length - need < 16
        assert batch.visible == 0
    visible = Plan(config(text_drop=0.0, padding="batch"), indices, PROMPTS)
    assert visible[1].visible == max(min(100, int(indices[s].lengths[r])) for s, r, _ in contents(visible[1]))


def test_text_is_dropped_in_text_to_image_only(indices):
    plan = Plan(config(16, seed=5), indices, PROMPTS)
    batches = [plan[number] for number in range(600)]
    assert not any(batch.dropped.any() for batch in batches if batch.bucket.task == "edit")
    share = np.mean([batch.dropped for batch in batches if batch.bucket.task == "t2i"])
    assert share == pytest.approx(0.1, abs=0.01)


def test_seeds_and_epochs_give_other_orders(indices):
    orders = {tuple(contents(Plan(config(seed=seed), indices, PROMPTS)[1])) for seed in range(5)}
    assert len(orders) == 5
    plan = Plan(config(), indices, PROMPTS)
    rows = [row for number in range(0, 300, 3) for _, row, epoch in contents(plan[number]) if epoch in (0, 1)]
    assert sorted(rows[:31]) != rows[:31] != rows[31:62]


def test_pickled_plans_are_equal_and_small(indices):
    plan = Plan(config(), indices, PROMPTS)
    data = pickle.dumps(plan)
    assert len(data) < 200_000
    again = pickle.loads(data)
    for number in (0, 7, 10**6):
        for field in dataclasses.fields(plan[number]):
            first, second = getattr(plan[number], field.name), getattr(again[number], field.name)
            assert np.all(first == second) if isinstance(first, np.ndarray) else first == second, field.name


def test_once(indices):
    plan = Plan(config(), indices, PROMPTS, once=True)
    batches = [plan[number] for number in range(len(plan))]
    seen = Counter(item for batch in batches for item in contents(batch)[: batch.real])
    assert set(seen.values()) == {1}
    assert len(seen) == 111
    assert not any(batch.dropped.any() for batch in batches)
    assert all(len(batch.rows) == 4 for batch in batches)
    with pytest.raises(IndexError):
        plan[len(plan)]


def test_filters(tmp_path: Path):
    facts: list[SampleInfo | BadSample] = [
        SampleInfo(5, ((81, 81),)), SampleInfo(5, ((80, 500),)), SampleInfo(5, ((1000, 100),)),
        SampleInfo(5, ((1001, 100),)), BadSample("missing file", "x"), SampleInfo(5, ((100, 1001),)),
    ]  # fmt: skip
    index = write_index(tmp_path, "a", facts)
    settings = DataConfig((SourceConfig("a", "json", "x"),), 1, MixtureConfig(("t2i",)))
    plan = Plan(settings, [index], PROMPTS)
    assert plan.filtered["a"] == {"side of at most 80 px": 1, "aspect beyond 10:1": 2}
    assert {row for n in range(2) for _, row, _ in contents(Plan(settings, [index], PROMPTS, once=True)[n])} == {0, 2}
    with pytest.raises(DeepGenError, match=r"no usable sample is left of 6 \(5 side of at most"):
        Plan(dataclasses.replace(settings, min_side=1000), [index], PROMPTS)


def test_filters_look_at_references(tmp_path: Path):
    facts: list[SampleInfo | BadSample] = [
        SampleInfo(5, (SQUARE, SQUARE)), SampleInfo(5, (SQUARE, (70, 90))), SampleInfo(5, (SQUARE, *[SQUARE] * 9))
    ]  # fmt: skip
    index = write_index(tmp_path, "e", facts)
    settings = DataConfig((SourceConfig("e", "json", "x", "edit"),), 1, MixtureConfig(("edit",)))
    plan = Plan(settings, [index], PROMPTS)
    assert plan.filtered["e"] == {"side of at most 80 px": 1, "more than 8 references": 1}
