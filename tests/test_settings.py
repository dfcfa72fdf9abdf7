"""Configurations from files, and words that change them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.settings import apply, parse, to_json
from deepgen_jax.training import config_files
from deepgen_jax.training.config_files import load_config
from deepgen_jax.training.run_config import SupervisedConfig

CONFIG = SupervisedConfig(
    model="deepgen",
    out="run",
    steps=10,
    trains=("bridge", "mmdit"),
    data=DataConfig(
        sources=(
            SourceConfig("pairs", "json", "pairs.json", weight=2.0),
            SourceConfig("edits", "json", "edits.json", task="edit"),
        ),
        micro_batch=4,
    ),
)


@dataclass(frozen=True)
class Inner:
    low: int = 0
    high: int = 1

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise DeepGenError(f"low {self.low} is not below high {self.high}")


@dataclass(frozen=True)
class Values:
    count: int = 1
    share: float = 0.5
    on: bool = False
    text: str = ""
    mode: Literal["fast", "exact"] = "fast"
    bits: Literal[8, 16] = 8
    limit: float | None = None
    size: int | str = 1
    words: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    weights: tuple[tuple[str, float], ...] = ()
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    inners: tuple[Inner, ...] = (Inner(), Inner(2, 3))
    table: Mapping[str, float] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("word", "name", "want"),
    [
        ("count=-3", "count", -3),
        ("count=1e4", "count", 10_000),
        ("count=12345678901234567891", "count", 12345678901234567891),
        ("share=1e-4", "share", 1e-4),
        ("share=2", "share", 2.0),
        ("on=true", "on", True),
        ("on=False", "on", False),
        ("text=a = b, c", "text", "a = b, c"),
        ("text=", "text", ""),
        ("text=null", "text", "null"),
        ("mode=exact", "mode", "exact"),
        ("bits=16", "bits", 16),
        ("limit=none", "limit", None),
        ("limit=3", "limit", 3.0),
        ("size=7", "size", 7),
        ("size=auto", "size", "auto"),
        ("words=a, b", "words", ("a", "b")),
        ('words=["a, b", "c"]', "words", ("a, b", "c")),
        ("words=", "words", ()),
        ("pair=3,4", "pair", (3, 4.0)),
        ('weights=[["t2i", 2], ["edit", 1.5]]', "weights", (("t2i", 2.0), ("edit", 1.5))),
        ('inner={"low": -1}', "inner", Inner(-1, 1)),
        ('maybe={"high": 5}', "maybe", Inner(0, 5)),
        ("maybe=null", "maybe", None),
        ('inners=[{"high": 9}]', "inners", (Inner(0, 9),)),
        ("inners.1.high=9", "inners", (Inner(), Inner(2, 9))),
        ('table={"a": 1}', "table", {"a": 1.0}),
        ("table.b=2", "table", {"b": 2.0}),
    ],
)
def test_values_by_type(word: str, name: str, want: object):
    got = getattr(apply(Values(), [word]), name)
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["count"], "count is no override; write path.to.field=value"),
        (["=3"], "=3 is no override"),
        (["count=fast"], "count=fast: not a number"),
        (["count=1.5"], "count=1.5: not a whole number"),
        (["share=fast"], "share=fast: not a number"),
        (["share=nan"], "share=nan: not a number"),
        (["on=1"], "on=1: not a truth value; write true or false"),
        (["mode=exakt"], "mode=exakt: 'exakt' is unknown; did you mean exact? known: fast, exact"),
        (["pair=1"], "pair=1: 1 items; give 2"),
        (["pair=1,x"], "pair=1,x: not a number"),
        (["words=[1]"], "words=[1]: not a text; put it in quotes"),
        (["words=[a]"], "words=[a]: not JSON (Expecting value)"),
        (["weights=t2i,2"], "weights=t2i,2: not a JSON list"),
        (["inner=3"], "inner=3: not a JSON object"),
        (['inners=["one"]'], 'not a JSON object; write it as {"name": value}'),
        (['inner={"hgh": 3}'], "Inner has no field 'hgh'; did you mean high? known: low, high"),
        (["cuont=3"], "cuont=3: Values has no field 'cuont'; did you mean count? known: count, share"),
        (["inner.hgh=3"], "inner.hgh=3: inner has no field 'hgh'; did you mean high?"),
        (["count.x=3"], "count.x=3: count is a value without fields; write count=value"),
        (["maybe.low=3"], "maybe.low=3: maybe is null; give it whole"),
        (["inners.2.low=3"], "inners.2.low=3: inners has no item '2'; known: 0, 1"),
        (["count=1", "count=2"], "count is given twice, count=1 and count=2; keep one of them"),
        (["inner.low=1", "inner={}"], "inner.low=1 and inner={} set the same thing"),
        (["inner={}", "inner.low=1"], "inner={} and inner.low=1 set the same thing"),
        (["inner.low=5"], "low 5 is not below high 1"),
        (["text"], "text is no override"),
    ],
)
def test_what_is_refused(words: list[str], message: str):
    with pytest.raises(DeepGenError) as error:
        apply(Values(), words)
    assert str(error.value).startswith(message) or message in str(error.value)
    assert "\n" not in str(error.value)


def test_changes_of_one_dataclass_are_checked_together():
    """Neither word is valid without the other, whichever comes first."""
    for words in (["inner.low=5", "inner.high=9"], ["inner.high=9", "inner.low=5"], ["inner.high=-1", "inner.low=-2"]):
        assert apply(Values(), words).inner.low < apply(Values(), words).inner.high
    words = ["data.mixture.cycle=t2i", 'data.sources=[{"name": "one", "kind": "json", "path": "x.json"}]']
    data = apply(CONFIG, words).data
    assert data.mixture == MixtureConfig(cycle=("t2i",))
    assert [source.name for source in data.sources] == ["one"]
    with pytest.raises(DeepGenError, match="mixture disagrees"):
        apply(CONFIG, words[:1])


def test_items_by_name_and_index():
    words = ["data.sources.pairs.path=/a", "data.sources.1.path=/b", "data.sources.edits.fields.text=caption"]
    with pytest.raises(DeepGenError, match=r"sources\.1\.path=/b and .*edits.* set the same thing"):
        apply(CONFIG, words)
    sources = apply(CONFIG, [words[0], words[2]]).data.sources
    assert sources[0] == dataclasses.replace(CONFIG.data.sources[0], path="/a")
    assert sources[1] == dataclasses.replace(CONFIG.data.sources[1], fields={"text": "caption"})
    assert apply(CONFIG, [words[1]]).data.sources[1].path == "/b"
    with pytest.raises(DeepGenError, match=r"has no item 'pair'; did you mean pairs. known: pairs, edits"):
        apply(CONFIG, ["data.sources.pair.path=/a"])


def test_nothing_else_changes():
    changed = apply(CONFIG, ["optimizer.learning_rate=3e-5", "ema_decay=0.99", "trains=bridge,lora"])
    assert changed.optimizer.learning_rate == 3e-5
    assert changed.trains == ("bridge", "lora")
    back = apply(changed, ["optimizer.learning_rate=1e-4", "ema_decay=null", "trains=bridge,mmdit"])
    assert back == apply(CONFIG, []) == CONFIG
    with pytest.raises(DeepGenError, match="'lors' is unknown; did you mean lora"):
        apply(CONFIG, ["trains=lors"])


@given(
    st.builds(
        Values,
        count=st.integers(),
        share=st.floats(allow_nan=False, allow_infinity=False),
        on=st.booleans(),
        text=st.text(),
        mode=st.sampled_from(["fast", "exact"]),
        limit=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        size=st.integers(),
        words=st.lists(st.text()).map(tuple),
        pair=st.tuples(st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
        inner=st.builds(Inner, low=st.integers(-5, 0), high=st.integers(1, 5)),
        table=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
    )
)
def test_json_round_trip(values: Values):
    """A config's JSON, field by field as words or whole, gives the config back."""
    as_json = to_json(values)
    assert json.loads(json.dumps(as_json)) == as_json
    assert parse(Values, as_json, "values") == values
    words = [f"{key}={item if isinstance(item, str) else json.dumps(item)}" for key, item in as_json.items()]
    assert apply(Values(), words) == values


GOOD = """
from __future__ import annotations
from dataclasses import dataclass, field
from deepgen_jax.training.run_config import RunConfig

@dataclass(frozen=True)
class Extra:
    depth: int = 1

@dataclass(frozen=True, kw_only=True)
class MyConfig(RunConfig):
    extra: Extra = field(default_factory=Extra)

def get_config() -> RunConfig:
    return MyConfig(model="m", out="o", steps=3, trains=("bridge",))
"""


def test_config_file(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    assert apply(load_config(str(path)), ["extra.depth=4", "steps=5"]).extra.depth == 4
    path.write_text(GOOD.replace("steps=3", "steps=4"))
    assert load_config(str(path)).steps == 4
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "mine.py has no function get_config()"),
        ("get_config = 3\n", "mine.py has no function get_config()"),
        ("def get_config():\n    return {}\n", "mine.py: get_config() returned a dict; return a RunConfig"),
        ("def get_config():\n    x = 1\n    return x / 0\n", "mine.py, line 3: ZeroDivisionError: division by zero"),
        ("import nothing_such\n", "mine.py, line 1: ModuleNotFoundError: No module named 'nothing_such'"),
        ("x = 1\ndef get_config(:\n", "mine.py, line 2: SyntaxError: invalid syntax"),
        (GOOD.replace("steps=3", "steps=0"), "mine.py, line 15: steps is 0; it must be at least 1"),
    ],
)
def test_bad_config_files(tmp_path: Path, text: str, message: str):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(DeepGenError) as error:
        load_config(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_packaged_configs_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text(GOOD)
    monkeypatch.setattr(config_files, "packaged_configs", lambda: {"mine": tmp_path / "mine.py"})
    assert load_config("mine").steps == 3
    for wrong in ("mien", "configs/mien.py"):
        with pytest.raises(DeepGenError, match=f"^{wrong}: no .*; did you mean mine. known: mine$"):
            load_config(wrong)
    with pytest.raises(DeepGenError, match="is no Python file"):
        load_config(str(tmp_path))


def test_every_packaged_config_loads():
    for name in config_files.packaged_configs():
        config = load_config(name)
        assert parse(type(config), to_json(config), name) == config


def test_options_of_a_reward():
    options = {"url": "http://judge:8000/v1", "client": {"cache": "verdicts.jsonl", "tries": 3}}
    changed = apply(load_config("grpo"), [f"rewards.preference.options={json.dumps(options)}"])
    assert changed.rewards[0].options == options
