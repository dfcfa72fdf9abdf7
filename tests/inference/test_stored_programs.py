"""Programs kept on disk: the same results, made once, and never a program of other code or settings."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepgen_jax.inference import programs, stored_programs
from deepgen_jax.inference.cache import enable_compilation_cache
from deepgen_jax.inference.stored_programs import keep_programs, stored_jit

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """JAX's own cache, too, from which executables cannot be stored."""
    enable_compilation_cache(tmp_path_factory.mktemp("cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture
def folder(tmp_path: Path):
    keep_programs(tmp_path)
    yield tmp_path / stored_programs.FOLDER
    keep_programs(None)


class Function:
    """A function that counts how often it is traced; every `start` is that of a new process."""

    def __init__(self) -> None:
        self.traces = 0

    def start(self, **options) -> stored_jit:
        def product(x: jax.Array, scale: float, y: dict[str, jax.Array] | None = None) -> dict[str, jax.Array]:
            self.traces += 1
            total = jnp.sin(x) @ x.T * scale
            return {"total": total if y is None else total + y["y"], "first": x[0]}

        return stored_jit(product, static_argnames=("scale",), **options)


def test_a_program_is_loaded_without_tracing(folder: Path):
    function = Function()
    made = function.start()(X, 2.0, {"y": jnp.ones((3, 3))})
    loaded = function.start()(X, 2.0, {"y": jnp.ones((3, 3))})
    assert function.traces == 1
    assert len(list(folder.iterdir())) == 1
    jax.tree.map(np.testing.assert_array_equal, made, loaded)
    plain = jax.jit(lambda x: jnp.sin(x) @ x.T * 2.0 + jnp.ones((3, 3)))(X)
    np.testing.assert_array_equal(made["total"], plain)


def test_other_calls_have_programs_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch):
    function, calls = Function(), 0

    def check(call) -> None:
        nonlocal calls
        call(function.start())
        calls += 1
        assert function.traces == calls
        call(function.start())
        assert function.traces == calls
        assert len(list(folder.iterdir())) == calls

    check(lambda f: f(X, 2.0))
    check(lambda f: f(X, 3.0))
    check(lambda f: f(X[:2], 2.0))
    check(lambda f: f(X.astype(np.float16), 2.0))
    check(lambda f: f(X, 2.0, {"y": np.ones((3, 3), np.float32)}))
    check(lambda f: f(X, scale=2.0, y={"y": np.ones((3, 3), np.float32)}))
    with jax.default_matmul_precision("highest"):
        check(lambda f: f(X, 2.0))
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " ")
    check(lambda f: f(X, 2.0))
    monkeypatch.setattr(stored_programs, "_fixed_environment", lambda: ("other sources",))
    check(lambda f: f(X, 2.0))


def test_settings_of_a_thread_are_seen_in_one_process(folder: Path):
    f = Function().start()
    assert f(X, 2.0)["total"].dtype == jnp.float32
    with jax.enable_x64(True):
        assert f(X.astype(np.float64), 2.0)["total"].dtype == jnp.float64


@settings(max_examples=8, deadline=None)
@given(cut=st.floats(0, 0.999), flip=st.integers(0, 10**6), kind=st.sampled_from(["cut", "flip", "other"]))
def test_damaged_programs_are_made_again(tmp_path_factory, cut: float, flip: int, kind: str):
    path, function = tmp_path_factory.mktemp("programs"), Function()
    keep_programs(path)
    try:
        function.start()(X, 2.0)
        (file,) = (path / stored_programs.FOLDER).iterdir()
        content = bytearray(file.read_bytes())
        if kind == "flip":
            content[flip % len(content)] ^= 0x55
        file.write_bytes({"cut": content[: int(len(content) * cut)], "flip": content, "other": b"x" * 100}[kind])
        again = function.start()(X, 2.0)
        assert function.traces == 2
        np.testing.assert_array_equal(again["total"], jax.jit(lambda x: jnp.sin(x) @ x.T * 2.0)(X))
        function.start()(X, 2.0)
        assert function.traces == 2
    finally:
        keep_programs(None)


def test_programs_that_do_not_load_are_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    function = Function()
    function.start()(X, 2.0)

    def refuse(*_: object) -> None:
        raise RuntimeError("compiled for another processor")

    monkeypatch.setattr(stored_programs.serialize_executable, "deserialize_and_load", refuse)
    assert function.start()(X, 2.0)["first"].shape == (4,)
    assert function.traces == 2


def test_threads_compile_a_program_once():
    function, barrier = Function(), threading.Barrier(8)
    f = function.start()

    def call(_: int) -> np.ndarray:
        barrier.wait()
        return np.asarray(f(X, 2.0)["total"])

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(8)))
    assert function.traces == 1
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_prepared_programs_are_those_that_are_called(folder: Path):
    function = Function()
    for _ in range(2):
        f = function.start()
        shapes = f.prepare(jax.ShapeDtypeStruct(X.shape, X.dtype), 2.0)
        assert {name: x.shape for name, x in shapes.items()} == {"total": (3, 3), "first": (4,)}
        # Shapes that one program returns are arguments of the next.
        f.prepare(shapes["total"], 2.0)
        out = f(jnp.asarray(X), 2.0)
        f(out["total"], 2.0)
        assert function.traces == 2
        limit = time.monotonic() + 60  # both are written in the background
        while len(list(folder.glob(f"*{stored_programs.SUFFIX}"))) < 2 and time.monotonic() < limit:
            time.sleep(0.01)


def test_failures_are_raised_and_forgotten():
    outcome = [RuntimeError("RESOURCE_EXHAUSTED"), None]

    @stored_jit
    def f(x: jax.Array) -> jax.Array:
        if error := outcome.pop(0):
            raise error
        return x + 1

    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        f(X)
    np.testing.assert_array_equal(f(X), X + 1)


def test_traced_calls_go_to_jit():
    f = Function().start()
    gradient = jax.grad(lambda x: f(x, 2.0)["total"].sum())(jnp.asarray(X))
    assert gradient.shape == X.shape
    assert jax.vmap(lambda x: f(x, 2.0)["first"])(jnp.stack([X, X])).shape == (2, 4)
    with jax.disable_jit():
        assert f(X, 2.0)["first"].shape == (4,)


def test_programs_of_foreign_code_are_not_kept(folder: Path):
    function = Function()
    for _ in range(2):
        function.start(keep=lambda static: static["scale"] != 2.0)(X, 2.0)
    assert function.traces == 2
    assert not folder.exists()
    known = {name: programs._known_sampler({"sampler": name}) for name in ("euler", "DPM++ 2M", "my_package.mine:Mine")}
    assert known == {"euler": True, "DPM++ 2M": True, "my_package.mine:Mine": False}


def test_the_oldest_programs_are_removed(tmp_path: Path):
    for age in range(10):
        path = tmp_path / f"{age}{stored_programs.SUFFIX}"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 - age, 1000 - age))
    stored_programs._remove_oldest(tmp_path, 450)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]


_SECOND_START = """
import sys, jax, numpy as np
from deepgen_jax import DeepGenPipeline
from deepgen_jax.inference.cache import enable_compilation_cache
enable_compilation_cache(sys.argv[1])
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None)
pipe = DeepGenPipeline.from_pretrained("nano")
before = len(compiled)
image = pipe("a small red circle", seed=3, output_type="np").images
first = len(compiled) - before
pipe("a small red circle", seed=3, num_inference_steps=7)
print(first, len(compiled) - before - first, image.sum(dtype=np.int64))
"""


def test_a_second_start_and_another_number_of_steps_compile_nothing(tmp_path: Path):
    """In separate processes, with the programs of nano."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    lines = []
    for _ in range(2):
        command = [sys.executable, "-c", _SECOND_START, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        lines.append([int(value) for value in done.stdout.split()])
    (first, more, image), (again, more_again, image_again) = lines
    assert first > 0
    assert more == 0
    assert (again, more_again) == (0, 0)
    assert image_again == image
