"""Two local replicas under Ray Serve; one is killed while requests run, and clients that retry lose none."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import openai
import pytest
from support.services import pixels

from deepgen_jax import DeepGenPipeline

PROMPT = "a small red circle"


@pytest.mark.slow
def test_a_replica_that_dies_loses_no_request(monkeypatch):
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    from deepgen_jax.serving.ray_app import Arguments, build

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Cores may be shared: the node can take long to start.
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 18713})
        serve.run(build(Arguments(min_replicas=2, max_replicas=2, max_batch=2, num_cpus=0.5)), route_prefix="/")
        client = openai.OpenAI(base_url="http://127.0.0.1:18713/v1", api_key="none", max_retries=10, timeout=120)
        assert [model.id for model in client.models.list()] == ["nano"]
        answers: dict[int, np.ndarray] = {}

        def ask(first: int) -> None:
            for seed in range(first, 24, 6):
                made = client.images.generate(prompt=PROMPT, extra_body={"seed": seed})
                answers[seed] = pixels(made.data[0].b64_json)

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(6)]
        for thread in threads:
            thread.start()
        while len(answers) < 4:
            time.sleep(0.05)
        victim = replicas()[0]
        os.kill(victim, signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert victim not in replicas()
    finally:
        serve.shutdown()
        ray.shutdown()
    assert sorted(answers) == list(range(24))
    pipe = DeepGenPipeline.from_pretrained("nano")
    for seed in (0, 11, 23):
        np.testing.assert_array_equal(answers[seed], pipe(PROMPT, seed=seed, output_type="np").images[0])


def replicas() -> list[int]:
    """Process ids of the replicas."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
                if "ServeReplica" in file.read():
                    found.append(int(pid))
        except OSError:
            continue
    return found
