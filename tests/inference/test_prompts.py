"""Prompt files: every format, every kind of bad line."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.batch import Request, Settings
from deepgen_jax.inference.outputs import Model, describe
from deepgen_jax.inference.prompts import FIELDS, Record, parse_record, parse_size, read_prompts
from deepgen_jax.rl.prompt_files import read_prompt_list
from deepgen_jax.user_warnings import DeepGenWarning


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text(tmp_path: Path):
    path = write(tmp_path, "p.txt", 'a cat\n\n  \n  a dog, "big" \r\n日本語 line\u2028same prompt\n')
    records, bad = read_prompts(path)
    assert [(r.index, r.line, r.prompt) for r in records] == [
        (0, 1, "a cat"), (1, 4, 'a dog, "big"'), (2, 5, "日本語 line\u2028same prompt")]  # fmt: skip
    assert records[0] == Record(0, 1, "a cat")
    assert not bad


def test_byte_order_mark(tmp_path: Path):
    for name, content in (("p.txt", "a cat"), ("p.jsonl", '{"prompt": "a cat"}'), ("p.csv", "prompt\na cat")):
        records, bad = read_prompts(write(tmp_path, name, b"\xef\xbb\xbf" + content.encode()))
        assert [r.prompt for r in records] == ["a cat"]
        assert not bad


def test_json_lines(tmp_path: Path):
    lines = [
        {"prompt": "a", "negative_prompt": "", "image": "in/a.png", "seed": 4294967295, "size": "512x768", "id": 7},
        {"prompt": "b", "images": ["a.png", "/abs/b.png"], "size": [64, 96], "name": "two.png", "num_images": 2},
        {"prompt": "c", "width": 32, "height": 64, "steps": 5, "guidance": 1, "seed": None, "size": None},
        {"prompt": "d", "size": 96, "guidance": 7.5},
    ]
    path = write(tmp_path, "p.jsonl", "\n\n".join(map(json.dumps, lines)))
    records, bad = read_prompts(path)
    assert not bad
    assert records == [
        Record(0, 1, "a", "", (tmp_path / "in/a.png",), 4294967295, 512, 768, "7"),
        Record(1, 3, "b", None, (tmp_path / "a.png", Path("/abs/b.png")), None, 64, 96, "two", 2),
        Record(2, 5, "c", None, (), None, 32, 64, None, None, 5, 1.0),
        Record(3, 7, "d", None, (), None, 96, 96, None, None, None, 7.5),
    ]


BAD_LINES = [
    ("{", "not JSON (Expecting property name"),
    ('{"prompt": "a"} x', "not JSON (Extra data"),
    ("[" * 100_000, "not JSON"),
    ('"a cat"', '"a cat" is not an object'),
    ("null", "null is not an object"),
    ("{}", "no prompt"),
    ('{"promt": "a"}', "unknown field 'promt'; did you mean 'prompt'?"),
    ('{"prompt": "a", "seeds": 1}', "unknown field 'seeds'; did you mean 'seed'?"),
    (r'{"prompt": "a", "note": "\ud83d"}', "the other fields must be JSON values"),
    (r'{"prompt": "a\u0000b"}', "holds a NUL character; remove it"),
    ('{"prompt": "a", "num_images": 10000000}', "'num_images' is 10000000, expected 1 to 100000"),
    ('{"prompt": ["a"]}', "'prompt' is [\"a\"], expected a text"),
    (r'{"prompt": "\ud83d alone"}', "'prompt' is \"\\ud83d alone\", expected a text"),
    ('{"prompt": "  "}', "the prompt is empty"),
    ('{"prompt": "a", "negative_prompt": 3}', "'negative_prompt' is 3"),
    ('{"prompt": "a", "seed": -1}', "'seed' is -1, expected 0 to 4294967295"),
    ('{"prompt": "a", "seed": 4294967296}', "expected 0 to 4294967295"),
    ('{"prompt": "a", "seed": 1.5}', "'seed' is 1.5, expected a whole number"),
    ('{"prompt": "a", "seed": true}', "'seed' is true"),
    ('{"prompt": "a", "steps": 0}', "'steps' is 0, expected 1 to 10000"),
    ('{"prompt": "a", "num_images": 0}', "'num_images' is 0"),
    ('{"prompt": "a", "guidance": NaN}', "'guidance' is nan"),
    ('{"prompt": "a", "guidance": "much"}', "'guidance' is \"much\", expected a number"),
    ('{"prompt": "a", "size": "big"}', "size 'big' is not understood"),
    ('{"prompt": "a", "size": "0x32"}', "not positive"),
    ('{"prompt": "a", "size": [1, 2, 3]}', "'size' is [1, 2, 3]"),
    ('{"prompt": "a", "size": [1, "x"]}', "'height' is \"x\""),
    ('{"prompt": "a", "width": 32}', "'width' and 'height' go together"),
    ('{"prompt": "a", "size": "32x32", "width": 32}', "'size' and 'width' are both given"),
    ('{"prompt": "a", "image": "x", "images": ["y"]}', "'image' and 'images' are both given"),
    ('{"prompt": "a", "images": [3]}', "expected a path or a list of paths"),
    ('{"prompt": "a", "image": ""}', "expected a path"),
    ('{"prompt": "a", "id": "a/b"}', "cannot be a file name"),
    ('{"prompt": "a", "id": "..", "seed": 1}', "cannot be a file name"),
    ('{"prompt": "a", "id": ""}', "cannot be a file name"),
    (r'{"prompt": "a", "id": "\ud83d"}', "cannot be a file name"),
    (r'{"prompt": "a", "id": "a\\b"}', "cannot be a file name"),
    ('{"prompt": "a", "id": [1]}', "'id' is [1]"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_named_and_the_others_go_on(tmp_path: Path, line: str, reason: str):
    path = write(tmp_path, "p.jsonl", f'{{"prompt": "first"}}\n\n{line}\n{{"prompt": "last"}}\n')
    records, bad = read_prompts(path)
    assert [(r.index, r.prompt) for r in records] == [(0, "first"), (2, "last")]
    assert len(bad) == 1
    assert str(bad[0]).startswith(f"{path}:3: ")
    assert reason in str(bad[0])
    assert "\n" not in str(bad[0])
    assert len(bad[0].reason) < 300


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_line_that_is_not_utf8(tmp_path: Path, name: str):
    good, accented = ('{"prompt": "a"}', '{"prompt": "é"}') if name == "p.jsonl" else ("a", "é")
    path = write(tmp_path, name, good.encode() + b"\n" + accented.encode("latin-1") + b"\n" + accented.encode())
    records, bad = read_prompts(path)
    assert [r.prompt for r in records] == ["a", "é"]
    assert [b.line for b in bad] == [2]
    assert "0xe9" in bad[0].reason
    assert "save the file as UTF-8" in bad[0].reason


def test_csv(tmp_path: Path):
    path = write(
        tmp_path,
        "p.csv",
        "prompt,seed,images,size,negative_prompt,id\r\n"
        '"a cat, sitting",3,a.png;b.png,512x768,ugly,first\r\n'
        "\r\n"
        '"two\nlines",,,,,\r\n'
        ",1,,,,\r\n"
        "short,1\r\n"
        "word,seed,,,,\r\n"
        "last,,c.png,,,\r\n",
    )
    records, bad = read_prompts(path)
    assert records == [
        Record(0, 2, "a cat, sitting", "ugly", (tmp_path / "a.png", tmp_path / "b.png"), 3, 512, 768, "first"),
        Record(1, 4, "two\nlines"),
        Record(5, 9, "last", None, (tmp_path / "c.png",)),
    ]
    assert [(b.line, b.reason.split(";")[0]) for b in bad] == [
        (6, "the prompt is empty"),
        (7, "2 cells, but the header has 6"),
        (8, "'seed' is \"seed\", expected a whole number"),
    ]


def test_csv_with_an_open_quote(tmp_path: Path):
    records, bad = read_prompts(write(tmp_path, "p.csv", 'prompt,seed\na,1\n"b,2\nc,3\n'))
    assert [r.prompt for r in records] == ["a"]
    assert [(b.line, b.reason) for b in bad] == [(3, "not CSV (unexpected end of data); check the quotes")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "promt,seed\na,1\n", "p.csv:1: unknown field 'promt'; did you mean 'prompt'?"),
        ("p.csv", "seed\n1\n", "no column 'prompt'"),
        ("p.csv", "prompt,prompt\na,b\n", "names a column twice"),
        ("p.csv", b"prompt\na\n\xe9\n", "p.csv:3: byte 0xe9 is not UTF-8"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.csv", "", "holds no prompts"),
        ("p.csv", "prompt\n", "holds no prompts"),
        ("p.txt", "a cat".encode("utf-16"), "is not UTF-8 text"),
        ("p.txt", "a cat".encode("utf-16-le"), "is not UTF-8 text"),
        ("p.json", "[]", "holds no prompts"),
        ("p.json", '{"a": 1', "is not JSON (line 1"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', "if it has one object a line, name it .jsonl"),
        ("p.json", "3", "holds 3, expected a list of objects or texts"),
        ("p.yaml", "a: b", "suffix '.yaml'; use one of .txt, .jsonl, .json, .csv, .parquet"),
        ("p.parquet", "PAR", "cannot be read"),
    ],
)
def test_files_that_are_bad_as_a_whole(tmp_path: Path, name: str, content: str | bytes, message: str):
    with pytest.raises(DeepGenError) as caught:
        read_prompts(write(tmp_path, name, content))
    assert message in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(DeepGenError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DeepGenError, match="cannot be read"):
        read_prompts(tmp_path / "folder.txt")


@pytest.mark.parametrize(
    ("text", "size"), [("512x768", (512, 768)), ("512", (512, 512)), (" 64 X 32 ", (64, 32)), ("64×32", (64, 32))]
)
def test_sizes(text: str, size: tuple[int, int]):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "512x", "-5x5", "5.5x5", "1x2x3", "9999999x1"])
def test_bad_sizes(text: str):
    with pytest.raises(DeepGenError, match="WIDTHxHEIGHT"):
        parse_size(text)


SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_every_format_reads_alike(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": "a cat", "seed": 3, "tag": "x"}, {"prompt": "b", "seed": 4, "tag": "y"}]
    wanted = [Record(0, 0, "a cat", seed=3), Record(1, 0, "b", seed=4)]
    (tmp_path / "p.csv").write_text("prompt,seed,tag\ra cat,3,x\rb,4,y")  # line ends of old Macs
    (tmp_path / "p.jsonl").write_bytes(b"\r\n".join(json.dumps(row).encode() for row in rows))
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "q.json").write_text(json.dumps({"one": rows[0], "two": rows[1]}))
    table = pyarrow.table({name: [row[name] for row in rows] for name in rows[0]} | {"image_bytes": [b"\xff", b"a"]})
    parquet.write_table(table, tmp_path / "p.parquet")
    for name in ("p.csv", "p.jsonl", "p.json", "q.json", "p.parquet"):
        with pytest.warns(DeepGenWarning, match=r"fields tag are no settings; they are passed on"):
            records, bad = read_prompts(tmp_path / name)
        assert not bad
        keys = ("one", "two") if name == "q.json" else (None, None)
        assert records == [
            dataclasses.replace(record, line=read.line, name=key)
            for record, read, key in zip(wanted, records, keys, strict=True)
        ]
        assert [dict(record.metadata) for record in records] == [{"tag": "x"}, {"tag": "y"}]
        assert [prompt.text for prompt in read_prompt_list(tmp_path / name)] == ["a cat", "b"]


def test_lines_end_alike_everywhere(tmp_path: Path):
    for end in ("\n", "\r\n", "\r"):
        write(tmp_path, "p.txt", f"a{end}{end}b\u2028c{end}".encode())
        write(tmp_path, "p.jsonl", f'{{"prompt": "a"}}{end}{end}{{"prompt": "b\u2028c"}}'.encode())
        for name in ("p.txt", "p.jsonl"):
            records, _ = read_prompts(tmp_path / name)
            assert [(record.line, record.prompt) for record in records] == [(1, "a"), (3, "b\u2028c")]
            assert [prompt.text for prompt in read_prompt_list(tmp_path / name)] == ["a", "b\u2028c"]


def test_a_folder_of_text_files(tmp_path: Path):
    for name, content in (("10", b"ten"), ("2", "zw\u00f6lf\nlines".encode()), ("bad", b"\xff"), ("empty", b"\n")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "._2.txt").write_text("no prompt")
    (tmp_path / "notes.md").write_text("no prompt")
    records, bad = read_prompts(tmp_path)
    assert [(record.prompt, record.name) for record in records] == [("ten", "10"), ("zw\u00f6lf\nlines", "2")]
    assert [str(line).split(": ")[0] for line in bad] == [f"{tmp_path / name}.txt:1" for name in ("bad", "empty")]


@pytest.mark.parametrize(
    ("path", "count", "names"),
    [
        ("benchmarks/geneval/evaluation_metadata.jsonl", 553, None),
        ("benchmarks/dpg/prompts", 1065, {"132", "partiprompts94"}),
        ("benchmarks/unigenbench/test_prompts_en.csv", 600, None),
        ("benchmarks/unigenbench/test_prompts_zh_long.csv", 600, None),
        ("benchmarks/t2i_corebench/R-LR.json", 90, {"R-LR-001"}),
        ("eval_prompts/prompts_dpgbench.jsonl", 1065, {"1"}),
        ("eval_prompts/geneval_prompt.txt", 553, None),
        ("eval_prompts/unigenbench/test_prompts_zh.csv", 600, None),
        ("rl_prompts/corebench.txt", 12, None),
    ],
)
def test_public_files(path: str, count: int, names: set[str] | None):
    if not (SHARED / path).exists():
        pytest.skip("the public files are not here")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        records, bad = read_prompts(SHARED / path)
    assert not bad
    assert len(said) <= 1
    assert len(records) >= count
    assert names is None or names <= {record.name for record in records}
    prompts = read_prompt_list(SHARED / path)
    assert [prompt.text for prompt in prompts] == [record.prompt.strip() for record in records]


def test_wise_and_a_row_that_lacks_its_prompt(tmp_path: Path):
    rows = [
        {"Prompt": "a festival", "prompt_id": 1, "Category": "culture", "Explanation": "lanterns"},
        {"prompt_id": 2, "Category": "time"},
    ]
    path = write(tmp_path, "culture.json", json.dumps(rows))
    with pytest.warns(DeepGenWarning):
        records, bad = read_prompts(path)
    assert [(record.prompt, record.name) for record in records] == [("a festival", "1")]
    assert records[0].metadata["Explanation"] == "lanterns"
    assert list(map(str, bad)) == [f"{path}:2: there is no prompt; add the field 'prompt'"]
    with pytest.warns(DeepGenWarning, match=r"1 of 2 rows cannot be used .*culture.json:2: there is no prompt"):
        assert [prompt.text for prompt in read_prompt_list(path)] == ["a festival"]


def test_metadata_of_an_earlier_run_asks_for_the_same_images(tmp_path: Path):
    request = Request(
        "7.png", "the prompt", "a cat", "ugly", 5, 64, 96, 9, 1.5, "heun", (tmp_path / "ref.png",), metadata={"tag": 1}
    )
    (tmp_path / "ref.png").write_bytes(b"x")
    line = describe(request, Settings(), Model(Path("m"), "float32", "f"))
    path = write(tmp_path, "metadata.jsonl", json.dumps(line) + "\n")
    with pytest.warns(DeepGenWarning, match="fields tag are"):
        (record,), bad = read_prompts(path)
    assert not bad
    assert record == Record(
        0, 1, "a cat", "ugly", (tmp_path / "ref.png",), 5, 64, 96, "7", None, 9, 1.5, "heun"
    )  # fmt: skip
    assert record.metadata == {"tag": 1}


SLIPS = st.sampled_from([name for name in FIELDS if len(name) >= 5 and name not in ("image", "images")])


@given(name=SLIPS, at=st.integers(0, 20), letter=st.sampled_from("xqz"), kind=st.sampled_from(["drop", "add", "swap"]))
def test_one_slip_in_a_name_is_refused(name: str, at: int, letter: str, kind: str):
    at %= len(name) - 1
    wrong = {
        "drop": name[:at] + name[at + 1 :],
        "add": name[:at] + letter + name[at:],
        "swap": name[:at] + name[at + 1] + name[at] + name[at + 2 :],
    }[kind]
    if wrong in FIELDS:
        return
    with pytest.raises(DeepGenError, match=f"unknown field {wrong!r}; did you mean"):
        parse_record({"prompt": "a", wrong: "b"}, 0, 1, Path())


@given(
    st.dictionaries(st.sampled_from(["tag", "include", "index", "sub_dims", "idx", "url", "Category"]), st.integers())
)
def test_other_fields_are_passed_on(fields: dict[str, int]):
    assert parse_record({"prompt": "a", **fields}, 0, 1, Path()).metadata == fields


@given(st.binary(max_size=60), st.sampled_from(["p.txt", "p.jsonl", "p.json", "p.csv", "p.parquet"]))
def test_any_bytes_are_records_or_one_clear_error(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (read_prompts, read_prompt_list):
            message = ""
            try:
                read(path)
            except DeepGenError as error:
                message = str(error)
            assert "\n" not in message
