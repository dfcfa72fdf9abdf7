"""Registries find built-in, registered and installed classes, and files; what fails is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.plugins import install_wheel

from deepgen_jax import registry
from deepgen_jax.errors import DeepGenError
from deepgen_jax.registry import Registry, load_file


@pytest.fixture
def things() -> Registry:
    return Registry("thing", "deepgen_jax.test_things", {"fraction": "fractions:Fraction"}, base="numbers:Number")


def test_built_in_and_registered(things: Registry):
    from decimal import Decimal
    from fractions import Fraction

    assert things.load("fraction") is Fraction
    things.register("decimal", "decimal:Decimal")
    assert things.load("decimal") is Decimal
    assert things.names() == ["fraction", "decimal"]
    things.register("decimal", Decimal)
    with pytest.raises(DeepGenError, match="'fraction' is registered already, as fractions:Fraction"):
        things.register("fraction", Decimal)
    with pytest.raises(DeepGenError, match="a plain name and a module:Class"):
        things.register("a:b", "decimal:Decimal")


def test_a_class_itself(things: Registry, tmp_path: Path):
    from decimal import Decimal

    assert things.load("decimal:Decimal") is Decimal
    path = tmp_path / "mine.py"
    path.write_text("import dataclasses\n\n@dataclasses.dataclass\nclass One(int):\n    a: 'int' = 1\n")
    assert things.load(f"{path}:One").__name__ == "One"
    assert things.load(f"{path}:One") is things.load(f"{path}:One")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fractoin", r"^thing: 'fractoin' is unknown; did you mean fraction\? known: fraction; or give module:Class"),
        ("no_such_module:X", "no_such_module cannot be imported .*install its package"),
        ("decimal:Decimall", r"decimal has no Decimall; did you mean Decimal\?"),
        ("json:JSONDecoder", "json:JSONDecoder is no subclass of numbers.Number"),
        ("decimal:", "'decimal:' is no module:Class"),
        ("none.py:X", "none.py is no Python file"),
    ],
)
def test_mistakes(things: Registry, name: str, message: str):
    with pytest.raises(DeepGenError, match=message):
        things.load(name)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\ny = (", "broken.py, line 2: SyntaxError"),
        ("x = 1\n\nraise KeyError('key')", "broken.py, line 3: KeyError: 'key'"),
        ("import nothing_there", "broken.py, line 1: ModuleNotFoundError"),
    ],
)
def test_files_that_fail_name_their_line(tmp_path: Path, code: str, message: str):
    path = tmp_path / "broken.py"
    path.write_text(code)
    for _ in range(2):
        with pytest.raises(DeepGenError, match=message):
            load_file(path, "thing")


def test_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, things: Registry):
    points = {things.group: "mine = outside_thing:Mine"}
    monkeypatch.syspath_prepend(str(install_wheel(tmp_path, "outside_thing", "class Mine(int): pass\n", points)))
    registry._entry_points.cache_clear()
    assert things.names() == ["fraction", "mine"]
    assert things.load("mine").__module__ == "outside_thing"
    (tmp_path / "b").mkdir()
    other = {things.group: "mine = other_thing:Mine"}
    monkeypatch.syspath_prepend(str(install_wheel(tmp_path / "b", "other_thing", "", other)))
    registry._entry_points.cache_clear()
    with pytest.raises(DeepGenError, match="two installed packages name 'mine'"):
        things.names()
    assert things.load("fraction").__name__ == "Fraction"
    registry._entry_points.cache_clear()


def test_looking_a_name_up_imports_nothing():
    code = (
        "import sys; from deepgen_jax.data.data_config import SourceConfig; SourceConfig('s', 'parquet', 'x'); "
        "SourceConfig('s', 'synthetic', 'size=96'); SourceConfig('s', 'a_module:A', 'x'); "
        "sys.exit(any(m in sys.modules for m in ('jax', 'deepgen_jax.nano', 'deepgen_jax.data.sources.parquet')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
