"""Data that is broken or meant to break: one bad record counts, with its place, and never ends a run."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.make_data import (
    TOKENIZER,
    encoded,
    model,
    t2i_samples,
    tar_bytes,
    write_array_record,
    write_arrow,
    write_folder,
    write_json,
    write_parquet,
    write_tar,
)

from deepgen_jax.data.checks import SampleInfo, check_sample
from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.data.indexing import _rows, open_indices
from deepgen_jax.data.inspect import inspect
from deepgen_jax.data.prompt_encoder import PromptEncoder
from deepgen_jax.data.sources import BadSample, open_source
from deepgen_jax.errors import DeepGenError

PROMPTS = PromptEncoder(TOKENIZER, model())
MAX_PIXELS = 10**6


def check(kind: str, path: Path, **options: Any) -> list[SampleInfo | BadSample]:
    """Every sample as the index finds it; rows go through JSON."""
    source = open_source(SourceConfig("s", kind, str(path), **options))
    found: list[SampleInfo | BadSample] = []
    for file in source.files():
        for row in _rows(source, file.path):
            encoded_row = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
            try:
                found.append(check_sample(source, json.loads(encoded_row), PROMPTS, MAX_PIXELS))
            except BadSample as bad:
                found.append(bad)
    return found


def bad_at(found: list[SampleInfo | BadSample], place: int) -> BadSample:
    bad = found[place]
    assert isinstance(bad, BadSample)
    assert "\n" not in bad.detail
    bad.detail.encode()
    return bad


# Records of a list, and what is wrong with each; "{deep}" is put in afterwards.
RECORDS: dict[str, tuple[str, str]] = {
    "half of a pair": ('{"txt": "a \\ud83d b", "image_path": "0.img"}', "wrong text"),
    "half of a pair in a path": ('{"txt": "a", "image_path": "\\ud83d.img"}', "missing file"),
    "NUL in a path": ('{"txt": "a", "image_path": "a\\u0000b.img"}', "missing file"),
    "long name": ('{"txt": "a", "image_path": "' + "n" * 300 + '.img"}', "unreadable file"),
    "deep": ('{"txt": "a", "image_path": "0.img", "more": ' + "[" * 100_000 + "]" * 100_000 + "}", "wrong JSON"),
    "many digits": ('{"txt": "a", "image_path": "0.img", "more": ' + "1" * 5_000 + "}", "wrong JSON"),
    "no such kind of address": ('{"txt": "a", "image_path": "nosuch://x"}', "unreadable file"),
    "folder": ('{"txt": "a", "image_path": "."}', "unreadable file"),
    "device": ('{"txt": "a", "image_path": "/dev/zero"}', "unreadable file"),
    "empty": ('{"txt": " ", "image_path": "0.img"}', "empty caption"),
    "no text": ('{"txt": 7, "image_path": "0.img"}', "missing field"),
    "no captions": ('{"txt": [], "image_path": "0.img"}', "empty caption"),
    "list of paths": ('{"txt": "a", "image_path": ["0.img", "0.img"]}', "missing field"),
    "number": ('{"txt": "a", "image_path": 3}', "wrong JSON"),
    "no object": ("[[]]", "wrong JSON"),
}


@pytest.mark.parametrize("form", ["list.json", "list.jsonl"])
@pytest.mark.parametrize("name", RECORDS)
def test_one_bad_record_costs_no_other(tmp_path: Path, name: str, form: str):
    write_json(tmp_path, t2i_samples(3), "other.json")
    good = [json.dumps({"txt": f"picture {n}", "image_path": f"{n}.img"}) for n in range(3)]
    record, reason = RECORDS[name]
    lines = [*good[:2], record, good[2]]
    (tmp_path / form).write_text("\n".join(lines) if form.endswith("l") else f"[{', '.join(lines)}]")
    found = check("json", tmp_path / form)
    bad = bad_at(found, 2)
    assert bad.reason == reason
    assert bad.detail.startswith(f"{tmp_path / form}: {'line 3' if form.endswith('l') else 'item 2'}")
    assert all(isinstance(item, SampleInfo) for n, item in enumerate(found) if n != 2)
    assert len(found) == 4


@pytest.mark.parametrize("broken", [b'{"txt": "\xff", "image_path": "0.img"}', b'{"txt": tru}'])
def test_a_record_that_is_no_json(tmp_path: Path, broken: bytes):
    write_json(tmp_path, t2i_samples(2), "other.json")
    good = b'{"txt": "[a, \\"b\\"}", "image_path": "0.img"}'
    (tmp_path / "list.json").write_bytes(b"[" + b",\n".join([good, broken, good]) + b"]")
    found = check("json", tmp_path / "list.json")
    assert bad_at(found, 1).detail.startswith(f"{tmp_path}/list.json: item 1")
    assert [isinstance(item, SampleInfo) for item in found] == [True, False, True]


texts = st.text(max_size=8) | st.sampled_from(["0.img", "a\0", "../x"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["txt", "image_path", "x"]), inner),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore::deepgen_jax.user_warnings.DeepGenWarning")
@given(items=st.lists(json_values, max_size=4), junk=st.binary(max_size=5), at=st.integers(0, 400))
def test_any_list_is_counted(tmp_path_factory: pytest.TempPathFactory, items: list[Any], junk: bytes, at: int):
    folder = tmp_path_factory.mktemp("lists")
    (folder / "0.img").write_bytes(encoded(96, 96))
    data = json.dumps([{"txt": "a", "image_path": "0.img"}, *items]).encode()
    (folder / "list.json").write_bytes(data[:at] + junk + data[at:])
    for kind in ("json", "captions"):
        for item in check(kind, folder / "list.json"):
            if isinstance(item, BadSample):
                assert item.detail.startswith(f"{folder}/list.json")


def test_the_message_keeps_the_place_however_long_the_detail(tmp_path: Path):
    write_json(tmp_path, t2i_samples(1), "other.json")
    text = "word\n" * 10_000 + "<|image_pad|>"
    (tmp_path / "list.json").write_text(json.dumps([{"txt": text, "image_path": "0.img"}]))
    (bad,) = check("json", tmp_path / "list.json")
    assert isinstance(bad, BadSample)
    assert bad.detail.startswith(f"{tmp_path}/list.json: item 0: word")
    assert len(bad.detail) < 1000
    source = SourceConfig("s", "json", str(tmp_path / "list.json"))
    config = DataConfig((source,), 1, MixtureConfig(("t2i",)), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DeepGenError, match=r"1 of 1 samples are bad \(1 reserved token in text; such as .*: item 0: "):
        open_indices(config, PROMPTS)


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "array_record", "arrow"])
def test_bad_images_name_their_row(tmp_path: Path, kind: str):
    write = {
        "webdataset": write_tar,
        "parquet": write_parquet,
        "array_record": write_array_record,
        "arrow": write_arrow,
    }
    samples = t2i_samples(6)
    samples[4] = samples[4]._replace(image=samples[4].image[:-400])
    path = write[kind](tmp_path / "data", samples)
    found = check(kind, tmp_path / "data")
    place = {
        "webdataset": "member set/00004",
        "parquet": "row group 1, row 0",
        "array_record": "record 4",
        "arrow": "row 4",
    }
    file = path if path.is_file() else path / "data-00000-of-00001.arrow"
    assert bad_at(found, 4).detail.startswith(f"{file}: {place[kind]}: ")
    assert sum(isinstance(item, BadSample) for item in found) == 1


def test_captions_in_an_image_folder(tmp_path: Path):
    write_folder(tmp_path, t2i_samples(4))
    (tmp_path / "001.txt").write_text("  \n")
    (tmp_path / "002.txt").write_text("one\ntwo\n")
    found = check("image_folder", tmp_path)
    bad = bad_at(found, 1)
    assert (bad.reason, bad.detail) == ("empty caption", f"{tmp_path}/001.jpg")
    assert [item.notes for item in found if isinstance(item, SampleInfo)] == [
        (), ("caption of several lines, read as one",), ()
    ]  # fmt: skip
    assert found[2].length == PROMPTS.length("one\ntwo", None)


def test_notes_and_reasons_are_reported(tmp_path: Path):
    folder = tmp_path / "data"
    write_json(folder, t2i_samples(20), "other.json")
    items = [{"txt": f"picture {n}", "image_path": f"{n}.img"} for n in range(20)]
    items[3]["txt"], items[5]["txt"] = ["first", "second"], ""
    (folder / "other.json").write_text(json.dumps(items))
    (folder / "._other.json").write_bytes(b"\0\5\x16\7")
    source = SourceConfig("s", "json", str(folder))
    config = DataConfig(
        (source,), 2, MixtureConfig(("t2i",)), image_size=64, cache_dir=str(tmp_path / "cache"), max_bad_share=0.1
    )
    with pytest.warns(UserWarning, match="source s: passed over in its folders: 1 hidden name"):
        report = inspect(config, model(), TOKENIZER, seconds=0)
    (found,) = report.sources
    assert (found.bad, found.usable) == ({"empty caption": 1}, 19)
    assert found.notes == {"several captions, the first is read": 1}
    assert found.passed_over == {"hidden name": 1}
    text = "\n".join(report.lines())
    assert "note: 1 several captions" in text
    assert "passed over: 1 hidden name" in text


def members(names: list[str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in names:
            data = b"a text" if name.endswith("txt") else encoded(96, 96)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def test_member_names(tmp_path: Path):
    names = "a.jpg a.txt photo.v2.jpg photo.v2.txt b.txt b.jpg c.jpg ._d.jpg e.jpg e.jpg e.txt"
    (tmp_path / "x.tar").write_bytes(members(names.split()))
    found = check("webdataset", tmp_path)
    assert [item.reason if isinstance(item, BadSample) else "" for item in found] == [
        "", "dots in member name", "", "missing field", "member twice"
    ]  # fmt: skip
    assert "x.tar: member photo: " in bad_at(found, 1).detail
    assert "photo.v2.jpg" in bad_at(found, 1).detail


@pytest.mark.parametrize("size", [-1, -512, -(10**12), 10**12, 2**62, 8 * 10**5])
def test_tar_members_with_bad_sizes(tmp_path: Path, size: int):
    data = bytearray(tar_bytes(t2i_samples(4)))
    header = next(n for n in range(0, len(data), 512) if data[n:].startswith(b"set/00002.jpg"))
    # Base 256, as of members of more than 8 GB.
    data[header + 124 : header + 136] = (size % 256**12).to_bytes(12, "big")
    data[header + 124] = 0x80 if size >= 0 else 0xFF
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    (tmp_path / "x.tar").write_bytes(data)
    found = check("webdataset", tmp_path)
    assert [isinstance(item, SampleInfo) for item in found] == [True, True, False]
    assert bad_at(found, 2).reason == "damaged tar"
    assert bad_at(found, 2).detail.startswith(f"{tmp_path}/x.tar: ")


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"S"])
@pytest.mark.parametrize("size", [-512, 2**40, 10**6])
def test_tar_headers_with_bad_sizes(tmp_path: Path, kind: bytes, size: int):
    header = bytearray(tarfile.TarInfo("long").tobuf())
    header[156:157] = kind
    header[124:136] = (size % 256**12).to_bytes(12, "big")
    header[124] = 0x80 if size >= 0 else 0xFF
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(tar_bytes(t2i_samples(2))[:-10240] + bytes(header) + bytes(1024))
    found = check("webdataset", tmp_path)
    assert all(isinstance(item, SampleInfo) or item.reason == "damaged tar" for item in found)


@given(data=st.data())
def test_any_damage_to_a_tar_is_counted(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("tars")
    whole = bytearray(tar_bytes(t2i_samples(3, ((96, 96),))))
    headers = [n for n in range(0, len(whole), 512) if whole[n : n + 4] == b"set/"]
    for place in data.draw(st.lists(st.sampled_from(headers), max_size=2)):
        for offset in data.draw(st.lists(st.integers(0, 511), max_size=4)):
            whole[place + offset] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            whole[place + 148 : place + 156] = b" " * 8
            whole[place + 148 : place + 156] = b"%06o\0 " % sum(whole[place : place + 512])
    (folder / "x.tar").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    for item in check("webdataset", folder):
        if isinstance(item, BadSample):
            assert item.detail.startswith(f"{folder}/x.tar")


@given(data=st.data(), kind=st.sampled_from(["parquet", "arrow", "arrow file"]))
def test_any_damage_to_an_arrow_file_is_counted(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("arrow")
    form = data.draw(st.sampled_from(["path", "bytes"]))
    images = ["0.img", "1.img"] if form == "path" else [encoded(96, 96), encoded(96, 96)]
    table = pa.table({"caption": ["a", "b"], "image": images})
    path = folder / f"x.{kind.partition(' ')[0]}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with (pa.ipc.new_file if "file" in kind else pa.ipc.new_stream)(str(path), table.schema) as writer:
            writer.write_table(table)
    whole = bytearray(path.read_bytes())
    places = st.integers(0, len(whole) - 1) | st.integers(len(whole) - 300, len(whole) - 1).map(lambda n: max(n, 0))
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    try:
        found = check(kind.partition(" ")[0], folder)
    except DeepGenError:
        return  # Its columns are other ones.
    for item in found:
        if isinstance(item, BadSample):
            assert item.detail.startswith(str(path))


def test_long_and_odd_source_names():
    for name in ("n" * 101, "a\0b", "a\nb", "\ud83d"):
        with pytest.raises(DeepGenError, match="source name"):
            SourceConfig(name, "json", "x")
    assert SourceConfig("n" * 100, "json", "x").name


def test_pipes_in_the_place_of_images(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.img")
    (tmp_path / "list.json").write_text('[{"txt": "a", "image_path": "pipe.img"}]')
    (bad,) = check("json", tmp_path / "list.json")
    assert isinstance(bad, BadSample)
    assert bad.reason == "unreadable file"
    assert "is a pipe" in bad.detail


def test_text_of_a_record_that_is_not_utf8(tmp_path: Path):
    from array_record.python.array_record_module import ArrayRecordWriter

    from deepgen_jax.data.sources.tf_example import write_example

    writer = ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1")
    for text in (b"good", b"\xff\xfe", b""):
        writer.write(write_example({"text": [text], "image": [encoded(96, 96)], "n": np.array([1])}))
    writer.close()
    found = check("array_record", tmp_path)
    assert [getattr(item, "reason", "") for item in found] == ["", "wrong text", "empty caption"]
    assert bad_at(found, 1).detail.startswith(f"{tmp_path}/x.array_record: record 1: ")
