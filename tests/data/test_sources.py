"""Every format gives the texts and encoded images that were written."""

from __future__ import annotations

import contextlib
import gzip
import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.make_data import (
    Sample,
    as_example,
    edit_samples,
    t2i_samples,
    tar_bytes,
    write_array_record,
    write_arrow,
    write_captions,
    write_folder,
    write_json,
    write_parquet,
    write_tar,
)

from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.file_listing import list_files
from deepgen_jax.data.sources import BadSample, open_source, read_row
from deepgen_jax.data.sources.tf_example import parse_example, write_example
from deepgen_jax.data.storage import Blob, open_blob
from deepgen_jax.errors import DeepGenError
from deepgen_jax.user_warnings import DeepGenWarning

T2I, EDIT = t2i_samples(6), edit_samples(6, references=(1, 2))


def contents(config: SourceConfig) -> list[Sample | str]:
    """All samples, or the reasons of bad ones; rows go through JSON and the source through pickling, as in a run."""
    source = pickle.loads(pickle.dumps(open_source(config)))
    found: list[Sample | str] = []
    for file in source.files():
        for row in source.scan(file.path):
            try:
                record = read_row(source, json.loads(json.dumps(row)))
                images = []
                for image in record.images:
                    with open_blob(image) as opened:
                        images.append(opened.read())
                found.append(Sample(record.text, images[0], tuple(images[1:])))
            except BadSample as bad:
                found.append(bad.reason)
    return found


def config(kind: str, path: Path | str, task: str = "t2i", **options) -> SourceConfig:
    return SourceConfig("s", kind, str(path), task, **options)


WRITERS = {
    "json": ("json", write_json),
    "jsonl": ("json", lambda folder, samples: write_json(folder, samples, "list.jsonl")),
    "tar": ("webdataset", write_tar),
    "tar with json": ("webdataset", lambda folder, samples: write_tar(folder, samples, as_json=True)),
    "parquet bytes": ("parquet", write_parquet),
    "parquet struct": ("parquet", lambda folder, samples: write_parquet(folder, samples, "struct")),
    "parquet path": ("parquet", lambda folder, samples: write_parquet(folder, samples, "path")),
    "array_record": ("array_record", write_array_record),
}


@pytest.mark.parametrize("form", WRITERS)
def test_both_tasks(tmp_path: Path, form: str):
    kind, write = WRITERS[form]
    write(tmp_path / "t2i", T2I)
    write(tmp_path / "edit", EDIT)
    assert contents(config(kind, tmp_path / "t2i")) == T2I
    assert contents(config(kind, tmp_path / "edit", "edit")) == EDIT


def test_caption_set(tmp_path: Path):
    path = write_captions(tmp_path, T2I)
    assert contents(config("captions", path, root=str(tmp_path))) == T2I
    (tmp_path / "1.json").write_text("{broken")
    (tmp_path / "2.json").unlink()
    (tmp_path / "3.json").write_text("[]")
    found = contents(config("captions", path, root=str(tmp_path)))
    assert found[:5] == [T2I[0], "wrong JSON", "missing file", "missing field", T2I[4]]


def test_folder_of_images(tmp_path: Path):
    path = write_folder(tmp_path / "deep" / "er", T2I)
    (path / "001.txt").unlink()
    (path / "002.txt").write_bytes(b"\xff\xfe")
    found = contents(config("image_folder", tmp_path))
    assert [item if isinstance(item, str) else item.text for item in found] == [
        T2I[0].text.strip(), "missing file", "wrong text", *(sample.text.strip() for sample in T2I[3:])
    ]  # fmt: skip
    with pytest.raises(DeepGenError, match="json source"):
        open_source(config("image_folder", tmp_path, "edit"))


def test_bad_items_of_a_json_list(tmp_path: Path):
    path = write_json(tmp_path / "a", T2I)
    items = json.loads(path.read_text())
    items[1] = "no object"
    del items[2]["txt"]
    items[3]["image_path"] = ""
    items[4]["image_path"] = "missing.img"
    path.write_text(json.dumps(items))
    (path.parent / "b.json").write_text("[{]")
    with pytest.warns(DeepGenWarning, match="b.json is left out"):
        rows = list(open_source(config("json", path.parent)).scan(str(path.parent / "b.json")))
    assert rows[0]["bad"][0] == "wrong JSON"
    (path.parent / "b.json").unlink()
    source = open_source(config("json", path))
    reasons = []
    for row in source.scan(str(path)):
        try:
            open_blob(read_row(source, row).images[0]).close()
            reasons.append("")
        except BadSample as bad:
            reasons.append(bad.reason)
        except FileNotFoundError:
            reasons.append("gone")
    assert reasons == ["", "wrong JSON", "missing field", "missing field", "gone", ""]


def test_renamed_fields_and_unknown_ones(tmp_path: Path):
    write_parquet(tmp_path, T2I)
    with pytest.raises(DeepGenError, match="did you mean caption"):
        contents(config("parquet", tmp_path, fields={"text": "captions"}))
    write_array_record(tmp_path / "a", T2I)
    with pytest.raises(DeepGenError, match="no column is called words"):
        contents(config("array_record", tmp_path / "a", fields={"text": "words"}))
    path = write_json(tmp_path / "j", T2I)
    path.write_text(path.read_text().replace('"txt"', '"long_caption"'))
    assert contents(config("json", path))[0] == "missing field"
    assert contents(config("json", path, fields={"text": "long_caption"})) == T2I


def test_damaged_tars(tmp_path: Path):
    data = tar_bytes(T2I)
    for size in range(len(data) // 3, len(data) - 10_000, 700):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        found = contents(config("webdataset", tmp_path))
        assert found[-1] == "damaged tar"
        good = [sample for sample in found if sample in T2I]
        assert good == T2I[: len(good)]
        assert 0 < len(good) < len(T2I)
    (tmp_path / "cut.tar").write_bytes(b"no tar at all" * 100)
    assert contents(config("webdataset", tmp_path)) == ["damaged tar"]
    (tmp_path / "cut.tar").write_bytes(gzip.compress(data))
    with pytest.raises(DeepGenError, match="gzip; unpack"):
        contents(config("webdataset", tmp_path))


@pytest.mark.parametrize(("kind", "ending"), [("parquet", "parquet"), ("array_record", "array_record")])
def test_damaged_shards_are_counted(tmp_path: Path, kind: str, ending: str):
    (tmp_path / f"x.{ending}").write_bytes(b"nothing of use" * 1000)
    assert contents(config(kind, tmp_path)) in (["damaged parquet"], ["damaged shard"])


def test_a_damaged_record_is_counted_alone(tmp_path: Path):
    write_array_record(tmp_path, T2I, before=[b"nothing of use"])
    assert contents(config("array_record", tmp_path)) == ["damaged record", *T2I]


def test_fsspec_addresses(tmp_path: Path):
    import fsspec

    memory = fsspec.filesystem("memory")
    write_json(tmp_path / "j", T2I)
    memory.put(str(tmp_path / "j"), "/fs/j", recursive=True)
    memory.pipe("/fs/t/x-0.tar", tar_bytes(T2I[:3]))
    memory.pipe("/fs/t/x-1.tar", tar_bytes(T2I[3:]))
    memory.put(str(write_parquet(tmp_path / "p", T2I)), "/fs/p/data.parquet")
    memory.put(str(write_folder(tmp_path / "f", T2I)), "/fs/f", recursive=True)
    assert contents(config("json", "memory://fs/j/list.json")) == T2I
    assert contents(config("webdataset", "memory://fs/t")) == T2I
    assert contents(config("webdataset", "memory://fs/t/x-{0..1}.tar")) == T2I
    assert contents(config("webdataset", "memory://fs/t/*1.tar")) == T2I[3:]
    assert contents(config("parquet", "memory://fs/p")) == T2I
    assert [sample.image for sample in contents(config("image_folder", "memory://fs/f"))] == [s.image for s in T2I]
    with pytest.raises(DeepGenError, match="missing"):
        contents(config("json", "memory://fs/none"))
    with pytest.raises(DeepGenError, match="nosuch://x"):
        contents(config("json", "nosuch://x"))


def test_array_record_from_a_remote_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import fsspec

    monkeypatch.setenv("DEEPGEN_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(str(write_array_record(tmp_path, T2I)), "/fs/a/data.array_record")
    assert contents(config("array_record", "memory://fs/a")) == T2I


def test_tfds_folder(tmp_path: Path):
    tfds = pytest.importorskip("tensorflow_datasets")
    import io

    class Pairs(tfds.core.GeneratorBasedBuilder):
        # As of a script: from a longer module name, a package that few have is asked for the path.
        __module__ = "pairs"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image()
            features = {"image": image, "caption": tfds.features.Text(), "refs": tfds.features.Sequence(image)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, sample in enumerate(EDIT):
                files = [io.BytesIO(data) for data in (sample.image, *sample.references)]
                yield i, {"image": files[0], "caption": sample.text, "refs": files[1:]}

    builder = Pairs(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    folder = Path(str(builder.data_path))
    fields = {"references": "refs"}
    found = contents(config("tfds", folder, "edit", fields=fields))
    assert sorted(found) == sorted(EDIT)
    assert contents(config("tfds", folder, "edit", fields=fields, split="train[2:4]")) == found[2:4]
    with pytest.raises(DeepGenError, match="split test"):
        contents(config("tfds", folder, split="test"))
    with pytest.raises(DeepGenError, match="prepared version"):
        contents(config("tfds", tmp_path / "none"))

    # The same records in TFRecord files: length, checksum, data, checksum.
    from array_record.python.array_record_module import ArrayRecordReader

    other = tmp_path / "tfrecord" / "1.0.0"
    shutil.copytree(folder, other)
    (shard,) = other.glob("*array_record*")
    reader = ArrayRecordReader(str(shard))
    records = reader.read(list(range(reader.num_records())))
    data = b"".join(struct.pack("<QI", len(record), 0) + record + bytes(4) for record in records)
    (other / shard.name.replace("array_record", "tfrecord")).write_bytes(data)
    shard.unlink()
    info = other / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    assert contents(config("tfds", other, "edit", fields=fields)) == found
    assert contents(config("tfds", other, "edit", fields=fields, split="train[2:4]")) == found[2:4]


def test_file_patterns(tmp_path: Path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.txt", "sub/c.TAR"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def names(pattern: str) -> list[str]:
        return [Path(file.path).name for file in list_files(f"{tmp_path}/{pattern}", (".tar",), "source s")]

    assert names("") == ["a-08.tar", "a-09.tar", "a-10.tar", "c.TAR"]
    assert names("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("a-0?.tar") == ["a-08.tar", "a-09.tar"]
    with pytest.raises(DeepGenError, match="a-11"):
        names("a-{10..11}.tar")


def test_parts_of_files(tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    for place, data in (((), b"0123456789"), ((3,), b"3456789"), ((3, 2), b"34")):
        with open_blob(Blob(str(path), *place)) as file:
            assert file.read() == data


values = st.one_of(
    st.lists(st.binary(max_size=300), max_size=3),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4).map(lambda x: np.array(x, np.int64)),
    st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(lambda x: np.array(x, np.float32)),
)


@given(st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_example_records_survive(features):
    parsed = parse_example(write_example(features))
    assert parsed.keys() == features.keys()
    for name, value in features.items():
        if len(value):
            assert np.array_equal(np.asarray(parsed[name], object), np.asarray(value, object))


@given(st.binary(max_size=60), st.integers(0, 200))
def test_broken_examples_are_value_errors(junk: bytes, cut: int):
    whole = as_example(EDIT[0])
    for data in (junk, whole[:cut], whole[:cut] + junk):
        with contextlib.suppress(ValueError):
            parse_example(data)


def test_folders_of_hugging_face(tmp_path: Path):
    """As ``save_to_disk`` writes them: one data set, several splits, caches next to the shards; edits as well."""
    for form in ("struct", "bytes", "path"):
        write_arrow(tmp_path / form, T2I, form, shards=2)
        assert contents(config("arrow", tmp_path / form)) == T2I
    write_arrow(tmp_path / "edit", EDIT)
    assert contents(config("arrow", tmp_path / "edit", "edit")) == EDIT
    write_arrow(tmp_path / "dict" / "train", T2I)
    write_arrow(tmp_path / "dict" / "test", T2I[:2])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "dict" / "train" / "cache-0123456789.arrow").write_bytes(b"of a map()")
    assert contents(config("arrow", tmp_path / "dict")) == T2I
    assert contents(config("arrow", tmp_path / "dict", split="test")) == T2I[:2]
    with pytest.raises(DeepGenError, match=r"has no split tset; did you mean test\? known: train, test"):
        contents(config("arrow", tmp_path / "dict", split="tset"))
    with pytest.raises(DeepGenError, match=r"did you mean caption\?.*data.sources.s.fields.text=COLUMN"):
        contents(config("arrow", tmp_path / "struct", fields={"text": "captoin"}))
    (tmp_path / "struct" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DeepGenError, match="holds 1 of 2 shards"):
        contents(config("arrow", tmp_path / "struct"))
    (tmp_path / "bytes" / "state.json").write_text("[]")
    with pytest.raises(DeepGenError, match=r"state\.json is damaged"):
        contents(config("arrow", tmp_path / "bytes"))


def test_arrow_files_of_other_programs(tmp_path: Path):
    import pyarrow as pa

    table = pa.table({"title": [s.text for s in T2I], "photo": [s.image for s in T2I]})
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    fields = {"text": "title", "image": "photo"}
    assert contents(config("arrow", tmp_path / "x.arrow", fields=fields)) == T2I


def test_fields_are_settable_on_the_command_line():
    from deepgen_jax import settings
    from deepgen_jax.training import config_files

    run = config_files.load_config("tiny_pretrain")
    name = run.data.sources[0].name
    words = ["kind=arrow", "path=/data", "fields.text=title", "fields.image=photo", "split=test"]
    source = settings.apply(run, [f"data.sources.{name}.{word}" for word in words]).data.sources[0]
    assert source == SourceConfig(name, "arrow", "/data", fields={"text": "title", "image": "photo"}, split="test")


def test_all_sources_can_be_given_as_json():
    from deepgen_jax import settings
    from deepgen_jax.training import config_files

    words = [
        'data.sources=[{"name": "photos", "kind": "arrow", "path": "/data", "fields": {"text": "title"}}]',
        "data.mixture.cycle=t2i",
    ]
    sources = settings.apply(config_files.load_config("tiny_pretrain"), words).data.sources
    assert sources == (SourceConfig("photos", "arrow", "/data", fields={"text": "title"}),)
