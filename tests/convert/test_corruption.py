"""Corrupted files against the libraries that define the formats: what they refuse is refused; values read are equal."""

from __future__ import annotations

import io
import json
import os
import struct
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from deepgen_jax.convert import convert, pth
from deepgen_jax.convert.checkpoints import open_checkpoint
from deepgen_jax.convert.sources import WEIGHT_DTYPES, SafetensorsFile, Source
from deepgen_jax.errors import DeepGenError

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(source: Source) -> dict[str, np.ndarray]:
    """Every tensor of a dtype that weights have."""
    return {name: tensor.read() for name, tensor in source.tensors.items() if tensor.dtype in WEIGHT_DTYPES}


def one_line(message: str) -> None:
    assert "\n" not in message
    assert message.isprintable(), message


def equal(ours: dict[str, np.ndarray], theirs: dict[str, Any]) -> None:
    """Asserts that what was read is equal, to the bit."""
    for name, value in ours.items():
        tensor = theirs[name].detach().contiguous()
        assert value.shape == tuple(tensor.shape)
        bits = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)
        assert value.tobytes() == bits.numpy().tobytes(), name


def safetensors_bytes(table: Any, body: bytes) -> bytes:
    header = json.dumps(table).encode()
    return struct.pack("<Q", len(header)) + header + body


def check_safetensors(path: Path) -> None:
    try:
        theirs: dict[str, Any] | None = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, MemoryError):
        theirs = None
    try:
        source = SafetensorsFile(path)
        ours = read_all(source)
        source.close()
    except DeepGenError as error:
        one_line(str(error))
        return
    assert theirs is not None
    assert set(source.tensors) == set(theirs)
    equal(ours, theirs)


odd = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
offsets = st.lists(st.integers(-8, 60), min_size=1, max_size=3)
entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "F8_E4M3", "X"]) | odd,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | odd,
        "data_offsets": offsets | odd,
    },
)


@FUZZ
@given(table=st.dictionaries(st.sampled_from("abc") | st.just("__metadata__"), entry | odd, max_size=3) | odd)
def test_any_header(table: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(table, bytes(range(40))))
    check_safetensors(path)


@FUZZ
@given(
    spans=st.lists(st.tuples(st.integers(-8, 40), st.integers(-8, 40)), min_size=1, max_size=4),
    extra=st.integers(0, 12),
)
@example(spans=[(0, 16), (8, 24)], extra=24)
@example(spans=[(0, 8), (12, 20)], extra=20)
@example(spans=[(-8, 0)], extra=0)
@example(spans=[(0, 8), (0, 8)], extra=8)
@example(spans=[(0, 8)], extra=12)
def test_spans_that_overlap_or_leave_gaps(spans: list[tuple[int, int]], extra: int, tmp_path: Path) -> None:
    table = {
        f"t{i}": {"dtype": "F32", "shape": [max(0, stop - start) // 4], "data_offsets": [start, stop]}
        for i, (start, stop) in enumerate(spans)
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(table, bytes(range(extra))))
    check_safetensors(path)


@FUZZ
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.none() | st.integers(1, 40))
def test_flipped_bytes_of_safetensors(place: float, flip: int, cut: int | None, tmp_path: Path) -> None:
    table = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    }
    content = bytearray(safetensors_bytes(table, bytes(range(24))))
    content[int(place * len(content))] ^= flip
    path = tmp_path / "x.safetensors"
    path.write_bytes(content[:-cut] if cut else content)
    check_safetensors(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' * 100_000,
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":' + b"[" * 100_000,
        b'{"a\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a\\u0000":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a\\n":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.encode("utf-16"),
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
    ],
)
def test_headers_that_are_no_text_or_no_json(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(DeepGenError, match=r"header|name") as caught:
        SafetensorsFile(path)
    one_line(str(caught.value))


def torch_state() -> dict[str, torch.Tensor]:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {"plain": base.clone(), "bf16": base.bfloat16(), "part": base[1:], "column": base.T, "tied": base.view(12)}


def torch_bytes(content: Any, *, compression: int | None = None) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    if compression is None:
        return buffer.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(packed, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return packed.getvalue()


def check_torch(path: Path) -> bool:
    """Whether a file is read; what torch refuses must be refused, or be read as it was saved."""
    try:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises anything
        theirs = None
    try:
        source = open_checkpoint(path)
        ours = read_all(source)
        source.close()
    except DeepGenError as error:
        one_line(str(error))
        return False
    equal(ours, torch_state() if theirs is None else theirs)
    return True


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_records_may_be_compressed(compression: int, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(torch_bytes(torch_state(), compression=compression))
    assert check_torch(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused_as_by_torch(compression: int, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(torch_bytes(torch_state(), compression=compression))
    assert not check_torch(path)


def test_a_compressed_stage_checkpoint_converts(
    data_dir: Path, bases: dict[str, Path], folders: Callable[[str], Path], tmp_path: Path,
    read_flat: Callable[..., dict[str, np.ndarray]], assert_same: Callable[..., None],
) -> None:  # fmt: skip
    path = tmp_path / "packed.pth"
    content = torch.load(data_dir / "deepgen_sft.pth", weights_only=True)
    path.write_bytes(torch_bytes(content, compression=zipfile.ZIP_DEFLATED))
    convert(out=tmp_path / "m", checkpoint=path, **bases)
    assert_same(read_flat(tmp_path / "m"), read_flat(folders("sft")))


@FUZZ
@given(
    flips=st.dictionaries(st.floats(0, 1, exclude_max=True), st.integers(1, 255), min_size=1, max_size=3),
    compression=st.sampled_from([None, zipfile.ZIP_DEFLATED]),
    cut=st.none() | st.integers(1, 400),
)
def test_flipped_bytes_of_torch_files(
    flips: dict[float, int], compression: int | None, cut: int | None, tmp_path: Path
) -> None:
    content = bytearray(torch_bytes(torch_state(), compression=compression))
    for place, flip in flips.items():
        content[int(place * len(content))] ^= flip
    path = tmp_path / "x.pth"
    path.write_bytes(content[:-cut] if cut else content)
    check_torch(path)


@FUZZ
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_flipped_bytes_of_the_pickle(place: float, value: int, tmp_path: Path) -> None:
    """The zip around it is whole, so that the unpickler sees every change."""
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(io.BytesIO(torch_bytes(torch_state()))) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = bytearray(source.read(name))
            if name.endswith("data.pkl"):
                content[int(place * len(content))] = value
            target.writestr(name, bytes(content))
    check_torch(path)


def cyclic() -> dict[str, Any]:
    content: dict[str, Any] = {"state_dict": torch_state()}
    content["self"] = content
    content["list"] = [content]
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": torch.eye(3).to_sparse()}, "a is a sparse tensor"),
        ({"a": torch.eye(3).to_sparse_csr()}, "a sparse tensor"),
        ({"a": torch.empty(3, device="meta")}, "a is a meta tensor"),
        ({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, "quantized"),
        ({"a": torch.view_as_complex(torch.ones(3, 2)).conj().imag}, "negated"),
        ({0: torch.ones(2), "a": torch.ones(2)}, "the key 0 of a tensor is of type int"),
        ({("a", 1): torch.ones(2)}, "of type tuple"),
        ({"a\nb": torch.ones(2)}, r"'a\\nb' of a tensor is no name"),
        ({"a\ud800": torch.ones(2)}, "no name"),
        ({"state_dict": {}}, "holds no weights"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_that_are_no_plain_weights(content: Any, reason: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DeepGenError, match=reason) as caught:
        open_checkpoint(path)
    one_line(str(caught.value))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_may_hold_itself(legacy: bool, tmp_path: Path) -> None:
    torch.save(cyclic(), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    equal(read_all(open_checkpoint(tmp_path / "x.pth")), torch_state())


def test_a_pickle_that_inflates_to_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as member:
            for _ in range(2 * pth.MAX_PICKLE_BYTES // 2**20):
                member.write(b"}" * 2**20)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(DeepGenError, match=r"data\.pkl has more than 16 MiB"):
        open_checkpoint(path)


def test_a_record_that_claims_more_than_it_can_hold(tmp_path: Path) -> None:
    content = bytearray(torch_bytes({"a": torch.ones(1000)}, compression=zipfile.ZIP_DEFLATED))
    directory = content.index(b"PK\x01\x02")
    entry_start = content.index(b"archive/data/0", directory) - 46
    struct.pack_into("<I", content, entry_start + 24, 0xFFFFFFF0)
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(DeepGenError, match="size of the record of a is damaged"):
        open_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("option", ["checkpoint", "hparams", "diffusers"])
def test_pipes_are_refused_at_once(option: str, bases: dict[str, Path], release: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    sources: dict[str, Any] = {**bases, option: pipe}
    if option == "diffusers":
        weights = release / "vae" / "diffusion_pytorch_model.safetensors"
        weights.unlink()
        os.rename(pipe, weights)
        sources = {"diffusers": release}
    failures: list[str] = []

    def run() -> None:
        try:
            convert(out=tmp_path / "m", **sources)
        except DeepGenError as error:
            failures.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert "is a pipe, not a regular file" in failures[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"note": "\\ud800"}', "surrogate"),
        ('{"lora_alpha": NaN}', "NaN is no JSON"),
        ('{"lora_alpha": 1e999}', "too large"),
        ('{"max_length": ' + "9" * 5000 + "}", "too large"),
        ('{"max_length": 1, "max_length": 2}', "occurs twice"),
        ('{"max_length": 0}', "must be"),
        ('{"max_length": 99999999999999999999}', "must be"),
        ('{"connector": {"num_attention_heads": 0}}', "must be"),
        ('{"connector": {"selection_stride": -1}}', "must be"),
        ('{"connector": []}', "expected dict"),
    ],
)
def test_hyper_parameters_that_are_no_json_or_no_sizes(
    text: str, reason: str, data_dir: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "h.json").write_text(text)
    with pytest.raises(DeepGenError, match=reason) as caught:
        convert(out=tmp_path / "m", **{**bases, "hparams": tmp_path / "h.json"})
    one_line(str(caught.value))


@FUZZ
@given(data=st.data())
def test_any_value_in_any_configuration_is_an_error_or_harmless(data: st.DataObject, release: Path) -> None:
    """Damaged configurations are refused with one line, whatever they contain, and never cause large or slow work."""
    from deepgen_jax.convert import configs

    name, parse = data.draw(
        st.sampled_from(
            [
                ("vlm/config.json", configs.qwen_configs),
                ("transformer/config.json", configs.mmdit_config),
                ("vae/config.json", configs.vae_config),
                ("scheduler/scheduler_config.json", configs.scheduler_config),
            ]
        )
    )
    values = json.loads((release / name).read_text())
    nodes = [values, *(child for child in values.values() if isinstance(child, dict))]
    node = data.draw(st.sampled_from(nodes))
    key = data.draw(st.sampled_from(sorted(node)))
    node[key] = data.draw(odd | st.integers(-5, 5))
    try:
        parse(values, name)
    except DeepGenError as error:
        one_line(str(error))
