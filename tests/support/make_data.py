"""Small data sets in every format, made on the fly."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from deepgen_jax.config import BridgeConfig, DeepGenConfig
from deepgen_jax.data.sources.tf_example import write_example

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "qwen2_5_vl"


def model(max_prompt_tokens: int = 1024) -> DeepGenConfig:
    """The released sizes with the tiny tokenizer's special tokens and 8 think tokens."""
    config = DeepGenConfig(max_prompt_tokens=max_prompt_tokens)
    ids = json.loads((TOKENIZER / "config.json").read_text(encoding="utf-8"))
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text = replace(config.text, **{name: ids[name] for name in names})
    return replace(config, text=text, bridge=replace(BridgeConfig(), num_queries=8))


def encoded(width: int, height: int, seed: int = 0, kind: str = "JPEG", **options: Any) -> bytes:
    """An image file with a random picture."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(file, kind, **options)
    return file.getvalue()


class Sample(NamedTuple):
    """Text, encoded target, encoded references."""

    text: str
    image: bytes
    references: tuple[bytes, ...] = ()


def t2i_samples(count: int, sizes: Sequence[tuple[int, int]] = ((96, 96), (128, 96), (96, 128))) -> list[Sample]:
    return [Sample(f"picture {i} " * (1 + i % 5), encoded(*sizes[i % len(sizes)], i)) for i in range(count)]


def edit_samples(count: int, size: tuple[int, int] = (96, 96), references: Sequence[int] = (1,)) -> list[Sample]:
    return [
        Sample(
            f"make it {i}",
            encoded(*size, 3 * i, "PNG"),
            tuple(encoded(*size, 3 * i + 1 + r) for r in range(references[i % len(references)])),
        )
        for i in range(count)
    ]


def write_json(folder: Path, samples: Sequence[Sample], name: str = "list.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for i, sample in enumerate(samples):
        (folder / f"{i}.img").write_bytes(sample.image)
        for r, reference in enumerate(sample.references):
            (folder / f"{i}-{r}.img").write_bytes(reference)
        if sample.references:
            inputs = [f"{i}-{r}.img" for r in range(len(sample.references))]
            items.append({"input_image": inputs, "output_image": f"{i}.img", "instruction": sample.text})
        else:
            items.append({"type": "T2I_SFT", "txt": sample.text, "image": "", "image_path": f"{i}.img"})
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
    else:
        path.write_text(json.dumps(items), encoding="utf-8")
    return path


def write_captions(folder: Path, samples: Sequence[Sample]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for i, sample in enumerate(samples):
        (folder / f"{i}.jpg").write_bytes(sample.image)
        (folder / f"{i}.json").write_text(json.dumps({"caption": sample.text, "source": "x"}), encoding="utf-8")
        items.append({"image": f"{i}.jpg", "annotation": f"{i}.json"})
    path = folder / "list" / "captions.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def write_folder(folder: Path, samples: Sequence[Sample]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, sample in enumerate(samples):
        (folder / f"{i:03d}.jpg").write_bytes(sample.image)
        (folder / f"{i:03d}.txt").write_text(sample.text + "\n", encoding="utf-8")
    return folder


def tar_bytes(samples: Iterable[Sample], as_json: bool = False) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i, sample in enumerate(samples):
            members = {"jpg" if not sample.references else "output.png": sample.image}
            members |= {f"input_{r}.jpg": data for r, data in enumerate(sample.references)}
            key = "instruction" if sample.references else "caption"
            text = {"json": json.dumps({key: sample.text})} if as_json else {"txt": sample.text}
            members |= {ending: content.encode() for ending, content in text.items()}
            for ending, data in members.items():
                info = tarfile.TarInfo(f"set/{i:05d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_tar(folder: Path, samples: Sequence[Sample], as_json: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data-000.tar"
    path.write_bytes(tar_bytes(samples, as_json))
    return path


def as_columns(folder: Path, samples: Sequence[Sample], form: str) -> dict[str, list[Any]]:
    """``form``: "bytes", "struct" (Hugging Face) or "path"."""
    folder.mkdir(parents=True, exist_ok=True)

    def value(data: bytes, name: str) -> Any:
        if form == "path":
            (folder / name).write_bytes(data)
            return name
        return data if form == "bytes" else {"bytes": data, "path": name}

    columns: dict[str, list[Any]] = {"width": list(range(len(samples)))}
    if samples[0].references:
        columns["instruction"] = [sample.text for sample in samples]
        columns["output_image"] = [value(sample.image, f"{i}.img") for i, sample in enumerate(samples)]
        columns["input_image"] = [
            [value(data, f"{i}-{r}.img") for r, data in enumerate(sample.references)]
            for i, sample in enumerate(samples)
        ]
    else:
        columns["caption"] = [sample.text for sample in samples]
        columns["image"] = [value(sample.image, f"{i}.img") for i, sample in enumerate(samples)]
    return columns


def write_parquet(folder: Path, samples: Sequence[Sample], form: str = "bytes", group: int = 4) -> Path:
    """``form``: see `as_columns`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "data.parquet"
    pq.write_table(pa.table(as_columns(folder, samples, form)), path, row_group_size=group)
    return path


def write_arrow(folder: Path, samples: Sequence[Sample], form: str = "struct", shards: int = 1) -> Path:
    """A folder as ``datasets.Dataset.save_to_disk`` writes it; ``form``: see `as_columns`."""
    import pyarrow as pa

    table = pa.table(as_columns(folder, samples, form))
    names = [f"data-{shard:05d}-of-{shards:05d}.arrow" for shard in range(shards)]
    ends = [len(samples) * shard // shards for shard in range(shards + 1)]
    for name, start, end in zip(names, ends[:-1], ends[1:], strict=True):
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table.slice(start, end - start), max_chunksize=4)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "1", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def as_example(sample: Sample) -> bytes:
    features: dict[str, Any] = {"id": np.array([3, -7]), "score": np.array([0.5], np.float32)}
    if sample.references:
        features |= {"instruction": [sample.text.encode()], "input_image": list(sample.references)}
        features["output_image"] = [sample.image]
    else:
        features |= {"text": [sample.text.encode()], "image": [sample.image]}
    return write_example(features)


def write_array_record(folder: Path, samples: Sequence[Sample], before: Sequence[bytes] = ()) -> Path:
    """A shard of the samples, behind records of any kind."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in (*before, *map(as_example, samples)):
        writer.write(record)
    writer.close()
    return path
