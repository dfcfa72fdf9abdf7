"""The ``deepgen`` command: finds the subcommand, parses its options with tyro, and turns errors into one line."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepgen_jax import __version__
from deepgen_jax.cli.commands import COMMANDS, Group, Subcommand
from deepgen_jax.cli.stopping import Terminated, raise_for
from deepgen_jax.errors import DeepGenError, did_you_mean, is_out_of_memory
from deepgen_jax.local_paths import refuse_urls
from deepgen_jax.parallel.chips import GPU_MEMORY_FRACTION
from deepgen_jax.stores.checksums import unverified
from deepgen_jax.user_warnings import collect_warnings

#: Longest error message; --debug shows all of it.
_MOST_LETTERS = 800


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``deepgen`` with the given words (by default those of the command line).

    Returns:
      exit status: 0; 1 where some prompts of many failed; 2 for an error, one line on stderr; 130 and 143 after
      Ctrl-C and SIGTERM.
    """
    # Before JAX starts: it leaves a quarter of a GPU unused otherwise. Both names at once it refuses.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_MEMORY_FRACTION))
    for stream in (sys.stdout, sys.stderr):
        # File names and prompts may have letters that the terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.unraisablehook = _hook_without_closed_loops
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    verify = unverified() if "--no-verify" in words else contextlib.nullcontext()
    words = [word for word in words if word not in ("--debug", "--no-verify")]
    try:
        with verify, collect_warnings(lambda text: _say(f"note: {text}")), _sigterm_raises():
            status = _dispatch(words)
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        _say("stopped by Ctrl-C")
        return _stopped(128 + signal.SIGINT, alone=argv is None)
    except Terminated:
        _say("stopped by SIGTERM")
        return _stopped(128 + signal.SIGTERM, alone=argv is None)
    except BrokenPipeError:
        # The reader (`| head`) has gone; what is still buffered must not raise again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except DeepGenError as error:
        return _failed(error, str(error), debug)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _failed(error, f"{place}{error.strerror or error}; --debug shows where", debug)
    except Exception as error:  # anything else is a fault of the program, reported in one line as well
        if is_out_of_memory(error):
            return _failed(error, "out of memory; use a smaller batch, size or model, or --mesh", debug)
        text = " ".join(str(error).split())[:500]
        return _failed(error, f"{type(error).__name__}: {text} (a bug? --debug shows the traceback)", debug)


def _hook_without_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
    """The usual hook, but for threads of TensorStore that report to an event loop that a failed read has closed."""
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and "Event loop is closed" in str(error)):
        sys.__unraisablehook__(unraisable)


def _stopped(status: int, alone: bool) -> int:
    """``status``, which a process that is ``alone`` also ends with.

    Where JAX was interrupted while it compiled, the interpreter's usual end is a segmentation fault.
    """
    if alone and "jax" in sys.modules:
        # What is registered last comes first, before JAX takes itself down.
        atexit.register(os._exit, status)
        atexit.register(sys.stderr.flush)
        atexit.register(sys.stdout.flush)
    return status


def _failed(error: Exception, message: str, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    elif len(message) > _MOST_LETTERS:
        # What was given is part of the message, however long it is; the fix is at its end.
        message = f"{message[: _MOST_LETTERS // 2]} ... {message[-_MOST_LETTERS // 2 :]}"
    _say(f"error: {message}")
    return 2


def _dispatch(words: list[str]) -> int:
    if words and words[0] in ("-V", "--version"):
        print(f"deepgen-jax {__version__}")
        return 0
    name, rest = "", words
    commands: Mapping[str, Subcommand | Group] = COMMANDS
    other: Subcommand | None = None
    placeholder = ""
    title = "DeepGen 1.0 in JAX: makes and edits images with one model."
    while True:
        if not rest or rest[0] in ("-h", "--help", "help"):
            print(_overview(title, name, {**commands, placeholder: other} if other else commands))
            return 0
        entry = commands.get(rest[0])
        if entry is None and other is not None:
            entry = other
            break
        if entry is None:
            raise DeepGenError(f"unknown command {f'{name} {rest[0]}'.strip()!r}{did_you_mean(rest[0], commands)}")
        name, rest = f"{name} {rest[0]}".strip(), rest[1:]
        if isinstance(entry, Subcommand):
            break
        title, commands = f"{entry.summary[0].upper()}{entry.summary[1:]}.", entry.commands
        other, placeholder = entry.other, entry.placeholder
    command_type = getattr(importlib.import_module(entry.module), entry.name)
    command = _parse(command_type, name, entry, rest)
    return 0 if command is None else command.run()


def _parse(command_type: type, name: str, entry: Subcommand, words: list[str]) -> Any:
    """The command's dataclass filled from ``words``; None after --help."""
    import tyro

    summary = f"{entry.summary[0].upper()}{entry.summary[1:]}."
    examples = "\n".join(f"  {example}".replace("\n", "\n  ") for example in entry.examples)
    printed, said = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            command: Any = tyro.cli(
                command_type,
                prog=f"deepgen {name}",
                args=words,
                description=f"{summary}\n\nExamples:\n{examples}",
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as end:
        if not end.code:
            print(printed.getvalue() if _has_colors() else _plain(printed.getvalue()), end="")
            return None
        message, hint = one_line(said.getvalue()), _hint(words)
        if hint:
            message = f"{message.partition('; put ')[0]}; {hint}"
        raise DeepGenError(f"{message}; see deepgen {name} --help") from None
    refuse_urls(command, lambda field: f"--{field.replace('_', '-')}")
    return command


def _has_colors() -> bool:
    """Whether help may have colours: on a terminal, unless NO_COLOR (no-color.org) is set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _hint(words: Sequence[str]) -> str:
    """Advice on words that were parsed as options because they begin with "-"."""
    if "--" in words:
        behind = words[words.index("--") + 1 :]
        return "put options before --" if any(word.startswith("--") for word in behind) else ""
    if any(word.startswith("-") and not re.fullmatch(r"--?[\w-]*(=.*)?|-\d.*", word, re.DOTALL) for word in words):
        return "put a text that begins with - last, after --"
    return ""


def one_line(box: str) -> str:
    """tyro's framed error message as one line: the problem, and the option that was perhaps meant."""
    text = _plain(box)
    lines = [line.strip("│").rstrip() for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    sections: list[list[str]] = [[]]
    for line in filter(None, lines):
        if set(line.strip()) <= set("─-"):
            sections.append([])
        else:
            sections[-1].append(line)
    if "╭" not in text:
        # A terminal without such characters: the title is not in the frame but a separate section.
        del sections[:1]
    problem = sections[0] if sections else []
    if problem and problem[0].strip().startswith("Missing from"):
        # An indented name each, with its help text further in.
        indent = len(problem[0]) - len(problem[0].lstrip()) + 4
        names = [line.split()[0].split("/")[0] for line in problem if re.match(rf" {{{indent}}}\S", line)]
        message = f"{' and '.join(names)} missing"
    else:
        message = " ".join(" ".join(problem).split()).rstrip(".")
        if wrong := re.match(r"Error parsing (\S+?):.*?\['(.*?)'\]", message):
            message = f"{wrong[1]} cannot be {wrong[2]!r}"
        label, _, tokens = message.partition(": ")
        if label == "Unrecognized options" and not tokens.startswith("-"):
            setting = "=" in tokens.split(",")[0]
            fix = "put settings before the options" if setting else "put a text of several words in quotes"
            message += f"; {fix}"
    for section in sections[1:]:
        if section and section[0].strip() == "Perhaps you meant:" and len(section) > 1:
            message += f"; did you mean {section[1].split()[0].rstrip(',')}?"
    return message or "the options are not understood"


def _overview(title: str, group: str, commands: Mapping[str, Subcommand | Group]) -> str:
    """All commands, or those of one group, with a line about each and examples."""
    width = min(shutil.get_terminal_size().columns, 100)
    prefix = f"deepgen {group}".strip()
    usage = f"usage: {prefix} COMMAND [OPTIONS]      ({prefix} COMMAND --help lists the options)"
    # A group's help looks like that of its commands.
    lines = [usage, "", title] if group else [title, "", usage]
    for name, entry in commands.items():
        lines.append("")
        lines += textwrap.wrap(f"{name:<10} {entry.summary}", width, initial_indent="  ", subsequent_indent=" " * 13)
        lines += [f"      {example}".replace("\n", "\n      ") for example in entry.examples]
    if not group:
        lines += [
            "",
            "  --version   the package's version",
            "  --debug     with any command: the whole traceback of an error",
            "  --no-verify with any command: load weights without a check of their checksums",
        ]
    return "\n".join(lines)


def _say(text: str) -> None:
    """One line on stderr, above a progress bar if there is one."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(f"deepgen: {text}", file=sys.stderr)
    else:
        print(f"deepgen: {text}", file=sys.stderr)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    usual = signal.signal(signal.SIGTERM, lambda signum, frame: raise_for(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


if __name__ == "__main__":
    sys.exit(main())
