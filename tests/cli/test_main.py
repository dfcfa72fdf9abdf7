"""The command's frame: help, errors in one line, light imports."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from deepgen_jax import __version__
from deepgen_jax.cli import main as cli
from deepgen_jax.cli.main import COMMANDS, main, one_line
from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.model_folder import locate
from deepgen_jax.user_warnings import warn_user


class Command:
    """A subcommand that does what the test says."""

    action = staticmethod(lambda: 0)

    def run(self) -> int:
        return type(self).action()


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch):
    """``act(function)`` -> exit status of a command that calls the function."""

    def run(action, *words: str) -> int:
        monkeypatch.setattr(Command, "action", staticmethod(action))
        monkeypatch.setattr(cli, "_parse", lambda *args: Command())
        return main(["info", *words])

    return run


def test_overview_teaches_every_command(capsys: pytest.CaptureFixture):
    assert main(["--help"]) == 0
    first = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == first
    for name in COMMANDS:
        assert f"      deepgen {name} " in first
    assert max(map(len, first.splitlines())) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture):
    assert main([name, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: deepgen {name}")
    assert COMMANDS[name].examples[0].splitlines()[0] in captured.out
    assert not captured.err


def test_version(capsys: pytest.CaptureFixture):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"deepgen-jax {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["genrate"], "unknown command 'genrate'; did you mean generate? known: "),
        (["zzz"], f"unknown command 'zzz'; known: {', '.join(COMMANDS)}"),
        (["info"], "FOLDER missing; see deepgen info --help"),
        (["generate", "m", "a fox", "--stps", "4"], "Unrecognized options: --stps, 4; did you mean --steps?"),
        (["generate", "m", "a", "red", "fox"], "Unrecognized options: red, fox; put a text of several words in quotes"),
        (["generate", "m", "x", "--dtype", "int8"], "invalid choice 'int8' for argument '--dtype'"),
        (["generate", "m", "x", "--seed", "many"], "Error parsing --seed: invalid literal for int()"),
    ],
)
def test_wrong_words_are_told_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"deepgen: error: {message}")
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_one_line_survives_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["generate", "m", "x", "--dtype", "int8"]) == 2
    assert "Expected one of ('auto', 'float32', 'bfloat16')" in capsys.readouterr().err
    box = """
╭─ Required options ─────────────╮
│ Missing from deepgen convert:  │
│     --out PATH                 │
│         Model folder to write. │
│         (required)             │
│     --qwen/-q PATH             │
│         Base model.            │
│ ────────────────────────────── │
│ For full helptext, run:        │
╰────────────────────────────────╯"""
    assert one_line(box) == "--out and --qwen missing"
    assert one_line("") == "the options are not understood"


def test_errors(act, capsys: pytest.CaptureFixture):
    def wrong() -> int:
        raise DeepGenError("the thing is wrong; fix it")

    assert act(wrong) == 2
    assert capsys.readouterr().err == "deepgen: error: the thing is wrong; fix it\n"
    assert act(wrong, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_bugs(act, capsys: pytest.CaptureFixture):
    assert act(lambda: 1 // 0) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("deepgen: error: ZeroDivisionError: ")
    assert "--debug" in captured
    assert captured.count("\n") == 1


def test_notices_are_told_once(act, capsys: pytest.CaptureFixture):
    def told() -> int:
        for text in ("one", "two", "one"):
            warn_user(text)
        warnings.warn("not ours", UserWarning, stacklevel=1)
        return 0

    with pytest.warns(UserWarning, match="not ours"):
        assert act(told) == 0
    assert capsys.readouterr().err == "deepgen: note: one\ndeepgen: note: two\n"


def test_interruptions(act, capsys: pytest.CaptureFixture):
    def interrupted() -> int:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    assert act(interrupted) == 130
    assert capsys.readouterr().err == "deepgen: stopped by Ctrl-C\n"
    assert act(lambda: os.kill(os.getpid(), signal.SIGTERM) or 0) == 143
    assert capsys.readouterr().err == "deepgen: stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_reader_that_goes_away_is_no_error():
    script = f"{sys.executable} -m deepgen_jax.cli.main --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("DeepGen 1.0")
    assert done.stdout.splitlines()[1] in ("0", "141")
    assert not done.stderr


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["edit", "--help"], ["info", "nowhere"]])
def test_light_imports(words: list[str]):
    script = (
        "import sys; from deepgen_jax.cli.main import main; main(sys.argv[1:])\n"
        "heavy = {'jax', 'torch', 'transformers', 'flax', 'orbax'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_output_in_a_terminal_of_few_letters():
    script = "from deepgen_jax.cli import main as cli\ncli._dispatch = lambda words: print('caf\\u00e9 \\udcff') or 0\n"
    script += "import sys; sys.exit(cli.main(['x']))"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9 \\udcff\n", "")


def test_completion_in_bash():
    words = [sys.executable, "-m", "deepgen_jax.cli.main", "completion", "bash"]
    script = subprocess.run(words, capture_output=True, text=True, check=True).stdout

    def complete(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in words)
        run = f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _deepgen; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True).stdout.split()

    assert complete("deepgen", "gen") == ["generate"]
    assert set(complete("deepgen", "")) >= set(COMMANDS)
    assert complete("deepgen", "generate", "--st") == ["--strict-size", "--steps"]
    assert complete("deepgen", "edit", "make it blue", "--im") == ["--image"]
    assert "world" in complete("deepgen", "data", "")
    assert complete("deepgen", "data", "world", "--ou") == ["--out"]
    assert complete("deepgen", "export", "--max-sh") == ["--max-shard-size"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_in_other_shells(shell: str, capsys: pytest.CaptureFixture):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "strict-size" in script
    assert main(["completion", "tcsh"]) == 2


def test_no_line_of_the_overview_is_cut(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for entry in COMMANDS.values():
        assert " ".join(entry.summary.split()) in text


def test_help_without_colours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["generate", "--help"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_errors_of_the_system_are_one_line(act, capsys: pytest.CaptureFixture):
    def full() -> int:
        raise OSError(28, "No space left on device", "/data/run")

    assert act(full) == 2
    assert capsys.readouterr().err == "deepgen: error: /data/run: No space left on device; --debug shows where\n"

    def large() -> int:
        raise RuntimeError("RESOURCE_EXHAUSTED: 8 GB")

    assert act(large) == 2
    assert "out of memory" in capsys.readouterr().err


def test_what_the_package_lists():
    import deepgen_jax

    names = dir(deepgen_jax)
    assert {"DeepGenPipeline", "DeepGenError", "flow", "rl", "rewards", "evaluation", "__version__"} <= set(names)
    for name in names:
        getattr(deepgen_jax, name)


def test_long_words_are_cut_in_errors(capsys: pytest.CaptureFixture):
    assert main(["generate", "a", "b", "x" * 5000]) == 2
    message = capsys.readouterr().err
    assert len(message) < 900
    assert message.startswith("deepgen: error: Unrecognized options: xxx")
    assert message.endswith("put a text of several words in quotes; see deepgen generate --help\n")


def test_a_damaged_store_gives_one_line(tmp_path: Path):
    """Threads of TensorStore that report late, to an event loop that is closed, print nothing."""
    model = tmp_path / "model"
    shutil.copytree(locate("nano"), model)
    stored = [path for path in (model / "params").rglob("*") if path.is_file()]
    largest = max(stored, key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:2000] + random.Random(0).randbytes(len(content) - 2000))
    words = ["export", str(model), "--format", "diffusers", "--out", str(tmp_path / "release"), "--no-verify"]
    code = f"import sys, time; from deepgen_jax.cli.main import main; s = main({words!r}); time.sleep(1); sys.exit(s)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"deepgen: error: .*model/params is damaged .*\n", done.stderr)
    assert not (tmp_path / "release").exists()
