"""The index: bad samples and reasons, when it is rebuilt, and what is not computed twice."""

from __future__ import annotations

import io
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from support.make_data import (
    TOKENIZER,
    edit_samples,
    encoded,
    model,
    t2i_samples,
    write_captions,
    write_json,
    write_tar,
)

from deepgen_jax.data import indexing, storage
from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.data.index import Index
from deepgen_jax.data.indexing import open_indices
from deepgen_jax.data.prompt_encoder import PromptEncoder
from deepgen_jax.data.sources import open_source
from deepgen_jax.data.sources.base import BadSample, read_row
from deepgen_jax.errors import DeepGenError
from deepgen_jax.user_warnings import DeepGenWarning


@pytest.fixture(scope="module")
def prompts() -> PromptEncoder:
    return PromptEncoder(TOKENIZER, model())


def open_index(config: DataConfig, source: SourceConfig, prompts: PromptEncoder) -> Index:
    (index,) = open_indices(replace(config, sources=(source,)), prompts)
    return index


def config(source: SourceConfig, tmp_path: Path, **options) -> DataConfig:
    return DataConfig((source,), 4, MixtureConfig((source.task,)), cache_dir=str(tmp_path / "cache"), **options)


def huge_png(side: int = 20_000) -> bytes:
    """A header that declares 400 megapixels, followed by at most one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BAD = {
    "empty file": lambda path: path.write_bytes(b""),
    "missing file": lambda path: path.unlink(),
    "damaged file": lambda path: path.write_bytes(encoded(200, 200, 1)[:-300]),
    "no image": lambda path: path.write_bytes(b"<html>404</html>" * 50),
    "too many pixels": lambda path: path.write_bytes(huge_png()),
}


def test_bad_images_by_reason(tmp_path: Path, prompts: PromptEncoder):
    samples = t2i_samples(20, sizes=((120, 90),))
    path = write_json(tmp_path, samples)
    for number, spoil in enumerate(BAD.values()):
        spoil(tmp_path / f"{2 * number + 1}.img")
    for number, kind in ((10, "PNG"), (12, "WEBP"), (14, "GIF")):
        data = encoded(120, 90, 0, kind)
        (tmp_path / f"{number}.img").write_bytes(data)
        (tmp_path / f"{number + 1}.img").write_bytes(data[: len(data) * 2 // 3])
    source = config_source(path)
    index = open_index(config(source, tmp_path, max_bad_share=0.5), source, prompts)
    expected = dict.fromkeys(BAD, 1) | {"damaged file": 4}
    assert index.meta["counts"] == expected
    assert np.flatnonzero(index.status).tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert str(tmp_path / "1.img") in index.meta["examples"]["empty file"]
    good = np.asarray(index.status) == 0
    assert (index.sizes[good] == [[120, 90]]).all()
    assert index.lengths[0] == prompts.length(samples[0].text, None)
    with pytest.raises(DeepGenError, match=r"source s: 8 of 20 samples are bad \(1 empty file, .*max_bad_share 0.05"):
        open_index(config(source, tmp_path), source, prompts)


def config_source(path: Path) -> SourceConfig:
    return SourceConfig("s", "json", str(path))


def test_unusual_but_intact_files(tmp_path: Path, prompts: PromptEncoder):
    path = write_json(tmp_path, t2i_samples(4))
    with_tail = encoded(96, 96) + b"appended by some program" * 100
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, data in enumerate((with_tail, encoded(96, 128, kind="BMP"), encoded(96, 128, exif=exif))):
        (tmp_path / f"{number}.img").write_bytes(data)
    index = open_index(config(config_source(path), tmp_path), config_source(path), prompts)
    assert not index.status.any()
    assert index.sizes[:3, 0].tolist() == [[96, 96], [96, 128], [128, 96]]


def test_texts_that_cannot_be_used(tmp_path: Path, prompts: PromptEncoder):
    path = write_json(tmp_path, t2i_samples(4))
    items = json.loads(path.read_text())
    items[1]["txt"] = "an <|image_pad|> inside"
    items[2]["txt"] = "half \ud83d of a pair"
    path.write_text(json.dumps(items))
    index = open_index(config(config_source(path), tmp_path, max_bad_share=1.0), config_source(path), prompts)
    assert index.meta["counts"] == {"reserved token in text": 1, "wrong text": 1}


def test_edits_with_different_numbers_of_references(tmp_path: Path, prompts: PromptEncoder):
    path = write_tar(tmp_path, edit_samples(5, references=(1, 3)))
    source = SourceConfig("e", "webdataset", str(path), "edit")
    index = open_index(config(source, tmp_path), source, prompts)
    assert index.sizes.shape == (5, 4, 2)
    assert ((np.asarray(index.sizes)[..., 0] > 0).sum(axis=1) == [2, 4, 2, 4, 2]).all()
    assert index.lengths[1] == prompts.length("make it 1", 3)


def test_annotations_are_read(tmp_path: Path, prompts: PromptEncoder):
    path = write_captions(tmp_path, t2i_samples(6))
    (tmp_path / "2.json").write_text("{")
    source = SourceConfig("c", "captions", str(path), root=str(tmp_path))
    index = open_index(config(source, tmp_path, max_bad_share=0.5), source, prompts)
    assert index.meta["counts"] == {"wrong JSON": 1}


def test_built_once_and_anew_when_data_change(tmp_path: Path, prompts: PromptEncoder, monkeypatch: pytest.MonkeyPatch):
    path = write_json(tmp_path, t2i_samples(4))
    source = config_source(path)
    first = open_index(config(source, tmp_path), source, prompts)
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "_build", None)
        again = open_index(config(source, tmp_path, seed=3), source, prompts)
    assert again.folder == first.folder
    assert not list(first.folder.parent.glob(".*")), "temporary folders are left"
    items = json.loads(path.read_text())
    path.write_text(json.dumps(items[:3]))
    changed = open_index(config(source, tmp_path), source, prompts)
    assert (len(first), len(changed)) == (4, 3)
    other = replace(source, fields={"text": "image_path"})
    assert open_index(config(other, tmp_path), other, prompts).folder != changed.folder


def test_processes_find_the_same(tmp_path: Path, prompts: PromptEncoder, monkeypatch: pytest.MonkeyPatch):
    for number in range(3):
        path = write_tar(tmp_path, t2i_samples(300, sizes=((96, 96),)))
        path.rename(tmp_path / f"x-{number}.tar")
    (tmp_path / "x-1.tar").write_bytes((tmp_path / "x-1.tar").read_bytes()[:200_000])
    source = SourceConfig("w", "webdataset", str(tmp_path))
    with pytest.warns(DeepGenWarning, match=r"source w: 1 damaged tar, left out from there on; such as .*x-1\.tar"):
        alone = open_index(config(source, tmp_path), source, prompts)
    monkeypatch.setattr(indexing, "_MANY_BYTES", 0)
    parallel = config(source, tmp_path, index_workers=2)
    with pytest.warns(DeepGenWarning, match="1 damaged tar"):
        together = open_index(replace(parallel, cache_dir=str(tmp_path / "other")), source, prompts)
    assert together.meta == alone.meta
    assert together.meta["counts"]["damaged tar"] == 1
    assert [together.row(i) for i in range(0, len(alone), 50)] == [alone.row(i) for i in range(0, len(alone), 50)]


def test_a_file_that_cannot_be_read_leaves_no_index(
    tmp_path: Path, prompts: PromptEncoder, monkeypatch: pytest.MonkeyPatch
):
    """A transient error of a store must not discard samples permanently."""
    write_tar(tmp_path, t2i_samples(5))
    source = SourceConfig("w", "webdataset", str(tmp_path))

    class Failing(io.BytesIO):
        def read(self, *size: int | None) -> bytes:
            if self.tell() > 1000:
                raise OSError("reset by peer")
            return super().read(*size)

    path = next(tmp_path.glob("*.tar"))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_file", lambda path: Failing(Path(path).read_bytes()))
        with pytest.raises(DeepGenError, match=r"cannot be read \(reset by peer\)"):
            open_index(config(source, tmp_path), source, prompts)
    index = open_index(config(source, tmp_path), source, prompts)
    assert (len(index), index.meta["counts"]) == (5, {})
    path.unlink()
    with pytest.raises(BadSample, match="missing file"):
        read_row(open_source(source), index.row(0))


def test_two_builders_at_a_time(tmp_path: Path, prompts: PromptEncoder):
    source = config_source(write_json(tmp_path, t2i_samples(40)))
    settings = config(source, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_index(settings, source, prompts), range(4)))
    assert len({index.folder for index in found}) == 1
    assert sorted(path.name for path in found[0].folder.parent.iterdir()) == [found[0].folder.name]
    assert found[0].meta["counts"] == {}


def test_remote_files(tmp_path: Path, prompts: PromptEncoder):
    memory = fsspec.filesystem("memory")
    write_json(tmp_path / "j", t2i_samples(10))
    memory.put(str(tmp_path / "j"), "/index/j", recursive=True)
    memory.rm("/index/j/3.img")
    source = SourceConfig("r", "json", "memory://index/j")
    index = open_index(config(source, tmp_path, max_bad_share=0.5), source, prompts)
    assert index.meta["counts"] == {"missing file": 1}


def test_a_cache_folder_that_cannot_be(tmp_path: Path, prompts: PromptEncoder):
    source = config_source(write_json(tmp_path, t2i_samples(1)))
    (tmp_path / "cache").write_bytes(b"a file")
    with pytest.raises(DeepGenError, match="DEEPGEN_CACHE"):
        open_index(config(source, tmp_path), source, prompts)


def test_an_empty_source(tmp_path: Path, prompts: PromptEncoder):
    (tmp_path / "list.json").write_text("[]")
    source = config_source(tmp_path / "list.json")
    with pytest.raises(DeepGenError, match="no sample in it"):
        open_index(config(source, tmp_path), source, prompts)
    source = SourceConfig("s", "webdataset", str(tmp_path))
    with pytest.raises(DeepGenError, match=r"holds no \.tar file"):
        open_index(config(source, tmp_path), source, prompts)


@pytest.mark.parametrize("name", ["meta.json", "rows.bin", "status.npy", "lengths.npy", "sizes.npy", "offsets.npy"])
@pytest.mark.parametrize("how", ["gone", "cut", "empty"])
def test_a_damaged_index_is_built_again(tmp_path: Path, prompts: PromptEncoder, name: str, how: str):
    source = config_source(write_json(tmp_path, t2i_samples(6)))
    first = open_index(config(source, tmp_path), source, prompts)
    rows, digest = [first.row(n) for n in range(6)], first.meta["digest"]
    path = first.folder / name
    data = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(data[: len(data) - 3] if how == "cut" else b"")
    with pytest.warns(DeepGenWarning, match="is damaged .*; it is built again"):
        again = open_index(config(source, tmp_path), source, prompts)
    assert ([again.row(n) for n in range(6)], again.meta["digest"]) == (rows, digest)


def test_a_full_disk_is_one_line(tmp_path: Path, prompts: PromptEncoder, monkeypatch: pytest.MonkeyPatch):
    import errno

    source = config_source(write_json(tmp_path, t2i_samples(6)))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("deepgen_jax.data.index.np.save", full)
    with pytest.raises(DeepGenError, match="cannot be written: its disk is full"):
        open_index(config(source, tmp_path), source, prompts)
    assert not list((tmp_path / "cache" / "index").iterdir())
