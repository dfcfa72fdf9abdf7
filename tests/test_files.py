"""Atomic writes, checks of inputs, free space, and locks that a killed process gives back."""

import errno
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepgen_jax import files, locks, strict_json
from deepgen_jax.errors import DeepGenError, is_out_of_memory

_HOLD = """
import sys, time
from pathlib import Path
from deepgen_jax import locks
with locks.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def _holder(folder):
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@given(before=st.none() | st.binary(max_size=20), content=st.binary(max_size=20), fails=st.booleans())
def test_a_file_is_replaced_whole_or_kept(tmp_path_factory, before, content, fails):
    folder = tmp_path_factory.mktemp("files")
    path = folder / "file"
    if before is not None:
        path.write_bytes(before)
    try:
        with files.replacing(path) as partial:
            assert partial.parent == folder
            partial.write_bytes(content)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        content = before
    assert (path.read_bytes() if path.exists() else None) == content
    assert set(folder.iterdir()) <= {path}


@pytest.mark.parametrize("before", ["nothing", "file", "folder", "link to a folder", "broken link"])
def test_a_folder_takes_any_place(tmp_path, before):
    path = tmp_path / "out"
    target = tmp_path / "target"
    if before == "file":
        path.write_text("old")
    elif before == "folder":
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "old").write_text("old")
    elif before == "link to a folder":
        target.mkdir()
        (target / "kept").write_text("kept")
        path.symlink_to(target)
    elif before == "broken link":
        path.symlink_to(tmp_path / "absent")
    with files.replacing(path) as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
    assert [(file.name, file.read_text()) for file in path.iterdir()] == [("new", "new")]
    assert not path.is_symlink()
    assert {entry.name for entry in tmp_path.iterdir()} <= {"out", "target"}
    if before == "link to a folder":
        assert (target / "kept").read_text() == "kept"


@pytest.mark.parametrize("before", [None, "folder", "empty folder", "file"])
def test_the_first_folder_can_stay(tmp_path, before):
    """Whoever comes second keeps what is there; what is no folder is an error."""
    path = tmp_path / "out"
    if before == "file":
        path.write_text("old")
    elif before:
        path.mkdir()
        if before == "folder":
            (path / "old").write_text("old")

    def write():
        with files.replacing(path, keep_existing=True) as partial:
            partial.mkdir()
            (partial / "new").write_text("new")

    if before == "file":
        with pytest.raises(DeepGenError, match=f"{path} cannot be written"):
            write()
        assert path.read_text() == "old"
    else:
        write()
        assert [entry.name for entry in path.iterdir()] == ["old" if before == "folder" else "new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_permissions(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("1")
    old.chmod(0o640)
    umask = os.umask(0o027)
    try:
        files.write_text(new, "2")
        files.write_text(old, "2")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(new.stat().st_mode) == 0o640  # 0o666 less the umask
    assert stat.S_IMODE(old.stat().st_mode) == 0o640


def test_a_name_of_the_longest_length(tmp_path):
    path = tmp_path / ("n" * 255)
    files.write_text(path, "text")
    with locks.locked_output(path):
        assert path.read_text() == "text"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_write_errors_name_the_file(tmp_path, number):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with files.replacing(path) as partial:
            partial.write_text("new")
            raise OSError(number, os.strerror(number), str(partial))

    with pytest.raises(DeepGenError, match=str(path)) as caught:
        write()
    assert ".deepgen-partial" not in str(caught.value)
    assert ("disk is full" in str(caught.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_space(tmp_path):
    files.require_space(tmp_path / "new" / "folder", 1000)
    with pytest.raises(DeepGenError, match=r"needs 1000000000\.0 GB.*GB free.*GB are lacking"):
        files.require_space(tmp_path / "new" / "folder", 10**18)


def test_disk_full_is_found_in_wrapped_errors():
    wrapped = ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [tensorstore]")
    outer = RuntimeError("saving failed")
    outer.__cause__ = wrapped
    assert files.is_disk_full(outer)
    assert not is_out_of_memory(outer)
    assert is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert not files.is_disk_full(MemoryError("RESOURCE_EXHAUSTED: out of memory"))


def test_only_regular_files_are_opened(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"\xef\xbb\xbftext")
    link.symlink_to(path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert files.read_bytes(link)[3:] == b"text"
    assert files.read_text(path) == "text"
    begun = time.monotonic()
    for bad, message in [
        (pipe, "is a pipe"),
        (tmp_path, "is a folder"),
        (tmp_path / "absent", "No such file"),
        ("/dev/zero", "is a device"),
        ("nul\0", "no file name"),
    ]:
        with pytest.raises(DeepGenError, match=message):
            files.check_regular(bad)
    assert time.monotonic() - begun < 5
    with pytest.raises(DeepGenError, match="7 bytes; at most 6"):
        files.read_bytes(path, 6)
    path.write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(DeepGenError, match="line 2: not UTF-8"):
        files.read_text(path)


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    folder = tmp_path / "run"
    process = _holder(folder)
    try:
        message = rf"{folder} is in use by process {process.pid} on .* since .*; stop it"
        with pytest.raises(DeepGenError, match=message), locks.locked(folder, "stop it"):
            pass
    finally:
        process.kill()
        process.wait()
    with locks.locked(folder):
        assert (folder / files.LOCK_FILE).exists()
    assert not list(folder.iterdir())


def test_a_lock_holds_between_threads(tmp_path):
    refused = []

    def other():
        try:
            with locks.locked(tmp_path):
                pass
        except DeepGenError as error:
            refused.append(str(error))

    with locks.locked(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert f"process {os.getpid()} " in refused[0]
    other()
    assert len(refused) == 1


def test_forked_children_do_not_keep_a_lock(tmp_path):
    script = textwrap.dedent(
        """
        import multiprocessing, os, sys, time
        from pathlib import Path
        from deepgen_jax import files, locks
        def work():
            print(os.getpid(), flush=True)
            time.sleep(60)
        with locks.locked(Path(sys.argv[1])):
            multiprocessing.get_context("fork").Process(target=work).start()
            time.sleep(60)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)  # lives
        with locks.locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def _count(folder, counter):
    for _ in range(20):
        with locks.locked(folder, wait=True):
            value = int(counter.read_text())
            time.sleep(0.001)
            counter.write_text(str(value + 1))


def test_waiting_writers_take_turns(tmp_path):
    folder, counter = tmp_path / "folder", tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_count, args=(folder, counter)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counter.read_text() == "60"


def test_a_damaged_lock_file_does_not_matter(tmp_path):
    (tmp_path / files.LOCK_FILE).write_bytes(b"\xff\0{")
    with locks.locked(tmp_path), pytest.raises(DeepGenError, match="in use by process"), locks.locked(tmp_path):
        pass


def test_partials_of_killed_processes_are_removed(tmp_path):
    (tmp_path / f"{files.PARTIAL_PREFIX}1-ab").mkdir()
    (tmp_path / f"{files.PARTIAL_PREFIX}2-cd").write_text("half")
    (tmp_path / "kept").write_text("")
    files.remove_partials(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


@settings(max_examples=200)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    )
)  # fmt: skip
def test_json_is_read_back(value: object) -> None:
    assert strict_json.parse_json(json.dumps(value), "x.json") == value
    assert strict_json.parse_json(json.dumps(value, ensure_ascii=False), "x.json") == value


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1,]", "NaN", "-Infinity", "1e400", "9" * 500, '{"a": 1, "a": 2}', '"\\ud800"', '{"\\udfff": 1}',
     "[" * 100_000, '{"a":' * 100_000],
)  # fmt: skip
def test_invalid_json_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DeepGenError, match=r"x\.json cannot be read \(.*\); write it again") as caught:
        strict_json.read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_large_json_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[" + "1," * 1000 + "1]")
    with pytest.raises(DeepGenError, match=r"at most 1\.0 kB can be read"):
        strict_json.read_json(tmp_path / "x.json", max_bytes=1000)
