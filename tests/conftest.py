"""Shared fixtures: the tiny checkpoints under ``tests/fixtures`` and their golden arrays."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

if TYPE_CHECKING:
    from deepgen_jax import DeepGenPipeline

# libtpu, which tests of `deepgen compile` use, would be tried as a backend and print errors where there is no TPU.
if importlib.util.find_spec("libtpu") and not importlib.util.find_spec("jax_cuda12_plugin"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs are compiled once for all tests and their processes, and for later runs.
_PROGRAMS = os.path.join(tempfile.gettempdir(), f"deepgen-jax-tests-{os.getuid()}", "xla")
os.environ.setdefault("DEEPGEN_CACHE_DIR", _PROGRAMS)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _PROGRAMS)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# Programs this small take far longer to compile than to run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

# Cores may be shared: how long an example takes says nothing about what it shows.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

#: Stage checkpoints under ``tests/fixtures`` by their names in ``goldens_checkpoints.npz``, with convert options.
LAYOUTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "sft": ("deepgen_sft.pth", {}),
    "sft_adapters": ("deepgen_sft.pth", {"keep_lora": True}),
    "pretrain": ("deepgen_pretrain.pth", {}),
    "rl": ("deepgen_rl", {}),
    "ds": ("deepgen_ds", {}),
    "model_pt": ("model.pt", {}),
    "zip": ("DeepGen_CKPT.zip.part-aa", {}),
    "none": (None, {}),
}
DATA = Path(__file__).parent / "fixtures"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the groups first, as they take longest, so that no process is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(scope="module", autouse=True)
def free_programs() -> Iterator[None]:
    """Frees compiled programs after a module, once they have many of the process's memory mappings.

    Linux allows a process 65,530 (``vm.max_map_count``), and XLA crashes without another. All tests need more.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Tiny checkpoints in every released layout, and ``GOLDENS.md`` that says what each is."""
    return DATA


@pytest.fixture(scope="session")
def cases() -> dict[str, Any]:
    """Prompts, judge answers, OCR lines and size tables that go with the golden arrays."""
    return json.loads((DATA / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def goldens() -> Callable[[str], dict[str, np.ndarray]]:
    """``goldens("dit")`` -> arrays of ``goldens_dit.npz`` by name."""
    loaded: dict[str, dict[str, np.ndarray]] = {}

    def load(part: str) -> dict[str, np.ndarray]:
        if part not in loaded:
            with np.load(DATA / f"goldens_{part}.npz") as arrays:
                loaded[part] = dict(arrays)
        return loaded[part]

    return load


@pytest.fixture(scope="session")
def tolerance() -> Callable[[str, str], float]:
    """``tolerance("dit", "noref/base/velocity/0")`` -> its absolute tolerance in ``GOLDENS.md`` (0 for exact)."""
    table: dict[tuple[str, str], float] = {}
    part = ""
    for line in (DATA / "GOLDENS.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## goldens_"):
            part = line.removeprefix("## goldens_").removesuffix(".npz")
        cells = [cell.strip() for cell in line.split("|")]
        if part and len(cells) >= 6 and cells[1] not in ("name", "---"):
            table[part, cells[1]] = float(cells[4]) if cells[4] else 0.0

    # The table does not list diffusers/*; its preamble gives them the tolerances of rl/*.
    return lambda golden_part, name: table[golden_part, name.replace("diffusers/", "rl/")]


@pytest.fixture(scope="session")
def folders(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folders("sft")`` -> a model folder converted from that layout (the names of ``LAYOUTS``), made once."""
    from deepgen_jax.convert import convert

    made: dict[str, Path] = {}

    def make(layout: str) -> Path:
        if layout not in made:
            out = tmp_path_factory.mktemp("models") / layout
            sources: dict[str, Any] = {"hparams": data_dir / "deepgen_config.json"}
            if layout == "diffusers":
                sources["diffusers"] = data_dir / "deepgen_diffusers"
            else:
                sources |= {"qwen": data_dir / "qwen2_5_vl", "sd3": data_dir / "sd3_5_kontext"}
                checkpoint, options = LAYOUTS[layout]
                if checkpoint is not None:
                    sources["checkpoint"] = data_dir / checkpoint
                sources |= options
            convert(out=out, **sources)
            made[layout] = out
        return made[layout]

    return make


@pytest.fixture(scope="session")
def pipelines(folders: Callable[[str], Path]) -> Callable[[str], DeepGenPipeline]:
    """``pipelines("sft")`` -> a float32 pipeline on one device, loaded once."""
    from deepgen_jax import DeepGenPipeline

    loaded: dict[str, DeepGenPipeline] = {}

    def load(layout: str) -> DeepGenPipeline:
        if layout not in loaded:
            loaded[layout] = DeepGenPipeline.from_pretrained(folders(layout))
        return loaded[layout]

    return load


@pytest.fixture(scope="session")
def pictures(goldens: Callable[[str], dict[str, np.ndarray]]) -> dict[str, Image.Image]:
    """The small pictures that golden cases refer to by name."""
    arrays = goldens("vision")
    return {name.removeprefix("image/"): Image.fromarray(x) for name, x in arrays.items() if name.startswith("image/")}


@pytest.fixture(scope="session")
def check_golden(
    goldens: Callable[[str], dict[str, np.ndarray]], tolerance: Callable[[str, str], float]
) -> Callable[[str, str, Any], None]:
    """``check_golden("dit", name, got)`` asserts shape and values within the tolerance of ``GOLDENS.md``."""

    def check(part: str, name: str, got: Any) -> None:
        want, actual = goldens(part)[name], np.asarray(got)
        assert actual.shape == want.shape, name
        allowed = 1.0 if want.dtype == np.uint8 else tolerance(part, name)
        error = np.max(np.abs(actual.astype(np.float64) - want))
        assert error <= allowed, f"{part} {name}: off by {error:.2e}, allowed {allowed:.0e}"

    return check
