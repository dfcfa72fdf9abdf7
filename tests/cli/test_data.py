"""``deepgen data``: help, errors in one line, and its commands from end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from deepgen_jax.cli.main import COMMANDS, main
from deepgen_jax.data.example_data import write_example_data

GROUP = COMMANDS["data"].commands

CONFIG = """
from deepgen_jax.data.data_config import DataConfig, SourceConfig
from deepgen_jax.training.run_config import SupervisedConfig

def get_config():
    sources = (
        SourceConfig("pictures", "json", {shapes!r} + "/t2i.json"),
        SourceConfig("edits", "json", {shapes!r} + "/edit.json", task="edit", weight=2.0),
    )
    return SupervisedConfig(
        model={model!r}, out="run", steps=1, trains=("bridge",), dtype="float32",
        data=DataConfig(sources, 3, image_size=64, min_side=16, cache_dir={indices!r}),
    )
"""


@pytest.fixture(scope="module")
def setup(folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shapes/ and a config.py that reads them."""
    root = tmp_path_factory.mktemp("data")
    assert main(["data", "example", "--out", str(root / "shapes")]) == 0
    values = {"model": str(folders("none")), "shapes": str(root / "shapes"), "indices": str(root / "indices")}
    (root / "config.py").write_text(CONFIG.format(**values))
    return root


def test_help_of_the_group(capsys: pytest.CaptureFixture):
    for words in (["data"], ["data", "--help"], ["data", "help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert out.startswith("usage: deepgen data COMMAND")
        for entry in GROUP.values():
            assert all(f"      {example}" in out for example in entry.examples)
    for name, entry in GROUP.items():
        assert main(["data", name, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: deepgen data {name}")
        assert entry.examples[0] in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exmple"], "unknown command 'data exmple'; did you mean example? known: inspect, cache, example"),
        (["zzz"], "unknown command 'data zzz'; known: inspect, cache, example"),
        (["inspect"], "CONFIG missing; see deepgen data inspect --help"),
        (["cache", "tiny_sft"], "--out missing; see deepgen data cache --help"),
        (["inspect", "tiny_stf"], "tiny_stf: no configuration of that name; did you mean tiny_sft?"),
        (["inspect", "tiny_sft", "data.micro_bach=2"], "data.micro_bach=2: data has no field 'micro_bach'; did you"),
        (["inspect", "tiny_sft", "model="], "model is not set; give model=FOLDER"),
        (["inspect", "tiny_sft", "model=nowhere"], "nowhere is not a folder"),
        (["inspect", "c", "a=1", "--seconds", "1", "b=2"], "Unrecognized options: b=2; put settings before the opt"),
        (["inspect", "tiny_sft", "--seconds", "-1"], "--seconds is -1.0; use 0 or more"),
        (["inspect", "tiny_sft", "--contact-sheet", "a.jpg"], "--contact-sheet a.jpg must end with .png"),
        (["example", "--out", "x", "--size", "50"], "--size is 50; use a multiple of 32"),
        (["example", "--out", "x", "--pictures", "0"], "--pictures is 0; use 1 to 72"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture):
    assert main(["data", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"deepgen: error: {message}")
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_example_data(setup: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    shapes = setup / "shapes"
    pairs, edits = (json.loads((shapes / name).read_text()) for name in ("t2i.json", "edit.json"))
    assert (len(pairs), len(edits)) == (8, 4)
    assert [len(edit["input_image"]) for edit in edits] == [1, 2, 1, 2]
    assert len({pair["txt"] for pair in pairs}) == 8
    assert (shapes / "prompts.txt").read_text().splitlines() == [pair["txt"] for pair in pairs]
    caption, path = "a red circle on a white background", "images/picture-0.png"
    assert pairs[0] == {"type": "T2I_SFT", "txt": caption, "image": "", "image_path": path}
    with Image.open(shapes / pairs[0]["image_path"]) as image:
        assert image.size == (64, 64)
        assert (image.getpixel((32, 32)), image.getpixel((2, 2))) == ((220, 40, 40), (245, 245, 245))
    assert edits[0]["instruction"] == "make the circle green"
    with Image.open(shapes / edits[0]["output_image"]) as image:
        assert image.getpixel((32, 32)) == (40, 160, 60)
    write_example_data(tmp_path / "again")
    for path in shapes.rglob("*.*"):
        assert (tmp_path / "again" / path.relative_to(shapes)).read_bytes() == path.read_bytes()
    assert main(["data", "example", "--out", str(shapes)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_inspect(setup: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    config, sheet = str(setup / "config.py"), tmp_path / "sheet.png"
    assert main(["data", "inspect", config, "--contact-sheet", str(sheet), "--seconds", "0.1"]) == 0
    out = capsys.readouterr().out
    for part in ("pictures: 8 of 8 samples usable", "edit 64x64 + 64x64 + 64x64", "samples a second", f": {sheet}"):
        assert part in out
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    words = ["data.mixture.cycle=t2i,edit", "--contact-sheet", "", "--seconds", "0", "--json"]
    assert main(["data", "inspect", config, *words]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [source["usable"] for source in facts["sources"]] == [8, 4]
    assert {bucket["name"]: bucket["samples"] for bucket in facts["buckets"]}["t2i 64x64"] == 8
    assert facts["samples_a_second"] is facts["contact_sheet"] is None


def test_cache_then_inspect(setup: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The command's output is valid input of the next one."""
    config, out, sheet = str(setup / "config.py"), tmp_path / "features", tmp_path / "sheet.png"
    command = ["data", "cache", config, "--out", str(out), "--shard-size", "3", "--compilation-cache", "off"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "pictures: 8 samples in 3 shards\nedits: 4 samples in 2 shards\n" in told
    assert f'SourceConfig("edits", "features", "{out}/edits", task="edit", weight=2.0),' in told
    assert main(command) == 0
    assert capsys.readouterr().out == told
    words = [word for word in told.split() if word.startswith("data.sources.")]
    assert len(words) == 4
    assert main(["data", "inspect", config, *words, "--contact-sheet", str(sheet), "--seconds", "0"]) == 0
    assert "pictures: 8 of 8 samples usable" in capsys.readouterr().out
    assert sheet.is_file()
    assert main(["data", "inspect", config, *words, "data.image_size=96", "--seconds", "0"]) == 2
    assert "pictures was cached with image_size 64, and this run has 96" in capsys.readouterr().err
    assert main(["data", "cache", config, "--out", str(setup / "shapes")]) == 2
    assert "shapes holds edit.json, no cache of a source of this config" in capsys.readouterr().err
