"""Ten thousand requests against a fake model: none lost, none answered twice, none with another's image."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import replace

import httpx
import numpy as np
import pytest
from support.fake_engine import FakeEngine, image_of
from support.services import pixels, wait_until

from deepgen_jax.serving.jobs import Job

FOX = Job("generation", "a fox", "", 0, 32, 32, 4, 1.0, "euler")


class Counting(FakeEngine):
    """Counts how often each seed was computed, and forgets the jobs."""

    def __init__(self):
        super().__init__(seconds=0.002)
        self.runs = Counter()

    def run(self, jobs, *args):
        self.runs.update(job.seed for job in jobs)
        images = super().run(jobs, *args)
        self.batches.clear()
        return images


async def soak(url: str, count: int, clients: int):
    """Sends one request for each seed; of one in fifty the client leaves. Statuses, wrong images, leavers."""
    seeds, statuses, wrong, left = iter(range(count)), Counter(), [], set()

    async def client(number: int):
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=120) as api:
            for seed in seeds:
                fields = {"prompt": "a fox", "size": "32x32", "seed": seed}
                if draw.random() < 0.02:
                    left.add(seed)
                    with contextlib.suppress(httpx.TimeoutException):
                        await api.post("/v1/images/generations", json=fields, timeout=0.001)
                    continue
                answer = await api.post("/v1/images/generations", json=fields)
                statuses[answer.status_code] += 1
                if not np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), image_of(replace(FOX, seed=seed))):
                    wrong.append(seed)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return statuses, wrong, left


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_soak(start, count):
    engine = Counting()
    service = start(engine, max_queue=1000)
    statuses, wrong, left = asyncio.run(soak(service.url, count, clients=32))
    assert not wrong
    assert statuses == {200: count - len(left)}
    wait_until(lambda: service.service._batcher.depth == 0 and service.metric("deepgen_running_images") == 0)
    assert all(engine.runs[seed] == 1 for seed in range(count) if seed not in left)
    assert all(engine.runs[seed] <= 1 for seed in left)
    assert service.metric('deepgen_images_total{kind="generation"}') == sum(engine.runs.values())
    assert service.service._uploads == 0
