"""Which files a path means: hidden names, links, ranges, pipes."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.file_listing import BROKEN_LINK, HIDDEN_NAME, SECOND_LINK, list_files
from deepgen_jax.data.sources import open_source
from deepgen_jax.data.storage import open_file, read
from deepgen_jax.errors import DeepGenError


def listed(path: Path | str) -> tuple[list[str], dict[str, int]]:
    counts: Counter[str] = Counter()
    found = list_files(str(path), (".png",), "source s", counts)
    return [file.path for file in found], {reason: count for reason, count in counts.items() if count}


def touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return str(path)


def test_hidden_names_are_passed_over_and_counted(tmp_path: Path):
    good = [touch(tmp_path / "a.png"), touch(tmp_path / "sub" / "b.png")]
    for name in (".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/._a.png", "._a.png", ".hidden.png", "sub/._b.png"):
        touch(tmp_path / name)
    touch(tmp_path / ".DS_Store")
    assert listed(tmp_path) == (good, {HIDDEN_NAME: 5})
    source = open_source(SourceConfig("s", "image_folder", str(tmp_path)))
    assert len(source.files()) == len(source.files()) == 2
    assert source.passed_over[HIDDEN_NAME] == 5
    # Who names them gets them.
    assert listed(tmp_path / ".ipynb_checkpoints")[0] == [str(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.png")]
    assert listed(tmp_path / "__MACOSX" / "._*.png")[0] == [str(tmp_path / "__MACOSX" / "._a.png")]
    assert listed(f"{tmp_path}/**/*.png")[0] == good


def test_hidden_names_in_a_store():
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("a.png", ".x/b.png", "__MACOSX/c.png", "d/._e.png", "d/e.png"):
        memory.pipe(f"/hidden/{name}", b"x")
    assert listed("memory://hidden") == (["memory:///hidden/a.png", "memory:///hidden/d/e.png"], {HIDDEN_NAME: 3})


def test_a_folder_is_read_once_however_many_links_lead_to_it(tmp_path: Path):
    good = [touch(tmp_path / "data" / "a.png"), touch(tmp_path / "data" / "sub" / "b.png")]
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "sub" / "up").symlink_to("..")
    (tmp_path / "data" / "1").symlink_to(tmp_path / "data" / "sub")
    (tmp_path / "data" / "gone.png").symlink_to("nowhere")
    (tmp_path / "data" / "itself.png").symlink_to("itself.png")
    expected = (good, {SECOND_LINK: 3, BROKEN_LINK: 2})
    assert listed(tmp_path / "data") == expected
    assert listed(f"{tmp_path}/data/**/*.png")[0] == good
    # A link to a folder elsewhere is followed, and so is one to a file.
    other = touch(tmp_path / "other" / "c.png")
    (tmp_path / "data" / "z").symlink_to(tmp_path / "other")
    (tmp_path / "data" / "link.png").symlink_to(other)
    assert listed(tmp_path / "data")[0] == [good[0], f"{tmp_path}/data/link.png", good[1], f"{tmp_path}/data/z/c.png"]


@given(st.data())
def test_any_maze_of_links_gives_each_file_once(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    root = tmp_path_factory.mktemp("maze")
    folders = [root]
    files = 0
    for number in range(data.draw(st.integers(0, 6))):
        parent = data.draw(st.sampled_from(folders))
        folders.append(parent / f"f{number}")
        folders[-1].mkdir()
        if data.draw(st.booleans()):
            touch(folders[-1] / "a.png")
            files += 1
    for number in range(data.draw(st.integers(0, 6))):
        (data.draw(st.sampled_from(folders)) / f"l{number}").symlink_to(data.draw(st.sampled_from(folders)))
    touch(root / "a.png")
    found, _ = listed(root)
    assert len(found) == files + 1
    assert not any("/l" in path[len(str(root)) :] for path in found)


def test_ranges_are_expanded_as_far_as_files_go(tmp_path: Path):
    touch(tmp_path / "s-00000000.png")
    start = time.monotonic()
    with pytest.raises(DeepGenError, match=r"s-00000001\.png is missing"):
        listed(tmp_path / "s-{00000000..99999999}.png")
    with pytest.raises(DeepGenError, match=r"s-1-0\.png is missing"):
        listed(tmp_path / "s-{1..999999999999}-{0..99999999}.png")
    assert time.monotonic() - start < 5
    with pytest.raises(DeepGenError, match=r"range \{3\.\.1\} is empty; write the smaller number first"):
        listed(tmp_path / "s-{3..1}.png")


def test_pipes_and_names_that_no_file_has(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    touch(tmp_path / "a.png")
    assert listed(tmp_path) == ([str(tmp_path / "a.png")], {"pipe or device": 1})
    with pytest.raises(DeepGenError, match=r"pipe\.png is a pipe or device"):
        listed(tmp_path / "pipe.png")
    for path in (str(tmp_path / "pipe.png"), "/dev/zero", str(tmp_path)):
        for call in (read, open_file):
            with pytest.raises(OSError, match=r"pipe|device|folder"):
                call(path)
    with pytest.raises(DeepGenError, match="holds a NUL character"):
        listed(f"{tmp_path}/a\0.png")
    for name in ("a\0b", "half \ud83d", "x" * 300):
        with pytest.raises(OSError):
            read(f"{tmp_path}/{name}")
    for length in (244, 250, 255):
        path = touch(tmp_path / "long" / ("n" * (length - 4) + ".png"))
        assert path in listed(tmp_path / "long")[0]


def test_parts_beyond_the_end_are_errors(tmp_path: Path):
    path = touch(tmp_path / "a.png")
    assert read(path, 0, 1) == b"x"
    for offset, size in ((0, 2), (1, 1), (5, 1), (0, 2**62)):
        with pytest.raises(OSError, match="ends before"):
            read(path, offset, size)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_folders_that_cannot_be_read_are_named(tmp_path: Path):
    touch(tmp_path / "shut" / "a.png")
    (tmp_path / "shut").chmod(0)
    try:
        with pytest.raises(DeepGenError, match=r"shut cannot be listed"):
            listed(tmp_path)
    finally:
        (tmp_path / "shut").chmod(0o700)
