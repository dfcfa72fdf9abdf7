"""Inputs and output tree of each benchmark."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import benchmark_data as data
from support.benchmark_data import make, tree
from support.fake_pipeline import FakePipeline

from deepgen_jax.cli.main import main
from deepgen_jax.config import DeepGenConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Reading
from deepgen_jax.evaluation.benchmark_kinds import BENCHMARKS, open_benchmark
from deepgen_jax.evaluation.run import RECORDS, RunFolder, chosen, image_seed, run_settings
from deepgen_jax.inference.batch import EDIT_NEGATIVE_PROMPT
from deepgen_jax.user_warnings import collect_warnings

NAMES = sorted(data.WRITERS)


@pytest.mark.parametrize("name", NAMES)
def test_the_tree_is_the_official_one(name: str, tmp_path: Path, pipe: FakePipeline):
    out = make(name, tmp_path)
    assert tree(out) == data.TREES[name]
    benchmark = open_benchmark(name)
    made = len(RunFolder(out).items()) * benchmark.images
    lines = (out / RECORDS / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == made
    assert len({json.loads(line)["seed"] for line in lines}) == made
    # Run again, nothing is made again and nothing changes.
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    calls = len(pipe.calls)
    make(name, tmp_path)
    assert len(pipe.calls) == calls
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_run_makes_only_missing_images(name: str, tmp_path: Path, pipe: FakePipeline):
    out = make(name, tmp_path)
    whole = {path: path.read_bytes() for path in out.rglob("*.png")}
    parts = [out / file for item in RunFolder(out).items() for file in item.files]
    parts[0].unlink()
    parts[1].write_bytes(parts[1].read_bytes()[:-20])
    torn = out / RECORDS / "metadata.jsonl"
    torn.write_bytes(torn.read_bytes()[:-30])
    pipe.calls.clear()
    make(name, tmp_path, "--batch-size", "1")
    assert len(pipe.calls) == 2
    for path, content in whole.items():
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_settings_are_the_published_ones(name: str, tmp_path: Path, pipe: FakePipeline):
    benchmark = open_benchmark(name)
    settings = run_settings(benchmark, DeepGenConfig())
    assert (settings.width, settings.height, settings.steps) == (512, 512, 50)
    assert settings.guidance == (7.5 if name == "dpg" else 4.0)
    assert settings.negative_prompt == (EDIT_NEGATIVE_PROMPT if benchmark.task == "edit" else "")
    make(name, tmp_path)
    for call in pipe.calls:
        assert (call["width"], call["steps"], set(call["negative_prompt"])) == (64, 2, {settings.negative_prompt})
        if benchmark.task == "edit":
            assert {image.size for images in call["image"] for image in images} == {(64, 64)}
        else:
            assert call["image"] is None


def test_a_model_of_a_custom_kind_keeps_its_settings():
    config = dataclasses.replace(DeepGenConfig(), guidance_scale=1.0)
    config = dataclasses.replace(config, mmdit=dataclasses.replace(config.mmdit, sample_size=12))
    settings = run_settings(open_benchmark("imgedit"), config)
    assert (settings.width, settings.guidance, settings.negative_prompt) == (96, 1.0, "")
    assert run_settings(open_benchmark("dpg"), config, guidance=3.0, side=128).guidance == 3.0


def test_rows_become_prompts(tmp_path: Path):
    def prompts(name: str, **options) -> list[str]:
        source = tmp_path / name
        source.mkdir()
        reading = Reading(data.WRITERS[name](source), "m", **options)
        return [item.prompt for item in open_benchmark(name).read(reading)]

    assert prompts("dpg") == ["a barn at dusk", "a lamp", "a chess board"]
    assert prompts("uniredit") == ["do 0", "Boxes are pushed. do 1", "Boxes are pushed. do 2"]
    assert prompts("gedit", splits=("cn",)) == ["change 1"]
    assert prompts("unigenbench")[2] == 'two cats, "ink", 7'
    (tmp_path / "x").mkdir()
    wise = open_benchmark("wise").read(Reading(data.wise(tmp_path / "x"), "m"))
    assert {item.key: item.category for item in wise} == {"1": "cultural", "401": "time", "901": "chemistry"}


@pytest.mark.parametrize("split", ["en", "en_long", "zh", "zh_long"])
@pytest.mark.parametrize("ours", [False, True])
def test_unigenbench_in_both_kinds_of_columns(split: str, ours: bool, tmp_path: Path):
    path = data.unigenbench(tmp_path, split, ours)
    items = open_benchmark("unigenbench").read(Reading(path, "m"))
    assert [item.files[0] for item in items] == [f"{split}/m/{i}_0.png" for i in (0, 1, 7)]
    assert len(items[0].facts["points"]) == 2
    assert not open_benchmark("unigenbench").read(Reading(path, "m", ("zh_other",)))


def test_a_missing_comma_of_the_official_file_is_read(tmp_path: Path):
    path = data.unigenbench(tmp_path)
    whole = path.read_text()
    path.write_text(whole.replace('""Style"", ""Attribute', '""Style"" ""Attribute', 1))
    told: list[str] = []
    with collect_warnings(told.append):
        items = open_benchmark("unigenbench").read(Reading(path, "m"))
    assert [len(item.facts["points"]) for item in items] == [2, 2, 2]
    assert len(told) == 1
    assert "row 1: sub_dims lacks a comma" in told[0]
    path.write_text(whole.replace("Testpoints", "Test"))
    with pytest.raises(DeepGenError, match="row 1: sub_dims is no JSON with 'Testpoints'"):
        open_benchmark("unigenbench").read(Reading(path, "m"))


def test_variants_of_deepgens_repositories(tmp_path: Path):
    (tmp_path / "dpg.jsonl").write_text('{"prompt": "a barn", "key": "partiprompts1"}\n')
    (item,) = open_benchmark("dpg").read(Reading(tmp_path / "dpg.jsonl", "m"))
    assert (item.key, item.prompt) == ("partiprompts1", "a barn")
    (tmp_path / "corebench.jsonl").write_text('{"ID": "R-LR-001", "Prompt": "a cup"}\n')
    (item,) = open_benchmark("corebench").read(Reading(tmp_path / "corebench.jsonl", "m"))
    assert item.files[3] == "m/R-LR/R-LR-001-3.png"
    row = {"tag": "x", "include": [], "prompt": "a bench", "detailed_caption": "a wooden bench"}
    (tmp_path / "geneval_prompt.jsonl").write_text(json.dumps(row) + "\n")
    (item,) = open_benchmark("geneval").read(Reading(tmp_path, "m"))
    assert item.prompt == "a bench"
    assert item.facts["row"] == row
    (tmp_path / "captions.txt").write_text("a bench\n\na cow\n")
    with collect_warnings(lambda text: None):
        items = open_benchmark("geneval").read(Reading(tmp_path / "captions.txt", "m"))
    assert [item.prompt for item in items] == ["a bench", "a cow"]


#: Benchmark -> a column of its rows, and the words that name it where it is missing.
COLUMNS = {
    "geneval": ("prompt", "'prompt'"),
    "unigenbench": ("prompt_en", "'prompt_en' or 'prompt'"),
    "wise": ("Explanation", "'Explanation'"),
    "corebench": ("Prompt", "'Prompt'"),
    "cvtg": ("index", "'index'"),
    "imgedit": ("edit_type", "'edit_type'"),
    "gedit": ("instruction", "'instruction'"),
    "rise": ("category", "'category'"),
    "uniredit": ("instruction", "'instruction'"),
}


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_a_missing_column_is_named_with_file_and_row(name: str, tmp_path: Path):
    given = data.WRITERS[name](tmp_path)
    column, told = COLUMNS[name]
    for path in [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".csv")]:
        path.write_text(path.read_text(encoding="utf-8").replace(f'"{column}"', '"other"').replace(
            f"index,{column}", "index,other"), encoding="utf-8")  # fmt: skip
    if name == "gedit":
        from pyarrow import parquet

        (path,) = tmp_path.glob("*.parquet")
        table = parquet.read_table(path)
        parquet.write_table(table.rename_columns({column: "other"}), path)
    with pytest.raises(DeepGenError) as raised:
        open_benchmark(name).read(Reading(given, "m"))
    message = str(raised.value)
    assert f"there is no column {told}" in message
    assert "row 1" in message
    assert str(tmp_path) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("geneval", "{", "row 1: not JSON"),
        ("geneval", "[1]\n", r"row 1: \[1\] is not an object"),
        ("geneval", "", "holds no prompts"),
        ("geneval", '{"tag": "a", "include": 3, "prompt": "x"}\n', "'include' is no list"),
        ("geneval", '{"tag": "a", "include": [], "prompt": ""}\n', "'prompt' is ''"),
        ("corebench", '{"ID": "../x", "Prompt": "x"}\n', "cannot be a file name"),
        ("corebench", '{"ID": "C-1", "Prompt": "x"}\n', "expected one such as C-MI-001"),
    ],
)
def test_bad_lines(name: str, content: str, message: str, tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(DeepGenError, match=message):
        open_benchmark(name).read(Reading(path, "m"))


def test_pictures_stay_in_their_folder(tmp_path: Path):
    path = data.dump(tmp_path / "a/singleturn.json", {"1": {"id": "../x.jpg", "prompt": "p", "edit_type": "add"}})
    with pytest.raises(DeepGenError, match=r"row 1: the picture '../x.jpg' leaves its folder"):
        open_benchmark("imgedit").read(Reading(path, "m"))
    path = data.dump(tmp_path / "a/singleturn.json", {"1": {"id": "x.jpg", "prompt": "p", "edit_type": "add"}})
    with pytest.raises(DeepGenError, match=r"x.jpg does not exist; give its folder with --images"):
        open_benchmark("imgedit").read(Reading(path, "m"))
    data.picture(tmp_path / "pictures/x.jpg", 0)
    (item,) = open_benchmark("imgedit").read(Reading(path, "m", images=tmp_path / "pictures"))
    assert item.sources == (str(tmp_path / "pictures/x.jpg"),)


def test_dpg_grids_hold_the_images_in_order(tmp_path: Path, pipe: FakePipeline):
    out = make("dpg", tmp_path)
    sheet = np.asarray(Image.open(out / "0.png"))
    assert sheet.shape == (128, 128, 3)
    for k, (top, left) in enumerate(((0, 0), (0, 64), (64, 0), (64, 64))):
        part = np.asarray(Image.open(out / RECORDS / f"parts/0_{k}.png"))
        np.testing.assert_array_equal(sheet[top : top + 64, left : left + 64], part)


def test_gedit_sources_are_kept_as_they_are(tmp_path: Path, pipe: FakePipeline):
    out = make("gedit", tmp_path)
    assert Image.open(out / "fullset/subject-add/en/k2_SRCIMG.png").size == (70, 52)
    assert Image.open(out / "fullset/subject-add/en/k2.png").size == (64, 64)


def test_geneval_rows_are_passed_on(tmp_path: Path, pipe: FakePipeline):
    out = make("geneval", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "data/evaluation_metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        # The scorer reads the file with json.load: one object.
        assert json.loads((out / f"{i:05d}/metadata.jsonl").read_text()) == row


def test_official_readers_find_the_trees(tmp_path: Path, pipe: FakePipeline):
    """Reimplements how each official scorer finds its files."""
    outs = {}
    for name in ("geneval", "dpg", "unigenbench", "corebench", "imgedit"):
        (tmp_path / name).mkdir()
        outs[name] = make(name, tmp_path / name)
    # GenEval: folders whose names are digits, a JSON object in each, pictures named by digits.
    found = [path for path in outs["geneval"].iterdir() if path.is_dir() and path.name.isdigit()]
    assert len(found) == 3
    for folder in found:
        row = json.loads((folder / "metadata.jsonl").read_text())
        assert {"tag", "include", "prompt"} <= row.keys()
        assert all(re.match(r"\d+\.png", path.name) for path in (folder / "samples").iterdir())
    # DPG-Bench: every file of the folder is a picture, named by its prompt up to the first dot, of four quarters.
    names = [path for path in outs["dpg"].iterdir() if path.is_file()]
    assert {path.name.split(".")[0] for path in names} == {"0", "midjourney17", "whoops31"}
    assert all(Image.open(path).size == (128, 128) for path in names)
    # UniGenBench: four pictures of each row.
    for index in (0, 1, 7):
        assert all((outs["unigenbench"] / f"en/{data.MODEL}/{index}_{k}.png").exists() for k in range(4))
    # T2I-CoReBench: every picture of a dimension goes by the first three parts of its name.
    for folder in (outs["corebench"] / data.MODEL).iterdir():
        rows = json.loads((tmp_path / f"corebench/data/{folder.name}.json").read_text())
        assert all("-".join(path.name.split("-")[:3]) in rows for path in folder.iterdir())
    # ImgEdit: a picture for every key.
    keys = json.loads((tmp_path / "imgedit/data/singleturn.json").read_text())
    assert all((outs["imgedit"] / f"{key}.png").is_file() for key in keys)


def test_limits(tmp_path: Path, pipe: FakePipeline):
    out = make("geneval", tmp_path, "--limit", "2", "--num-images", "1")
    pngs = {file for file in tree(out) if file.endswith(".png")}
    assert pngs == {"00000/samples/0000.png", "00001/samples/0000.png"}
    shutil.rmtree(out)
    out = make("geneval", tmp_path, "--limit", "1", "--spread")
    assert len(tree(out)) == 5
    items = list(range(10))
    assert chosen(items, 3) == [0, 1, 2]  # type: ignore[type-var]
    assert chosen(items, 3, spread=True) == [0, 3, 6]  # type: ignore[type-var]
    assert chosen(items, 20, spread=True) == items  # type: ignore[type-var]


def test_each_seed_affects_only_its_image():
    seeds = {image_seed(seed, f"{i:05d}/samples/0000.png") for seed in range(3) for i in range(500)}
    assert len(seeds) == 1500
    assert image_seed(0, "a.png") == image_seed(0, "a.png")


def test_another_benchmark_in_the_folder_is_refused(tmp_path: Path, pipe: FakePipeline, capsys: pytest.CaptureFixture):
    out = make("geneval", tmp_path)
    words = ["eval", "wise", "model", "--data", str(data.wise(tmp_path)), "--out", str(out)]
    assert main(words) == 2
    assert "holds images of geneval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["genevl"], "did you mean geneval"),
        (["dpg", "model"], "give the inputs of DPG-Bench with --data"),
        (["dpg", "model", "--data", "nowhere"], "--data nowhere does not exist"),
        (["dpg", "model", "--data", ".", "--limit", "0"], "--limit is 0"),
        (["dpg", "model", "--data", ".", "--num-images", "5"], "takes at most 4"),
        (["unigenbench", "model", "--data", ".", "--split", "fr"], "has no such part; known: en, en_long, zh, zh_long"),
        (["score", "nowhere"], "nowhere holds no benchmark run"),
    ],
)
def test_bad_words(words: list[str], message: str, pipe: FakePipeline, capsys: pytest.CaptureFixture):
    assert main(["eval", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len([line for line in error.splitlines() if not line.startswith("deepgen: note")]) == 1


def test_list_and_help(capsys: pytest.CaptureFixture):
    assert main(["eval", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}: " in listed for name in BENCHMARKS.names())
    assert main(["eval", "--help"]) == 0
    assert "BENCHMARK" in capsys.readouterr().out
    assert main(["eval", "geneval", "--help"]) == 0
    assert "--limit" in capsys.readouterr().out


PLUGIN = """
from deepgen_jax.evaluation.benchmark import Benchmark, Item
from deepgen_jax.evaluation.figures import Measure
from deepgen_jax.evaluation.rows import read_rows


class Eleventh(Benchmark):
    title, protocol, inputs = "Eleventh", "eleventh/1", "a .jsonl with the column text"

    def read(self, reading):
        rows = read_rows(reading.data)
        return [Item(f"{r.number}", r.text("text"), (f"{r.number}.png",), str(r.file), r.number) for r in rows]

    def measures(self, groups):
        return [Measure("overall", {"all": 1.0})]
"""


def test_an_eleventh_benchmark_is_one_file(tmp_path: Path, pipe: FakePipeline, capsys: pytest.CaptureFixture):
    (tmp_path / "eleventh.py").write_text(PLUGIN)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    words = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    words = [str(tmp_path / "model"), *words, "--size", "64"]
    assert main(["eval", f"{tmp_path}/eleventh.py:Eleventh", *words]) == 0
    assert tree(tmp_path / "out") == {"1.png", "2.png"}
    assert main(["eval", f"{tmp_path}/eleventh.py:Eleventh"]) == 2
    assert "give the inputs of Eleventh with --data: a .jsonl" in capsys.readouterr().err
    assert main(["eval", "score", str(tmp_path / "out")]) == 2
    assert "Eleventh is scored by a judge: give its server" in capsys.readouterr().err


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"dpg", "gedit"}))
@given(value=JSON_VALUES, pick=st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_any_value_is_read_or_named(name: str, value: object, pick, tmp_path_factory: pytest.TempPathFactory):
    """One value of a row replaced by anything: the row is read, or one line names its place."""
    folder = tmp_path_factory.mktemp(name)
    given_data = data.WRITERS[name](folder)
    path = pick.choice([path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".jsonl", ".csv")])
    if path.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
        rows[pick.randrange(1, len(rows))][pick.randrange(3)] = str(value).replace("\0", "")
        buffer = io.StringIO()
        csv.writer(buffer).writerows(rows)
        path.write_text(buffer.getvalue(), encoding="utf-8", errors="replace")
    else:
        lines = path.suffix == ".jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if lines else json.loads(path.read_text())
        row = rows
        while isinstance(row, (list, dict)) and row and not (isinstance(row, dict) and _is_row(row)):
            row = pick.choice(list(row.values()) if isinstance(row, dict) else row)
        assert isinstance(row, dict)
        row[pick.choice(sorted(row))] = value
        path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    benchmark = open_benchmark(name)
    message = str(folder)
    try:
        items = benchmark.read(Reading(given_data, "m"))
        if benchmark.scorer == "judge":
            for item in items:
                benchmark.questions(item, 0, folder)
    except DeepGenError as error:
        message = str(error)
    assert "\n" not in message
    assert str(folder) in message


def _is_row(values: dict) -> bool:
    return any(name.lower() in ("prompt", "instruction", "tag") for name in values)
