"""Images that several processes make together are those of one."""

from __future__ import annotations

import socket
import subprocess
import sys

import numpy as np
import pytest
import runs

MAKE = """
import sys
import jax
import numpy as np
from PIL import Image
from deepgen_jax import DeepGenPipeline
from deepgen_jax.parallel import hosts
jax.config.update("jax_cpu_enable_async_dispatch", False)
folder, out, mesh, coordinator, count, process = sys.argv[1:]
hosts.join(coordinator, int(count), int(process))
pipe = DeepGenPipeline.from_pretrained(folder, dtype="float32", mesh=mesh)
reference = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8))
kept = {}
for name, image in (("generated", None), ("edited", [[reference], [reference]])):
    made = pipe(["a red fox", "snow"], image=image, height=64, width=64, num_inference_steps=3, output_type="np")
    kept |= {name: made.latents, f"{name}-images": made.images}
np.savez(f"{out}-{process}.npz", **kept)
"""


def make(folder, out, mesh, count):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}" if count > 1 else ""
    words = [sys.executable, "-c", MAKE, str(folder), str(out), mesh, address, str(count if count > 1 else 0)]
    numbers = range(count) if count > 1 else (-1,)
    started = [
        subprocess.Popen(
            [*words, str(i)], env=runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in numbers
    ]
    for process in started:
        runs.finish(process)
    return [np.load(f"{out}-{i}.npz") for i in numbers]


@pytest.mark.slow
def test_two_and_four_processes(tmp_path):
    model = runs.write_model(tmp_path)
    (alone,) = make(model, tmp_path / "alone", "data=1", 1)
    for mesh, count in (("data=1,fsdp=2", 2), ("data=2,fsdp=2", 4)):
        for made in make(model, tmp_path / mesh, mesh, count):
            for name in ("generated", "edited"):
                np.testing.assert_allclose(made[name], alone[name], rtol=1e-5, atol=1e-5, err_msg=f"{mesh} {name}")
                # A value between two bytes may round to either.
                assert np.abs(made[f"{name}-images"].astype(int) - alone[f"{name}-images"]).max() <= 1
