"""20,000 samples of mixed sources, one in a hundred broken: only those are lost, all are counted, memory is flat."""

from __future__ import annotations

import io
import json
import os
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.make_data import TOKENIZER, Sample, encoded, model, tar_bytes, write_array_record, write_parquet

from deepgen_jax.data.data_config import DataConfig, SourceConfig
from deepgen_jax.data.loader import Loader

SIZES = ((96, 96), (128, 96), (96, 128))
PICTURES = [[encoded(*size, 100 * n + i) for i in range(50)] for n, size in enumerate(SIZES)]


def picture(number: int) -> bytes:
    return PICTURES[number % 3][number % 50]


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


def spoil(path: Path, number: int, huge: bytes) -> str | None:
    """Breaks one file in five hundred in each of five ways; returns the expected reasons."""
    kind = number % 500
    if kind == 7:
        path.write_bytes(path.read_bytes()[:-200])
        return "damaged file"
    if kind == 107:
        path.write_bytes(b"")
        return "empty file"
    if kind == 207:
        path.unlink()
        return "missing file"
    if kind == 307:
        path.write_bytes(huge)
        return "too many pixels"
    return None


def resident() -> int:
    """Bytes of memory in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_twenty_thousand(tmp_path: Path):
    huge = bomb()
    bad: dict[str, dict[int, str]] = {name: {} for name in ("pairs", "captions", "edits", "tars", "table", "records")}
    for name, count in (("pairs", 6000), ("captions", 4000), ("edits", 3000)):
        folder = tmp_path / name
        folder.mkdir()
        items = []
        for number in range(count):
            image = folder / f"{number}.jpg"
            image.write_bytes(picture(number))
            reason = spoil(image, number, huge)
            if name == "pairs":
                items.append({"txt": f"number {number}", "image_path": image.name})
                if number % 500 == 407:
                    items[-1] = {"txt": None, "image_path": image.name}
                    reason = "missing field"
            elif name == "captions":
                annotation = folder / f"{number}.json"
                annotation.write_text(json.dumps({"caption": f"number {number}"}))
                if number % 500 == 407:
                    annotation.write_text('{"caption": "number')
                    reason = "wrong JSON"
                items.append({"image": image.name, "annotation": annotation.name})
            else:
                other = folder / f"{number}-in.jpg"
                other.write_bytes(picture(number))
                item = {"input_image": [other.name], "output_image": image.name, "instruction": f"make it {number}"}
                items.append(item)
                if number % 500 == 407:
                    items[-1] = "no object"
                    reason = "wrong JSON"
            if reason:
                bad[name][number] = reason
        (folder / "list" if name == "captions" else folder).mkdir(exist_ok=True)
        (folder / ("list/list.json" if name == "captions" else "list.json")).write_text(json.dumps(items))

    def samples(name: str, count: int) -> list[Sample]:
        made = []
        for number in range(count):
            data, reason = picture(number), None
            if number % 500 == 7:
                data, reason = data[:-200], "damaged file"
            elif number % 500 == 107:
                data, reason = b"", "empty file"
            elif number % 500 == 307:
                data, reason = huge, "too many pixels"
            made.append(Sample(f"number {number}", data))
            if reason:
                bad[name][number] = reason
        return made

    (tmp_path / "tars").mkdir()
    tars = samples("tars", 3000)
    for shard in range(6):
        (tmp_path / "tars" / f"{shard}.tar").write_bytes(tar_bytes(tars[500 * shard : 500 * (shard + 1)]))
    write_parquet(tmp_path / "table", samples("table", 2000), "struct", group=100)
    write_array_record(tmp_path / "records", samples("records", 2000))

    kinds = {"pairs": "json", "captions": "captions", "edits": "json", "tars": "webdataset", "table": "parquet"}
    sources = [
        SourceConfig(name, kind, str(tmp_path / name / ("list" if name == "captions" else "")).rstrip("/"),
                     "edit" if name == "edits" else "t2i", root=str(tmp_path / name) if name == "captions" else "")
        for name, kind in {**kinds, "records": "array_record"}.items()
    ]  # fmt: skip
    config = DataConfig(tuple(sources), 32, image_size=64, max_bad_share=0.02, cache_dir=str(tmp_path / "cache"))
    with Loader(config, model(), TOKENIZER, once=True) as loader:
        rows = {index.meta["source"]: len(index) for index in loader.plan.indices}
        assert rows == {"pairs": 6000, "captions": 4000, "edits": 3000, "tars": 3000, "table": 2000, "records": 2000}
        for index in loader.plan.indices:
            name = index.meta["source"]
            assert index.meta["counts"] == dict(Counter(bad[name].values())), name
            assert np.flatnonzero(index.status).tolist() == sorted(bad[name])
        # Some more break after they were indexed, in ways that no header shows.
        late = list(range(250, 6000, 500))
        for number in late:
            path = tmp_path / "pairs" / f"{number}.jpg"
            data = bytearray(path.read_bytes())
            data[200:-2] = os.urandom(len(data) - 202)
            path.write_bytes(data if number % 1000 else b"")
        seen: Counter[str] = Counter()
        memory = []
        for number, batch in enumerate(loader):
            seen.update(name for name in batch["sample_ids"].tolist() if name)
            assert (batch["weight"] == (batch["sample_ids"] != "")).all()
            if number % 50 == 0:
                memory.append(resident())
        missed = {name: set(range(count)) - set(bad[name]) for name, count in rows.items()}
        for name in seen:
            source, _, row = name.partition("@")[0].partition("/")
            missed[source].discard(int(row))
        assert set(seen.values()) == {1}
        unread = missed.pop("pairs")
        assert not any(missed.values())
        assert unread <= set(late)
        assert sum(loader.skipped.values()) == len(unread)
        assert loader.skipped["pairs", "empty file"] == sum(number % 1000 == 0 for number in late)
    half = len(memory) // 2
    assert max(memory[half:]) - max(memory[:half]) < 20 * 2**20
