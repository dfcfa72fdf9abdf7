"""Families of fuzzed commands, and what none of them may do."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import corpus

FIXTURES = Path(__file__).parents[1] / "fixtures"
#: Limits of time and memory per command (interpreter, JAX and PyTorch included).
SECONDS, MEMORY_MIB = 60.0, 2048.0
#: Commands that serve, or whose valid runs take minutes: only their refusals are fuzzed.
LONG = ("serve", "demo", "reward-server", "compile", "train", "eval", "nano", "explain", "quantize", "doctor")
_BAD = re.compile(r"a bug\?|Traceback \(most recent call last\)|^\S+Error: ", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Case:
    """A command and additional checks of its result.

    Attributes:
      argv: words after ``deepgen``.
      statuses: exit statuses that are right.
      check: called where the command succeeded; raises AssertionError where its result is wrong.
    """

    argv: list[str]
    statuses: tuple[int, ...] = (0, 1, 2)
    check: Callable[[], None] = lambda: None


class Worker:
    """The process that runs the commands; restarted if it dies."""

    def __init__(self, home: Path) -> None:
        self._home, self._process = home, None

    def run(self, argv: list[str], folder: Path) -> dict[str, Any]:
        if self._process is None:
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HOME": str(self._home), "COLUMNS": "100",
                           "TF_CPP_MIN_LOG_LEVEL": "3"}  # fmt: skip
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "worker.py")], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True, env=environment,
            )  # fmt: skip
        self._process.stdin.write(json.dumps({"argv": argv, "folder": str(folder)}) + "\n")
        self._process.stdin.flush()
        # The first command also waits for the imports.
        ready, _, _ = select.select([self._process.stdout], [], [], 2 * SECONDS)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._process.kill()
            status = self._process.wait() if not ready else self._process.wait(10)
            self._process = None
            return {"status": "no answer in time" if not ready else f"process ended: {status}", "stderr": "",
                    "stdout": "", "seconds": 2 * SECONDS, "peak_mib": 0.0}  # fmt: skip
        return json.loads(line)

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait(30)
            self._process = None


def verdict(case: Case, answer: dict[str, Any]) -> str | None:
    """The fault in an answer; None if there is none."""
    if answer["status"] not in case.statuses:
        return f"status {answer['status']!r}, expected one of {case.statuses}"
    if found := _BAD.search(answer["stderr"]):
        return f"stderr has {found[0]!r}"
    if answer["status"] == 2:
        errors = [line for line in answer["stderr"].splitlines() if line.startswith("deepgen: error: ")]
        if len(errors) != 1:
            return f"{len(errors)} lines of errors, expected one"
        if len(errors[0]) > 1500:
            return f"the error has {len(errors[0])} characters"
    if answer["seconds"] > SECONDS:
        return f"took {answer['seconds']:.0f} s"
    if answer["peak_mib"] > MEMORY_MIB:
        return f"took {answer['peak_mib']:.0f} MiB"
    if answer["status"] == 0:
        try:
            case.check()
        except AssertionError as error:
            return f"succeeded with a wrong result: {error}"
    return None


def _leaves() -> Iterator[tuple[list[str], Any]]:
    """(words, entry) of every subcommand."""
    from deepgen_jax.cli.main import COMMANDS

    for name, entry in COMMANDS.items():
        if hasattr(entry, "commands"):
            yield from (([name, inner], leaf) for inner, leaf in entry.commands.items())
        else:
            yield [name], entry


def options(rng: random.Random, folder: Path) -> Case:
    """Options of any command, with values of any type."""
    import importlib

    words, entry = rng.choice(list(_leaves()))
    fields = [field.name for field in dataclasses.fields(getattr(importlib.import_module(entry.module), entry.name))]
    argv = list(words)
    for name in rng.sample(fields, min(len(fields), rng.randrange(5))):
        argv += [f"--{name.replace('_', '-')}"] + ([corpus.word(rng)] if rng.random() < 0.8 else [])
    argv += [corpus.word(rng) for _ in range(rng.randrange(3))]
    if words[0] in LONG:
        return Case([*argv, "--no-such-option"], (2,))
    return Case(argv)


def images(rng: random.Random, folder: Path) -> Case:
    """Reference pictures of any kind."""
    argv = ["edit", "nano", "make it red", "--out", "o.png", "--steps", "1"]
    for _ in range(rng.choice((1, 1, 2))):
        name, data = corpus.image(rng)
        (folder / name).write_bytes(data)
        argv += ["--image", name]
    return Case(argv, check=lambda: _exists(folder / "o.png"))


def prompts(rng: random.Random, folder: Path) -> Case:
    """Prompt files of any format."""
    name, data = corpus.prompts(rng)
    (folder / name).write_bytes(data)
    return Case(["generate", "nano", "--prompts", name, "--out", "images", "--size", "32", "--steps", "1"])


def overrides(rng: random.Random, folder: Path) -> Case:
    """Settings of a training run whose model is missing: it never starts."""
    from deepgen_jax.training import run_config

    names = [field.name for field in dataclasses.fields(run_config.SupervisedConfig)] + ["data.micro_batch", "data.x.y"]
    settings = [
        f"{rng.choice(names)}{rng.choice(('=', '=', '=', '+=', '.a=', ''))}{corpus.word(rng)}" for _ in range(2)
    ]
    stage = rng.choice(("tiny_sft", "sft", "pretrain", "grpo", "tiny_vae", corpus.word(rng)))
    return Case(["train", stage, "model=absent", "out=run", *settings], (2,))


def data(rng: random.Random, folder: Path) -> Case:
    """Training data of any format."""
    kind = rng.choice(("image_folder", "webdataset", "json", "captions", "parquet", corpus.text(rng)))
    path = folder / "data"
    if kind == "image_folder":
        path.mkdir()
        for i in range(4):
            name, contents = corpus.image(rng)
            (path / f"{i}{name}").write_bytes(contents)
            (path / f"{i}{name}").with_suffix(".txt").write_bytes(corpus.text(rng).encode())
        if rng.random() < 0.3:
            (path / "loop").symlink_to(path)
    elif kind == "webdataset":
        path = folder / "shard.tar"
        path.write_bytes(corpus.tar(rng))
    else:
        path = folder / "data.json"
        rows = [{"image": "a.png", "annotation": "a.json", "txt": corpus.text(rng)}, corpus.value(rng)]
        path.write_bytes(corpus.deep(rng) if rng.random() < 0.1 else json.dumps(rows).encode())
    source = json.dumps([{"name": "fuzz", "kind": kind, "path": str(path)}])
    settings = [f"data.sources={source}", "model=nano", "start=none", "data.mixture.cycle=t2i", "data.max_bad_share=1"]
    return Case(["data", "inspect", "tiny_sft", *settings, "--seconds", "0.1"])


def _release(folder: Path, name: str) -> Path:
    """The tiny diffusers release, of which one file is then changed; the others are links."""
    out = folder / "release"
    shutil.copytree(FIXTURES / "deepgen_diffusers", out, copy_function=lambda a, b: os.symlink(os.path.abspath(a), b))
    target = out / name
    contents = target.read_bytes()
    target.unlink()
    target.write_bytes(contents)
    return out


def safetensors(rng: random.Random, folder: Path) -> Case:
    """A release whose weights are damaged: what the safetensors library refuses must be refused."""
    names = [
        str(p.relative_to(FIXTURES / "deepgen_diffusers"))
        for p in (FIXTURES / "deepgen_diffusers").rglob("*.safetensors")
    ]
    name = rng.choice(sorted(names))
    release = _release(folder, name)
    path = release / name
    change = corpus.safetensors_header if rng.random() < 0.7 else corpus.damage
    path.write_bytes(change(rng, path.read_bytes()))

    def check() -> None:
        from safetensors import safe_open

        try:
            with safe_open(path, "np") as file:
                file.keys()
        except Exception as error:
            raise AssertionError(f"{name} was read, which safetensors refuses: {error}") from None

    argv = [
        "convert",
        "--diffusers",
        str(release),
        "--hparams",
        str(FIXTURES / "deepgen_config.json"),
        "--out",
        "model",
    ]
    return Case(argv, (0, 2), check)


def pth(rng: random.Random, folder: Path) -> Case:
    """A damaged or recompressed `.pth`: what `torch.load` refuses must be refused."""
    source = rng.choice(("deepgen_sft.pth", "deepgen_pretrain.pth", "model.pt"))
    path = folder / source
    change = corpus.recompressed if rng.random() < 0.5 else corpus.damage
    path.write_bytes(change(rng, (FIXTURES / source).read_bytes()))

    def check() -> None:
        import torch

        try:
            torch.load(path, weights_only=True)
        except Exception as error:
            raise AssertionError(f"{source} was read, which torch refuses: {error}") from None

    argv = ["convert", "--qwen", str(FIXTURES / "qwen2_5_vl"), "--sd3", str(FIXTURES / "sd3_5_kontext"), "--checkpoint",
            str(path), "--hparams", str(FIXTURES / "deepgen_config.json"), "--out", "model"]  # fmt: skip
    return Case(argv, (0, 2), check)


def configs(rng: random.Random, folder: Path) -> Case:
    """A release whose JSON files are damaged."""
    names = [p.relative_to(FIXTURES / "deepgen_diffusers") for p in (FIXTURES / "deepgen_diffusers").rglob("*.json")]
    name = str(rng.choice(sorted(names)))
    release = _release(folder, name)
    path = release / name
    if rng.random() < 0.5:
        values = json.loads(path.read_bytes())
        if isinstance(values, dict) and values:
            values[rng.choice(sorted(values))] = corpus.value(rng)
        path.write_text(json.dumps(values))
    else:
        path.write_bytes(corpus.deep(rng) if rng.random() < 0.2 else corpus.damage(rng, path.read_bytes()))
    argv = [
        "convert",
        "--diffusers",
        str(release),
        "--hparams",
        str(FIXTURES / "deepgen_config.json"),
        "--out",
        "model",
    ]
    return Case(argv, (0, 2))


def folders(rng: random.Random, folder: Path) -> Case:
    """A model folder with a damaged or missing file, or a folder of something else."""
    from deepgen_jax.stores import model_folder

    source = Path(model_folder.locate(None))
    out = folder / "model"
    shutil.copytree(source, out)
    if rng.random() < 0.5:
        # As of an earlier version, whose folders have no checksums.
        manifest = json.loads((out / "config.json").read_bytes())
        del manifest["checksums"]
        (out / "config.json").write_text(json.dumps(manifest))
    files = sorted(path for path in out.rglob("*") if path.is_file())
    small = [path for path in files if path.suffix == ".json"]
    path = rng.choice(small if rng.random() < 0.6 else files)
    if rng.random() < 0.2:
        path.unlink()
    else:
        path.write_bytes(corpus.damage(rng, path.read_bytes()))
    command = rng.choice((["info", "model"], ["export", "model", "--format", "diffusers", "--out", "release"]))
    return Case(command, (0, 2))


FAMILIES: dict[str, Callable[[random.Random, Path], Case]] = {
    family.__name__: family
    for family in (options, images, prompts, overrides, data, safetensors, pth, configs, folders)
}


def _exists(path: Path) -> None:
    assert path.is_file(), f"{path.name} was not written"


def run_one(worker: Worker, family: str, seed: str, scratch: Path) -> tuple[Case, dict[str, Any], str | None]:
    """The case of a family and seed; deterministic."""
    # Nested, so that names like ../../x stay inside.
    folder = scratch / "a" / "b" / "c" / "d"
    shutil.rmtree(scratch / "a", ignore_errors=True)
    folder.mkdir(parents=True)
    case = FAMILIES[family](random.Random(f"{family}/{seed}"), folder)
    answer = worker.run(case.argv, folder)
    return case, answer, verdict(case, answer)


def run_for(
    seconds: float, seed: str, scratch: Path, families: tuple[str, ...] = tuple(FAMILIES)
) -> tuple[int, list[str]]:
    """Runs the families in turn until the time is used; returns (cases run, faults).

    A fault says how to run its case again.
    """
    worker = Worker(scratch)
    faults, count, end = [], 0, time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            family, one = families[count % len(families)], f"{seed}/{count // len(families)}"
            case, answer, wrong = run_one(worker, family, one, scratch)
            count += 1
            if wrong:
                faults.append(
                    f"{family} {one}: {wrong}\n  deepgen {' '.join(map(repr, case.argv))}\n  {answer['stderr'][-600:]}"
                )
    finally:
        worker.close()
    return count, faults
