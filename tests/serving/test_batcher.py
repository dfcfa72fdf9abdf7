"""The queue: what shares a batch, bounds, cancellation, failures, and the stop."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_engine import FakeEngine, image_of

from deepgen_jax.serving.batcher import Batcher, Closing, Done, Failed, QueueFull
from deepgen_jax.serving.jobs import Job
from deepgen_jax.serving.metrics import Metrics
from deepgen_jax.serving.settings import ServeConfig

FOX = Job("generation", "a fox", "", 0, 64, 64, 4, 1.0, "euler")


class Collected:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.events = []
        self._changed = threading.Condition()

    def __call__(self, event):
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait(self, count: int):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= count, timeout=20)
        return self.events


@pytest.fixture
def make():
    batchers = []

    def build(engine: FakeEngine, **config) -> Batcher:
        batchers.append(Batcher(engine, ServeConfig(**config), Metrics()))
        return batchers[-1]

    yield build
    for batcher in batchers:
        batcher.engine.gate.set()
        batcher.close()


def jobs(count: int, engine: FakeEngine, **changes):
    rows = [replace(FOX, seed=k, **changes) for k in range(count)]
    return [(row, engine.check(row).bucket) for row in rows]


def value(metric, **labels) -> float:
    return metric.labels(**labels)._value.get() if labels else metric._value.get()


def test_jobs_that_wait_share_a_batch_and_buckets_do_not_mix(make):
    engine = FakeEngine(open_gate=False)
    batcher, heard = make(engine, max_batch=4, batch_window=0.0), Collected()
    batcher.submit(jobs(1, engine), heard)
    engine.begun.acquire()
    batcher.submit(jobs(6, engine), heard)
    batcher.submit(jobs(2, engine, width=128), heard)
    batcher.submit(jobs(1, engine, kind="edit"), heard)
    engine.gate.set()
    events = heard.wait(10)
    assert [len(batch) for batch in engine.batches] == [1, 4, 2, 2, 1]
    assert all(len({engine.check(job).bucket for job in batch}) == 1 for batch in engine.batches)
    for event in events:
        assert isinstance(event, Done)
        np.testing.assert_array_equal(event.image, image_of(event.ticket.job))
    assert batcher.depth == 0
    assert value(batcher.metrics.images, kind="generation") == 9


def test_the_window_gathers_requests_while_the_model_is_idle(make):
    engine, heard = FakeEngine(), Collected()
    batcher = make(engine, max_batch=8, batch_window=0.3)
    for k in range(3):
        batcher.submit(jobs(1, engine, prompt=f"fox {k}"), heard)
    heard.wait(3)
    assert [len(batch) for batch in engine.batches] == [3]
    start = time.monotonic()
    batcher.submit(jobs(8, engine), heard)
    heard.wait(11)
    assert time.monotonic() - start < 0.25, "a full batch must not wait"


def test_the_queue_is_bounded_for_each_kind(make):
    engine, heard = FakeEngine(open_gate=False), Collected()
    batcher = make(engine, max_batch=1, max_queue=3, batch_window=0.0)
    batcher.submit(jobs(1, engine), heard)
    engine.begun.acquire()
    batcher.submit(jobs(2, engine), heard)
    with pytest.raises(QueueFull) as full:
        batcher.submit(jobs(2, engine), heard)
    assert full.value.seconds >= 1
    batcher.submit(jobs(3, engine, kind="edit"), heard)
    assert value(batcher.metrics.queue_depth, kind="generation") == 2
    engine.gate.set()
    heard.wait(6)


def test_only_what_has_not_begun_is_cancelled(make):
    engine, heard = FakeEngine(open_gate=False), Collected()
    batcher = make(engine, max_batch=1, batch_window=0.0)
    tickets = batcher.submit(jobs(3, engine), heard)
    engine.begun.acquire()
    assert batcher.cancel(tickets) == 2
    assert [ticket.state for ticket in tickets] == ["running", "cancelled", "cancelled"]
    engine.gate.set()
    batcher.close()
    assert [event.ticket for event in heard.events] == tickets[:1]
    assert len(engine.batches) == 1


def test_jobs_past_their_deadline_are_not_begun(make):
    engine, heard = FakeEngine(open_gate=False), Collected()
    batcher = make(engine, max_batch=1, batch_window=0.0, deadline=0.05)
    batcher.submit(jobs(2, engine), heard)
    engine.begun.acquire()
    time.sleep(0.1)
    engine.gate.set()
    batcher.close()
    done, late = heard.events
    assert isinstance(done, Done)
    assert isinstance(late, Failed)
    assert isinstance(late.error, TimeoutError)
    assert len(engine.batches) == 1


def test_one_refused_job_costs_the_others_nothing(make):
    engine, heard = FakeEngine(), Collected()
    batcher = make(engine, max_batch=4, batch_window=0.2)
    batcher.submit([*jobs(2, engine), *jobs(1, engine, prompt="refused")], heard)
    good = [event for event in heard.wait(3) if isinstance(event, Done)]
    assert len(good) == 2
    for event in good:
        np.testing.assert_array_equal(event.image, image_of(event.ticket.job))


def test_out_of_memory_halves_the_batches_of_that_bucket(make):
    engine, heard = FakeEngine(), Collected()
    batcher = make(engine, max_batch=4, batch_window=0.1)
    batcher.submit(jobs(4, engine, prompt="huge"), heard)
    assert all(isinstance(event, Done) for event in heard.wait(4))
    assert [len(batch) for batch in engine.batches] == [4, 2, 1, 1, 2, 1, 1]
    batcher.submit(jobs(2, engine, prompt="huge"), heard)
    assert all(isinstance(event, Done) for event in heard.wait(6))
    assert [len(batch) for batch in engine.batches[-2:]] == [1, 1]


def test_the_thread_outlives_a_programming_error(make, caplog):
    engine, heard = FakeEngine(), Collected()
    batcher = make(engine, batch_window=0.0)
    batcher.submit(jobs(1, engine, prompt="broken"), heard)
    batcher.submit(jobs(1, engine), heard)
    failed, done = heard.wait(2)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RuntimeError)
    assert isinstance(done, Done)
    assert "a programming error" in caplog.text


def test_closing_finishes_what_was_accepted(make):
    engine, heard = FakeEngine(seconds=0.01), Collected()
    batcher = make(engine, max_batch=2)
    batcher.submit(jobs(7, engine), heard)
    batcher.close()
    assert len(heard.events) == 7
    with pytest.raises(Closing):
        batcher.submit(jobs(1, engine), heard)


plans = st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from(["generation", "edit"]), st.sampled_from([64, 128]), st.booleans()),
    max_size=12,
)


@settings(max_examples=30)
@given(plans, st.integers(1, 5))
def test_each_job_is_answered_once_or_was_cancelled(plan, max_batch):
    engine, heard = FakeEngine(), Collected()
    batcher = Batcher(engine, ServeConfig(max_batch=max_batch, max_queue=100, batch_window=0.001), Metrics())
    tickets = []
    for count, kind, width, cancel in plan:
        some = batcher.submit(jobs(count, engine, kind=kind, width=width), heard)
        if cancel:
            batcher.cancel(some)
        tickets += some
    batcher.close()
    answered = [event.ticket.number for event in heard.events]
    assert sorted(answered) == [ticket.number for ticket in tickets if ticket.state == "finished"]
    assert {ticket.state for ticket in tickets} <= {"finished", "cancelled"}
    assert all(len(batch) <= max_batch for batch in engine.batches)
    assert batcher.depth == 0
