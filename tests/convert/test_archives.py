"""Archives of checkpoints are read in place, whole or cut in parts, stored or compressed."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch

from deepgen_jax.convert import convert, zipparts
from deepgen_jax.convert.checkpoints import open_checkpoint
from deepgen_jax.convert.zipparts import JoinedFile, find_parts
from deepgen_jax.errors import DeepGenError

Archive = Callable[..., Path]


@pytest.fixture
def archive(data_dir: Path, tmp_path: Path) -> Archive:
    """Makes a zip of checkpoints, cut in parts if asked: ``archive({"SFT/a.pth": source}, compression, parts)``."""

    def make(members: dict[str, str], compression: int = zipfile.ZIP_STORED, parts: int = 1) -> Path:
        path = tmp_path / "all.zip"
        with zipfile.ZipFile(path, "w", compression) as file:
            file.mkdir("CKPT")
            file.writestr("CKPT/README.md", "about")
            for name, source in members.items():
                file.write(data_dir / source, f"CKPT/{name}")
        if parts == 1:
            return path
        data = path.read_bytes()
        path.unlink()
        size = -(-len(data) // parts)
        for i in range(parts):
            path.with_name(f"all.zip.part-a{chr(ord('a') + i)}").write_bytes(data[i * size : (i + 1) * size])
        return path.with_name("all.zip.part-aa")

    return make


@pytest.mark.parametrize("kept", [20_000, 16 * 2**20])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_member_is_read_in_place(
    kept: int, compression: int, parts: int, monkeypatch: pytest.MonkeyPatch, archive: Archive, data_dir: Path
) -> None:
    monkeypatch.setattr(zipparts, "KEPT_BYTES", kept)
    path = archive({"SFT/iter_400000.pth": "deepgen_sft.pth"}, compression, parts)
    source = open_checkpoint(path)
    expected = torch.load(data_dir / "deepgen_sft.pth", weights_only=True)["state_dict"]
    assert source.layout == "mmengine checkpoint"
    assert source.sequential == (compression == zipfile.ZIP_DEFLATED)
    assert source.tensors.keys() == expected.keys()
    for name, tensor in reversed(list(expected.items())[::9]):  # any order works, if slowly
        np.testing.assert_array_equal(source.tensors[name].read().astype(np.float32), tensor.float().numpy())
    provenance = source.provenance()
    assert provenance["member"] == "CKPT/SFT/iter_400000.pth"
    assert provenance["bytes"] == sum(part.stat().st_size for part in path.parent.glob("all.zip*"))
    source.close()


def test_conversion_goes_through_a_compressed_member_once(
    monkeypatch: pytest.MonkeyPatch, archive: Archive, bases: dict[str, Path], tmp_path: Path
) -> None:
    path = archive({"RL/MR-GDPO_final.pt": "model.pt"}, zipfile.ZIP_DEFLATED, 3)
    monkeypatch.setattr(zipparts, "KEPT_BYTES", 400_000)
    monkeypatch.setattr(zipparts, "RECENT_BYTES", 50_000)
    passes = []
    opened = zipfile.ZipFile.open

    def counting(self: zipfile.ZipFile, name: Any, *arguments: Any, **options: Any) -> IO[bytes]:
        if isinstance(name, zipfile.ZipInfo) and name.filename.startswith("CKPT/RL"):
            passes.append(name)
        return opened(self, name, *arguments, **options)

    monkeypatch.setattr(zipfile.ZipFile, "open", counting)
    convert(out=tmp_path / "m", checkpoint=path, **bases)
    # A look at its first bytes, a pass to the table at its end, and a pass through the tensors.
    assert len(passes) == 3


def test_one_of_several_checkpoints_is_chosen(archive: Archive) -> None:
    path = archive({"Pretrain/iter_200000.pth": "deepgen_pretrain.pth", "SFT/iter_400000.pth": "deepgen_sft.pth"})
    with pytest.raises(DeepGenError, match=r"holds 2 checkpoints \(CKPT/Pretrain/iter_200000.pth, CKPT/SFT/.*--member"):
        open_checkpoint(path)
    with pytest.raises(DeepGenError, match=r"--member RL fits 0 of the checkpoints"):
        open_checkpoint(path, "RL")
    with pytest.raises(DeepGenError, match=r"--member iter fits 2 of the checkpoints"):
        open_checkpoint(path, "iter")
    assert len(open_checkpoint(path, "SFT").tensors) == 814
    assert "meta_queries" in open_checkpoint(path, "Pretrain").tensors


def test_a_deepspeed_folder_inside(archive: Archive) -> None:
    path = archive({"SFT/iter_1.pth/mp_rank_00_model_states.pt": "deepgen_ds/mp_rank_00_model_states.pt"})
    assert open_checkpoint(path).layout == "DeepSpeed checkpoint"


def test_an_archive_without_checkpoints(archive: Archive) -> None:
    with pytest.raises(DeepGenError, match=r"holds no torch checkpoint \(members: CKPT/, CKPT/README.md\)"):
        open_checkpoint(archive({}))


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("ab", "part-ab is missing, though all.zip.part-ad is there"), ("ad", "parts after it are missing .3 found.")],
)
def test_missing_parts(missing: str, reason: str, archive: Archive) -> None:
    path = archive({"SFT/a.pth": "deepgen_sft.pth"}, zipfile.ZIP_DEFLATED, 4)
    path.with_name(f"all.zip.part-{missing}").unlink()
    with pytest.raises(DeepGenError, match=reason):
        open_checkpoint(path)


def test_any_part_and_the_folder_name_the_archive(archive: Archive) -> None:
    path = archive({"SFT/a.pth": "deepgen_sft.pth"}, zipfile.ZIP_DEFLATED, 3)
    assert len(open_checkpoint(path.with_name("all.zip.part-ac")).tensors) == 814
    assert len(open_checkpoint(path.parent).tensors) == 814
    path.unlink()
    with pytest.raises(DeepGenError, match="part-aa is missing"):
        open_checkpoint(path.with_name("all.zip.part-ac"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_part(compression: int, archive: Archive, bases: dict[str, Path], tmp_path: Path) -> None:
    path = archive({"SFT/a.pth": "deepgen_sft.pth"}, compression, 4)
    part = path.with_name("all.zip.part-ab")
    data = bytearray(part.read_bytes())
    data[1000:60000] = b"\xff" * 59000
    part.write_bytes(data)
    with pytest.raises(DeepGenError, match=r"damaged|NaN or infinite"):
        convert(out=tmp_path / "m", checkpoint=path, **bases)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("names", [("part-aa", "part-ab"), ("part1", "part2", "part3"), ("part-00", "part-01")])
def test_names_of_parts(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in (*names, "notes"):
        (tmp_path / f"x.zip.{name}").touch()
    parts = find_parts(tmp_path / f"x.zip.{names[-1]}")
    assert [path.name for path in parts] == [f"x.zip.{name}" for name in names]
    assert find_parts(tmp_path / "x.zip.notes") == [tmp_path / "x.zip.notes"]


def test_a_joined_file_reads_across_its_parts(tmp_path: Path) -> None:
    for i, text in enumerate((b"abc", b"", b"defgh")):
        (tmp_path / str(i)).write_bytes(text)
    file = JoinedFile([tmp_path / str(i) for i in range(3)])
    file.seek(-6, 2)
    assert file.read(1) == b"c"
    assert file.readall() == b"defgh"
    file.seek(0)
    assert file.readall() == b"abcdefgh"
