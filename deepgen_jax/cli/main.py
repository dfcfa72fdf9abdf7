"""The ``deepgen`` command: finds the subcommand, parses its options with tyro, and turns errors into one line."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import importlib
import io
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepgen_jax import __version__
from deepgen_jax.cli.stopping import Terminated, raise_for
from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import refuse_urls
from deepgen_jax.parallel.chips import GPU_MEMORY_FRACTION
from deepgen_jax.user_warnings import collect_warnings


@dataclass(frozen=True)
class Subcommand:
    """Where a subcommand's dataclass lives; it is imported only when it is chosen, and has ``run() -> int``."""

    module: str
    name: str
    summary: str
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """A subcommand with subcommands.

    Attributes:
      commands: by name.
      other: takes every other word, which is its first argument; ``placeholder`` stands for the word in help.
    """

    summary: str
    commands: dict[str, Subcommand]
    other: Subcommand | None = None
    placeholder: str = ""

    @property
    def examples(self) -> tuple[str, ...]:
        """The first example of each of its subcommands."""
        return tuple(entry.examples[0] for entry in self.commands.values())


COMMANDS: dict[str, Subcommand | Group] = {
    "convert": Subcommand(
        "deepgen_jax.cli.convert",
        "ConvertCommand",
        "turn released weights, in any of their layouts, into a model folder",
        (
            "deepgen convert --diffusers DeepGen-1.0-diffusers --out deepgen",
            "deepgen convert --qwen Qwen2.5-VL-3B-Instruct --sd3 UniPic2-SD3.5M-Kontext-2B \\\n"
            "    --checkpoint DeepGen_CKPT.zip.part-aa --out deepgen",
        ),
    ),
    "generate": Subcommand(
        "deepgen_jax.cli.generate",
        "GenerateCommand",
        "make images from text",
        (
            'deepgen generate deepgen "a red fox in fresh snow" --out fox.png',
            "deepgen generate deepgen --prompts prompts.jsonl --out images --batch-size 8",
        ),
    ),
    "edit": Subcommand(
        "deepgen_jax.cli.edit",
        "EditCommand",
        "change reference images by an instruction",
        (
            'deepgen edit deepgen "make it night" --image fox.png --out night.png',
            'deepgen edit deepgen "the fox beside this house" --image fox.png --image house.jpg',
        ),
    ),
    "train": Subcommand(
        "deepgen_jax.cli.train",
        "TrainCommand",
        "train a stage: alignment pre-training or joint fine-tuning, resumable at any step",
        (
            "deepgen train pretrain model=deepgen out=runs/pretrain data.sources.pairs.path=pairs.json",
            "deepgen train configs/tiny_pretrain.py steps=20",
        ),
    ),
    "compile": Subcommand(
        "deepgen_jax.cli.compile",
        "CompileCommand",
        "tell memory and estimated speed of a run on a TPU pod or GPU cluster, without one",
        (
            "deepgen compile sft --topology v6e:8x8",
            "deepgen compile grpo --topology h100:64 --program rollout --json report.json",
        ),
    ),
    "data": Group(
        "look at training data, or prepare them",
        {
            "inspect": Subcommand(
                "deepgen_jax.cli.data",
                "InspectCommand",
                "tell what a configuration reads: counts, sizes, speed, pictures",
                (
                    "deepgen data inspect sft model=deepgen data.sources.pairs.path=/data/pairs.json",
                    "deepgen data inspect configs/mine.py --contact-sheet look.png --seconds 20",
                ),
            ),
            "cache": Subcommand(
                "deepgen_jax.cli.data",
                "CacheCommand",
                "run the frozen encoders over all samples once, ahead of training",
                ("deepgen data cache configs/mine.py --out /data/features --batch-size 32",),
            ),
            "example": Subcommand(
                "deepgen_jax.cli.data",
                "ExampleCommand",
                "write a tiny data set of coloured shapes, to try training with",
                ("deepgen data example --out shapes",),
            ),
            "world": Subcommand(
                "deepgen_jax.cli.data",
                "WorldCommand",
                "write prompts of the procedural world with their ground truth, for reinforcement learning",
                ("deepgen data world --out prompts.jsonl --prompts 2000",),
            ),
        },
    ),
    "nano": Group(
        "the small model of the same architecture that comes with the package: train it again",
        {
            "init": Subcommand(
                "deepgen_jax.cli.nano",
                "InitCommand",
                "write its model folder with random weights, for configs/nano to train",
                ("deepgen nano init --out out/nano/model",),
            ),
            "words": Subcommand(
                "deepgen_jax.cli.nano",
                "WordsCommand",
                "list the words of its training texts",
                ("deepgen nano words --out out/nano/model/known_words.txt",),
            ),
            "report": Subcommand(
                "deepgen_jax.cli.nano",
                "ReportCommand",
                "write how it was trained, its curves and its scores into docs/experiments/nano.md",
                ("deepgen nano report --runs out/nano --scores trained=out/nano/scores.json",),
            ),
        },
    ),
    "eval": Group(
        "measure how good a model is",
        {
            "list": Subcommand(
                "deepgen_jax.cli.eval", "ListCommand", "list the benchmarks and their inputs", ("deepgen eval list",)
            ),
            "score": Subcommand(
                "deepgen_jax.cli.eval",
                "ScoreCommand",
                "score the images of a run, with 95% intervals",
                (
                    "deepgen eval score runs/wise --judge http://localhost:8000 --judge-model Qwen3-VL-32B",
                    "deepgen eval score runs/geneval --results geneval.jsonl",
                ),
            ),
            "nano": Subcommand(
                "deepgen_jax.cli.eval_nano",
                "NanoCommand",
                "show how often held-out prompts of the procedural world come out right, by skill",
                ("deepgen eval nano nano-model --prompts 200", "deepgen eval nano --renders right"),
            ),
        },
        Subcommand(
            "deepgen_jax.cli.eval",
            "EvalCommand",
            "make the images of a benchmark, laid out for its official scorer",
            (
                "deepgen eval geneval deepgen --data evaluation_metadata.jsonl --out runs/geneval",
                "deepgen eval geneval nano --limit 8",
            ),
        ),
        "BENCHMARK",
    ),
    "report": Subcommand(
        "deepgen_jax.cli.report",
        "ReportCommand",
        "write the scores of benchmark runs beside published ones, on one page",
        ("deepgen report runs/geneval runs/wise --out report", "deepgen report runs/sft-wise runs/rl-wise"),
    ),
    "explain": Subcommand(
        "deepgen_jax.cli.explain",
        "ExplainCommand",
        "show which words and think tokens act where, and which layers matter",
        (
            'deepgen explain "a large red circle left of a small blue square" --world 64',
            'deepgen explain deepgen "make it night" --image fox.png --steps 20 --out night.html',
        ),
    ),
    "info": Subcommand(
        "deepgen_jax.cli.info",
        "InfoCommand",
        "tell what a model folder or a training run holds",
        ("deepgen info deepgen", "deepgen info runs/sft --json"),
    ),
    "export": Subcommand(
        "deepgen_jax.cli.export",
        "ExportCommand",
        "write a training run or a model folder in another form",
        (
            "deepgen export runs/sft --format model --out deepgen-sft",
            "deepgen export deepgen --format diffusers --out DeepGen-diffusers",
        ),
    ),
    "reward-server": Subcommand(
        "deepgen_jax.cli.reward_server",
        "RewardServerCommand",
        "score images for training runs on other machines",
        ("deepgen reward-server --rewards ocr,jpeg --host 0.0.0.0 --port 8100",),
    ),
    "serve": Subcommand(
        "deepgen_jax.cli.serve",
        "ServeCommand",
        "answer OpenAI's image requests over HTTP",
        (
            "deepgen serve --port 8000 --warm",
            "deepgen serve deepgen --host 0.0.0.0 --api-keys keys.txt --max-batch 8",
        ),
    ),
    "demo": Subcommand(
        "deepgen_jax.cli.demo",
        "DemoCommand",
        "open a web page to generate and edit images",
        ("deepgen demo", "deepgen demo deepgen --port 7861", "deepgen demo --server http://127.0.0.1:8000"),
    ),
    "doctor": Subcommand(
        "deepgen_jax.cli.doctor",
        "DoctorCommand",
        "report devices, versions, caches, memory and what is missing",
        ("deepgen doctor", "deepgen doctor --json --server http://127.0.0.1:8000 --storage gs://bucket/data"),
    ),
    "plot": Subcommand(
        "deepgen_jax.cli.plot",
        "PlotCommand",
        "draw the curves of training runs",
        ("deepgen plot runs/pretrain", "deepgen plot runs/a runs/b --metrics loss,grad_norm --out compared.png"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``deepgen`` with the given words (by default those of the command line).

    Returns:
      exit status: 0; 1 where some prompts of many failed; 2 for an error, told in one line on stderr; 130 and 143 after
      Ctrl-C and SIGTERM.
    """
    # Before JAX starts: it leaves a quarter of a GPU unused otherwise. Both names at once it refuses.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_MEMORY_FRACTION))
    for stream in (sys.stdout, sys.stderr):
        # File names and prompts may have letters that the terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        with collect_warnings(lambda text: _say(f"note: {text}")), _sigterm_raises():
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
    except Exception as error:
        text = " ".join(str(error).split())[:500]
        return _failed(error, f"{type(error).__name__}: {text} (a bug? --debug shows the traceback)", debug)


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
            close = difflib.get_close_matches(rest[0], commands, n=1)
            mend = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(commands)}"
            raise DeepGenError(f"unknown command {f'{name} {rest[0]}'.strip()!r}; {mend}")
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
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command: Any = tyro.cli(
                command_type,
                prog=f"deepgen {name}",
                args=words,
                description=f"{summary}\n\nExamples:\n{examples}",
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as end:
        if not end.code:
            return None
        raise DeepGenError(f"{one_line(said.getvalue())}; see deepgen {name} --help") from None
    refuse_urls(command, lambda field: f"--{field.replace('_', '-')}")
    return command


def one_line(box: str) -> str:
    """tyro's framed error message as one line: the problem, and the option that was perhaps meant."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│").rstrip() for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    sections: list[list[str]] = [[]]
    for line in filter(None, lines):
        if set(line.strip()) <= set("─-"):
            sections.append([])
        else:
            sections[-1].append(line)
    if "╭" not in text:
        # A terminal without such characters: the title is not in the frame but a section of its own.
        del sections[:1]
    problem = sections[0] if sections else []
    if problem and problem[0].strip().startswith("Missing from"):
        # An indented name each, with its help text further in.
        indent = len(problem[0]) - len(problem[0].lstrip()) + 4
        names = [line.split()[0].split("/")[0] for line in problem if re.match(rf" {{{indent}}}\S", line)]
        message = f"{' and '.join(names)} missing"
    else:
        message = " ".join(" ".join(problem).split()).rstrip(".")
        label, _, tokens = message.partition(": ")
        if label == "Unrecognized options" and not tokens.startswith("-"):
            setting = "=" in tokens.split(",")[0]
            message += "; put settings before the options" if setting else "; put a text of several words in quotes"
    for section in sections[1:]:
        if section and section[0].strip() == "Perhaps you meant:" and len(section) > 1:
            message += f"; did you mean {section[1].split()[0].rstrip(',')}?"
    return message or "the options are not understood"


def _overview(title: str, group: str, commands: Mapping[str, Subcommand | Group]) -> str:
    """What there is to say of all commands, or of those of one group."""
    width = min(shutil.get_terminal_size().columns, 100)
    prefix = f"deepgen {group}".strip()
    usage = f"usage: {prefix} COMMAND [OPTIONS]      ({prefix} COMMAND --help tells them all)"
    # A group's help looks like that of its commands.
    lines = [usage, "", title] if group else [title, "", usage]
    for name, entry in commands.items():
        lines += ["", f"  {name:<9} {entry.summary}"[:width]]
        lines += [f"      {example}".replace("\n", "\n      ") for example in entry.examples]
    if not group:
        lines += [
            "",
            "  --version   the package's version",
            "  --debug     with any command: the whole traceback of an error",
        ]
    return "\n".join(lines)


def _say(text: str) -> None:
    """One line on stderr, above a progress bar where there is one."""
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
