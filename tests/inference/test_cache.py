"""Where compiled programs are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from deepgen_jax.inference.cache import enable_compilation_cache
from deepgen_jax.user_warnings import DeepGenWarning

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def _jax_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = {name: jax.config.values[name] for name in SETTINGS}
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DEEPGEN_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("given", "environment", "jax_setting", "folder"),
    [
        (None, None, None, ".cache/deepgen-jax/xla"),
        (None, "ours", None, "ours"),
        (None, None, "jax", "jax"),
        (None, "ours", "jax", "ours"),
        ("given", "ours", "jax", "given"),
        ("off", "ours", None, None),
        (None, "off", "jax", None),
    ],
)
def test_where(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    environment: str | None,
    jax_setting: str | None,
    folder: str | None,
):
    def place(name: str | None) -> str | None:
        return name if name in ("off", None) else str(tmp_path / name)

    if environment:
        monkeypatch.setenv("DEEPGEN_CACHE_DIR", place(environment))
    jax.config.update("jax_compilation_cache_dir", place(jax_setting))
    path = enable_compilation_cache(place(given))
    assert path == (folder and tmp_path / folder)
    assert jax.config.values["jax_enable_compilation_cache"] == (folder is not None)
    if path:
        assert path.is_dir()
        assert jax.config.values["jax_compilation_cache_dir"] == str(path)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.warns(DeepGenWarning, match=r"programs are not kept: .*file/x cannot be used \(Not a directory\)"):
        assert enable_compilation_cache(tmp_path / "file/x") is None


def test_programs_are_kept(tmp_path: Path):
    """In a separate process, as JAX opens the cache once."""
    script = (
        "import sys, jax, jax.numpy as jnp\n"
        "from deepgen_jax.inference.cache import enable_compilation_cache\n"
        "enable_compilation_cache(sys.argv[1])\n"
        "jax.jit(lambda x: sum(jnp.sin(x * i) @ x for i in range(100)))(jnp.ones((8, 8)))\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "kept")], env=environment, check=True)
    assert any(path.name.startswith("jit_") for path in (tmp_path / "kept").iterdir())


_CACHED_PROGRAM = """
import sys, warnings
import jax, jax.numpy as jnp
from deepgen_jax.inference.cache import enable_compilation_cache
enable_compilation_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert float(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((4, 4)))[0, 0]) > 3
print(sorted(str(warning.message) for warning in caught))
"""


def run_program(folder) -> str:
    command = [sys.executable, "-c", _CACHED_PROGRAM, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[: len(content) // 2]])
def test_unreadable_entries_are_made_again(tmp_path, damage):
    assert run_program(tmp_path) == "[]"
    entries = {path: path.stat().st_size for path in tmp_path.glob("*-cache")}
    assert entries
    for path in entries:
        path.write_bytes(damage(path.read_bytes()))
    said = run_program(tmp_path)
    assert f"a compiled program in {tmp_path} could not be read" in said
    assert "persistent compilation cache" not in said  # JAX's own warning
    for path, size in entries.items():
        assert abs(path.stat().st_size - size) < size / 10
    assert run_program(tmp_path) == "[]"
