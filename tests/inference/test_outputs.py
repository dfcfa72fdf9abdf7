"""Image files with their metadata, and folders that are resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import deepgen_jax
from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import PARTIAL_PREFIX
from deepgen_jax.inference.batch import Request, Settings
from deepgen_jax.inference.outputs import METADATA_FILE, Model, OutputFolder, describe, read_metadata, save_image
from deepgen_jax.user_warnings import collect_warnings

REQUEST = Request("00000.png", "p.txt:1", "a café 日本", "", 3, 64, 32, 5, 4.0)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8))
SETTINGS = Settings()


@pytest.fixture
def model(tmp_path: Path) -> Model:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"provenance": 1}')
    return Model.of(tmp_path / "model", "float32")


def requests(count: int) -> list[Request]:
    return [dataclasses.replace(REQUEST, file=f"{i:05d}.png", seed=i) for i in range(count)]


def test_read_metadata_of_an_image(tmp_path: Path, model: Model):
    reference = tmp_path / "ref.png"
    IMAGE.save(reference)
    metadata = describe(dataclasses.replace(REQUEST, images=(reference,)), SETTINGS, model)
    for path in (tmp_path / "a.png", tmp_path / "a.jpg", tmp_path / "a.webp"):
        save_image(IMAGE, path, metadata)
        assert read_metadata(path) == metadata
        assert Image.open(path).size == (64, 32)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(IMAGE))
    expected = {
        "file": "00000.png", "prompt": "a café 日本", "negative_prompt": "", "seed": 3, "width": 64, "height": 32,
        "steps": 5, "guidance": 4.0, "padding": "reference", "reference_posterior": "mean", "dtype": "float32",
        "images": [str(reference)], "model": str(model.folder), "deepgen_jax": deepgen_jax.__version__,
        "model_fingerprint": model.fingerprint,
    }  # fmt: skip
    assert {name: metadata[name] for name in expected} == expected
    assert metadata["jax"]
    assert read_metadata(reference) is None


def test_fingerprint_follows_what_decides_the_pixels(tmp_path: Path, model: Model):
    reference = tmp_path / "ref.png"
    IMAGE.save(reference)
    edit = dataclasses.replace(REQUEST, images=(reference,))

    def fingerprint(request: Request = edit, settings: Settings = SETTINGS, model: Model = model) -> str:
        return describe(request, settings, model)["fingerprint"]

    start = fingerprint()
    same = dataclasses.replace(edit, file="other.png", source="elsewhere")
    assert fingerprint(same) == start
    assert fingerprint(settings=dataclasses.replace(SETTINGS, strict_size=True, max_image_pixels=9)) == start
    for name, value in (
        ("prompt", "x"), ("negative_prompt", "x"), ("seed", 4), ("width", 32), ("height", 64), ("steps", 6),
        ("guidance", 4.5), ("images", ()), ("images", (reference, reference)),
    ):  # fmt: skip
        assert fingerprint(dataclasses.replace(edit, **{name: value})) != start
    for name, value in (("padding", "masked"), ("reference_posterior", "sample"), ("max_reference_pixels", 4096)):
        assert fingerprint(settings=dataclasses.replace(SETTINGS, **{name: value})) != start
    assert fingerprint(model=dataclasses.replace(model, dtype="bfloat16")) != start
    (model.folder / "config.json").write_text('{"provenance": 2}')
    assert fingerprint(model=Model.of(model.folder, "float32")) != start
    os.utime(reference, (1, 1))
    assert fingerprint() == start
    IMAGE.transpose(Image.Transpose.ROTATE_180).save(reference)
    assert fingerprint() != start


def test_bad_places(tmp_path: Path):
    with pytest.raises(DeepGenError, match=r"suffix '.bmp'; use one of .png"):
        save_image(IMAGE, tmp_path / "a.bmp", {})
    with pytest.raises(DeepGenError, match=r"none/a.png cannot be written: No such file"):
        save_image(IMAGE, tmp_path / "none/a.png", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(DeepGenError, match="is a file"), OutputFolder(tmp_path / "file"):
        pass
    with pytest.raises(DeepGenError, match="cannot be used: Not a directory"), OutputFolder(tmp_path / "file/x"):
        pass


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_image(IMAGE, tmp_path / "a.png", {"fingerprint": "old"})
    before = (tmp_path / "a.png").read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DeepGenError, match=r"a.png cannot be written: its disk is full"):
        save_image(IMAGE, tmp_path / "a.png", {})
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@contextlib.contextmanager
def notices() -> Iterator[list[str]]:
    said: list[str] = []
    with collect_warnings(said.append):
        yield said


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METADATA_FILE).read_text(encoding="utf-8").splitlines()]


def test_resuming(tmp_path: Path, model: Model):
    folder = tmp_path / "out"
    wanted = [describe(request, SETTINGS, model) for request in requests(4)]
    with OutputFolder(folder) as output:
        assert output.missing(wanted) == [w["file"] for w in wanted]
        for metadata in wanted[:3]:
            output.save(IMAGE, metadata)
    assert lines(folder) == wanted[:3]
    before = (folder / METADATA_FILE).stat().st_mtime_ns
    with OutputFolder(folder) as output:
        assert output.missing(wanted) == ["00003.png"]
    assert (folder / METADATA_FILE).stat().st_mtime_ns == before

    # Killed between an image and its line, in the middle of a line, and in the middle of an image.
    text = (folder / METADATA_FILE).read_text(encoding="utf-8")
    (folder / METADATA_FILE).write_text("".join(text.splitlines(keepends=True)[:2])[:-20], encoding="utf-8")
    (folder / f"{PARTIAL_PREFIX}99-00003").write_bytes(b"half")
    with notices() as said, OutputFolder(folder) as output:
        assert output.missing(wanted) == ["00003.png"]
        output.save(IMAGE, wanted[3])
    assert said == [f"{folder / METADATA_FILE} has a damaged line, left by a run that was cut off; dropped"]
    assert sorted(line["file"] for line in lines(folder)) == [w["file"] for w in wanted]
    assert sorted(path.name for path in folder.iterdir()) == [*(w["file"] for w in wanted), METADATA_FILE]


def test_changed_requests_are_made_again(tmp_path: Path, model: Model):
    folder = tmp_path / "out"
    wanted = [describe(request, SETTINGS, model) for request in requests(3)]
    with OutputFolder(folder) as output:
        output.missing(wanted)
        for metadata in wanted:
            output.save(IMAGE, metadata)
    wanted[1] = describe(dataclasses.replace(requests(3)[1], prompt="a dog"), SETTINGS, model)
    (folder / "00002.png").write_bytes((folder / "00002.png").read_bytes()[:-40])
    with notices() as said, OutputFolder(folder) as output:
        assert output.missing(wanted) == ["00001.png", "00002.png"]
        assert [line["file"] for line in lines(folder)] == ["00000.png"]
        for metadata in wanted[1:]:
            output.save(IMAGE, metadata)
    assert said == [
        f"1 of the images in {folder} are damaged; made again",
        f"1 of the images in {folder} are of other requests or another model; made again",
    ]
    assert lines(folder) == wanted
    (folder / "00000.png").unlink()
    with OutputFolder(folder) as output:
        assert output.missing(wanted) == ["00000.png"]


def test_images_of_other_requests_are_kept_or_made_again(tmp_path: Path, model: Model):
    folder = tmp_path / "out"
    cat, dog = (describe(dataclasses.replace(REQUEST, prompt=what), SETTINGS, model) for what in ("a cat", "a dog"))
    with OutputFolder(folder) as output:
        output.missing([cat])
        output.save(IMAGE, cat)
        assert output.missing([cat], keep_others=True) == []
        with pytest.raises(DeepGenError, match=r"00000.png was made from another request; .* --overwrite"):
            output.missing([dog], keep_others=True)
        assert read_metadata(folder / "00000.png") == cat
        assert output.missing([dog], overwrite=True, keep_others=True) == ["00000.png"]
        assert output.missing([cat], overwrite=True) == ["00000.png"]


def test_metadata_that_do_not_fit_and_names_that_are_no_text(tmp_path: Path, model: Model):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    IMAGE.save(folder / "ref.png")
    metadata = describe(dataclasses.replace(REQUEST, images=(folder / "ref.png",)), SETTINGS, model)
    save_image(IMAGE, tmp_path / "a.png", metadata)
    assert read_metadata(tmp_path / "a.png") == metadata
    grid = {"file": "grid.jpg", "images": [metadata] * 200, "fingerprint": "f"}
    with notices() as said:
        save_image(IMAGE, tmp_path / "grid.jpg", grid)
    assert said == [f"{tmp_path / 'grid.jpg'} has no room for the settings of its images; use .png to keep them"]
    assert read_metadata(tmp_path / "grid.jpg") == {"file": "grid.jpg", "fingerprint": "f"}


def test_other_peoples_files_are_safe(tmp_path: Path, model: Model):
    wanted = [describe(request, SETTINGS, model) for request in requests(2)]
    own = '{"file_name": "holiday.png", "text": "é"}\n'
    (tmp_path / METADATA_FILE).write_text(own, encoding="utf-8")
    IMAGE.save(tmp_path / "00001.png")
    with OutputFolder(tmp_path) as output:
        with pytest.raises(DeepGenError, match=r"00001.png is in the way .* --overwrite"):
            output.missing(wanted)
        assert output.missing(wanted, overwrite=True) == ["00000.png", "00001.png"]
        output.save(IMAGE, wanted[0])
    assert (tmp_path / METADATA_FILE).read_text(encoding="utf-8").startswith(own)


def test_one_run_at_a_time(tmp_path: Path):
    script = (
        "import sys, pathlib; from deepgen_jax.inference.outputs import OutputFolder\n"
        "with OutputFolder(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(
            DeepGenError, match=r"is in use by process \d+ on .* choose another --out"
        ),
        OutputFolder(tmp_path),
    ):
        pass
    other.kill()
    other.wait()
    with OutputFolder(tmp_path):
        pass


def test_trees_of_folders_with_their_records_elsewhere(tmp_path: Path, model: Model):
    names = ("a/samples/0000.png", "a/samples/0001.png", "b.png")
    wanted = [describe(dataclasses.replace(REQUEST, file=name), SETTINGS, model) for name in names]
    folder, records = tmp_path / "out", tmp_path / "out/.records"
    with OutputFolder(folder, records) as output:
        assert output.missing(wanted) == list(names)
        for metadata in wanted[:2]:
            output.save(IMAGE, metadata)
    leftover = folder / f"a/samples/{PARTIAL_PREFIX}1-0001"
    leftover.write_bytes(b"half")
    with OutputFolder(folder, records) as output:
        assert output.missing(wanted) == ["b.png"]
    assert not leftover.exists()
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"0000.png", "0001.png", METADATA_FILE}
    assert (records / METADATA_FILE).is_file()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], bytes]:
    """A folder with two finished images, their metadata, and the bytes of the second."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "model").mkdir()
    model = Model.of(folder / "model", "float32")
    wanted = [describe(request, SETTINGS, model) for request in requests(2)]
    with OutputFolder(folder / "out") as output:
        output.missing(wanted)
        for metadata in wanted:
            output.save(IMAGE, metadata)
    return folder / "out", wanted, (folder / "out/00001.png").read_bytes()


@given(
    place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), kind=st.sampled_from(["flip", "cut", "add"])
)
def test_an_image_that_is_damaged_anywhere_is_made_again(
    finished: tuple[Path, list[dict], bytes], place: float, change: int, kind: str
):
    folder, wanted, content = finished
    at = int(place * len(content))
    damaged = {
        "flip": content[:at] + bytes([content[at] ^ change]) + content[at + 1 :],
        "cut": content[:at],
        "add": content + bytes([change]),
    }[kind]
    (folder / "00001.png").write_bytes(damaged)
    with notices() as said, OutputFolder(folder) as output:
        assert output.missing(wanted) == ["00001.png"]
        output.save(IMAGE, wanted[1])
    assert said == [f"1 of the images in {folder} are damaged; made again"]
    assert (folder / "00001.png").read_bytes() == content
    assert lines(folder) == wanted


@given(order=st.permutations(range(5)), stops=st.lists(st.integers(0, 5), max_size=3))
def test_the_order_of_records_does_not_depend_on_interruptions(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], stops: list[int]
):
    folder = tmp_path_factory.mktemp("order")
    model = Model.of(folder, "float32")
    wanted = [describe(request, SETTINGS, model) for request in requests(5)]
    for stop in [*stops, 5]:
        output = OutputFolder(folder / "out")
        with output:
            todo = output.missing(wanted)
            for metadata in [wanted[i] for i in order if wanted[i]["file"] in todo][:stop]:
                output.save(IMAGE, metadata)
    assert lines(folder / "out") == wanted


def test_order_after_a_kill(tmp_path: Path, model: Model):
    wanted = [describe(request, SETTINGS, model) for request in requests(3)]
    output = OutputFolder(tmp_path / "out")
    output.__enter__()
    output.missing(wanted)
    for i in (2, 0):
        output.save(IMAGE, wanted[i])
    output._held.close()  # the process is gone: its lock is released, and nothing is written any more
    with OutputFolder(tmp_path / "out") as again:
        assert again.missing(wanted) == ["00001.png"]
        again.save(IMAGE, wanted[1])
    assert lines(tmp_path / "out") == wanted


@pytest.mark.parametrize("file", ["../a.png", "/a.png", "b/../../a.png", "", ".."])
def test_files_that_leave_the_folder(tmp_path: Path, model: Model, file: str):
    metadata = describe(dataclasses.replace(REQUEST, file=file), SETTINGS, model)
    good = describe(REQUEST, SETTINGS, model)
    with OutputFolder(tmp_path / "out") as output:
        with pytest.raises(DeepGenError, match=r"would leave .*; use a name inside the folder"):
            output.missing([metadata])
        output.missing([good])
        output.save(IMAGE, good)
    with (tmp_path / "out" / METADATA_FILE).open("a") as records:
        records.write(json.dumps(metadata) + "\n")
    with notices() as said, OutputFolder(tmp_path / "out") as output:
        assert output.missing([good]) == []
    assert len(said) == 1
    assert "is outside the folder; the line is dropped" in said[0]
    assert lines(tmp_path / "out") == [good]


@pytest.mark.parametrize("length", [244, 250, 255, 256, 300])
def test_long_names(tmp_path: Path, model: Model, length: int):
    metadata = describe(dataclasses.replace(REQUEST, file="n" * (length - 4) + ".png"), SETTINGS, model)
    with OutputFolder(tmp_path / "out") as output:
        if length > 255:
            with pytest.raises(DeepGenError, match=f"has {length} bytes; use at most 255"):
                output.missing([metadata])
            return
        assert output.missing([metadata]) == [metadata["file"]]
        output.save(IMAGE, metadata)
        assert output.missing([metadata]) == []


def test_damaged_metadata_inside_an_image(tmp_path: Path):
    save_image(IMAGE, tmp_path / "a.png", {"fingerprint": "f", "prompt": "x" * 200})
    content = (tmp_path / "a.png").read_bytes()
    for at in range(0, 200, 7):
        (tmp_path / "b.png").write_bytes(content[:at] + b"\xff\xff" + content[at + 2 :])
        read_metadata(tmp_path / "b.png")
