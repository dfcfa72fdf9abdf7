"""Prompt files: every format, every way in which a line can be bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.prompts import Record, parse_size, read_prompts


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text(tmp_path: Path):
    path = write(tmp_path, "p.txt", "a cat\n\n  \n  a dog, \"big\" \r\n日本語 line\u2028same prompt\n")
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
    ('{"prompt": "a", "zzz": 1}', "unknown field 'zzz'; known fields: prompt,"),
    ('{"prompt": ["a"]}', "'prompt' is [\"a\"], expected a text"),
    (r'{"prompt": "\ud83d alone"}', "'prompt' is \"\\ud83d alone\", expected a text"),
    ('{"prompt": "  "}', "the prompt is empty"),
    ('{"prompt": "a", "negative_prompt": 3}', "'negative_prompt' is 3"),
    ('{"prompt": "a", "seed": -1}', "'seed' is -1, expected 0 to 4294967295"),
    ('{"prompt": "a", "seed": 4294967296}', "expected 0 to 4294967295"),
    ('{"prompt": "a", "seed": 1.5}', "'seed' is 1.5, expected a whole number"),
    ('{"prompt": "a", "seed": true}', "'seed' is true"),
    ('{"prompt": "a", "steps": 0}', "'steps' is 0, expected 1 or more"),
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
        ("p.json", "[]", "suffix '.json'; use one of .txt, .jsonl, .csv"),
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
