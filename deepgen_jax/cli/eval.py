"""``deepgen eval``: benchmarks from a model folder to official trees of images, and their scores."""

from __future__ import annotations

import dataclasses
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

import deepgen_jax
from deepgen_jax.cli.image_run import ImageRun, resolved_dtype
from deepgen_jax.cli.processes import ProcessOptions
from deepgen_jax.cli.sampling import open_model
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Benchmark, Item, Reading
from deepgen_jax.evaluation.benchmark_kinds import BENCHMARKS, open_benchmark
from deepgen_jax.evaluation.run import RunFolder, chosen, fewer_images, plan_images, run_settings
from deepgen_jax.inference.batch import Settings
from deepgen_jax.inference.grids import write_grids
from deepgen_jax.inference.known_words import read_known_words
from deepgen_jax.inference.outputs import Model, OutputFolder
from deepgen_jax.inference.requests import MAX_SEED
from deepgen_jax.local_paths import LocalPath
from deepgen_jax.stores.model_folder import NANO, locate
from deepgen_jax.user_warnings import warn_user

#: Rows of our own in the benchmarks' formats, for a first try without downloads.
SAMPLES = Path(deepgen_jax.__file__).parent / "evaluation/samples"


@dataclass(frozen=True)
class ListCommand:
    """Lists the benchmarks: images a prompt, who scores, what --data takes."""

    def run(self) -> int:
        """Prints; returns the exit status."""
        for name in BENCHMARKS.names():
            benchmark = open_benchmark(name)
            splits = f", --split {','.join(benchmark.splits)}" if benchmark.splits else ""
            print(f"{name}: {benchmark.title}, {benchmark.task}")
            plural = "s" if benchmark.images > 1 else ""
            print(f"    {benchmark.images} image{plural} a prompt, scored by {_scorer(benchmark)}")
            print(f"    --data {benchmark.inputs or 'not needed'}{splits}")
            if benchmark.repository:
                print(f"    {benchmark.repository}, licence {benchmark.licence}")
        return 0


@dataclass(frozen=True)
class EvalArguments:
    """Positional arguments; a base class, so that options follow them in the help."""

    benchmark: Annotated[Positional[str], arg(metavar="BENCHMARK")]
    """Name of the benchmark; `deepgen eval list` lists them."""
    model: Annotated[Positional[str | None], arg(metavar="[MODEL]", help_behavior_hint="")] = None
    """Model folder, made by `deepgen convert`. Left out, or nano: the small model of the package."""


@dataclass(frozen=True)
class EvalCommand(EvalArguments):
    """Makes a benchmark's images in the layout of its official scorer; run again, it makes the missing ones."""

    data: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")] = None
    """The benchmark's official files or those of DeepGen's repositories; `deepgen eval list` says which."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: BENCHMARK-MODEL)")] = None
    """Folder for the tree of images; records of the run are in its subfolder .deepgen."""
    images: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: beside the data)")] = None
    """Folder of the source images."""
    split: Annotated[str, arg(help_behavior_hint="(default: all)")] = ""
    """Only these parts of the benchmark, such as en,zh_long."""
    name: Annotated[str | None, arg(help_behavior_hint="(default: of the model folder)")] = None
    """Name of the model in the tree, where the benchmark asks for one."""
    limit: Annotated[int | None, arg(help_behavior_hint="(default: all)")] = None
    """Only the first prompts."""
    spread: bool = False
    """With --limit: evenly spaced prompts, which cover all categories, instead of the first."""
    num_images: Annotated[int | None, arg(help_behavior_hint="(default: the benchmark's)")] = None
    """Fewer images of each prompt."""
    steps: Annotated[int | None, arg(help_behavior_hint="")] = None
    """Denoising steps; by default 50 as published, or the model's own."""
    sampler: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Sampler, such as heun or dpmpp_2m; by default euler as published, or the model's own."""
    guidance: Annotated[float | None, arg(help_behavior_hint="")] = None
    """Classifier-free guidance scale; by default 4 as published (DPG-Bench: 7.5), or the model's own."""
    size: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="")] = None
    """Side of the images; by default 512 as published, or the model's own."""
    seed: int = 0
    """Seed of the run; each image's seed is derived from it and the image's file."""
    batch_size: int = 4
    """Images made at once; changes speed and memory, not the images."""
    overwrite: bool = False
    """Make all images again."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights and computation; auto is float32 on CPU and bfloat16 elsewhere."""
    mesh: Annotated[str | None, arg(metavar="AXES", help_behavior_hint="(default: auto)")] = None
    """Split the work over devices: data=8 or, where memory is short, fsdp=8."""
    compilation_cache: Annotated[LocalPath | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where compiled programs are kept, or off; by default $DEEPGEN_CACHE_DIR or ~/.cache/deepgen-jax/xla."""
    processes: Annotated[ProcessOptions, OmitArgPrefixes] = field(default_factory=ProcessOptions)

    def run(self) -> int:
        """Makes the images; returns the exit status."""
        benchmark = open_benchmark(self.benchmark)
        return self.make(benchmark, print_next=True) or 0

    def make(self, benchmark: Benchmark, print_next: bool = False) -> int | None:
        """Makes the images of a benchmark; returns the exit status, None in processes that follow the first.

        Args:
          benchmark: the benchmark.
          print_next: print the next step.
        """
        self._check(benchmark)
        model = locate(self.model)
        name, out = self._name, self._out
        reading = Reading(self._data(benchmark), name, _split(benchmark, self.split), self.images)
        items = fewer_images(chosen(benchmark.read(reading), self.limit, self.spread), self.num_images)
        if not items:
            raise DeepGenError(f"{reading.data} has no prompts of --split {self.split}; leave it out")
        config, check_prompt = open_model(model)
        settings = run_settings(
            benchmark,
            config,
            seed=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            side=self.size,
            sampler=self.sampler,
        )
        self._say_own(benchmark, settings)
        first = self.processes.join()
        with self.processes.peer_watch():
            folder = RunFolder(out)
            folder.check(self.benchmark)
            # Every process: hosts need not share a disk.
            benchmark.prepare(items, reading, out)
            requests, failures = plan_images(benchmark, items, settings, check_prompt, out)
            if not self.processes.same((requests, settings, self.batch_size, self.mesh, self.dtype)):
                raise DeepGenError("processes were asked for different images; give all the same words and files")
            known = read_known_words(model)
            if known is not None:
                known.warn([request.prompt for request in requests])
            run = ImageRun(
                model, settings, self.batch_size, self.dtype, self.mesh, self.compilation_cache, self.processes
            )
            if not first:
                run.follow(requests, into_folder=True)
                return None
            sheets = benchmark.sheets(items)
            description = self._description(benchmark, model, name, settings, items)
            result = run.fill_folder(
                OutputFolder(out, folder.records),
                requests,
                failures,
                overwrite=self.overwrite,
                begin=lambda: folder.write(description, items),
                finish=lambda finished: write_grids(out, sheets, finished),
                derived="grid" if sheets else "",
            )
        if print_next and result.status == 0:
            print(_next(benchmark, out))
        return result.status

    @property
    def _name(self) -> str:
        """Of the model."""
        return self.name or (NANO if self.model is None else Path(self.model).resolve().name)

    @property
    def _out(self) -> Path:
        return self.out or Path(f"{self._benchmark_name}-{self._name}")

    @property
    def _benchmark_name(self) -> str:
        """As part of a file name; of file.py:Class the class."""
        return self.benchmark.rpartition(":")[2].lower()

    def _check(self, benchmark: Benchmark) -> None:
        for name, least in (("limit", 1), ("num_images", 1), ("steps", 1), ("batch_size", 1), ("seed", 0), ("size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DeepGenError(f"--{name.replace('_', '-')} is {value}; use {least} or more")
        if self.seed > MAX_SEED:
            raise DeepGenError(f"--seed is {self.seed}; use 0 to {MAX_SEED}")
        if self.guidance is not None and not 0 <= self.guidance < float("inf"):
            raise DeepGenError(f"--guidance is {self.guidance}; use 0 or more")
        if self.num_images is not None and self.num_images > benchmark.images:
            raise DeepGenError(f"--num-images is {self.num_images}; {benchmark.title} takes at most {benchmark.images}")
        if self.name is not None and ("/" in self.name or self.name.startswith(".") or not self.name.strip()):
            raise DeepGenError(f"--name {self.name!r} cannot be the name of a folder; use letters, digits, - and _")

    def _data(self, benchmark: Benchmark) -> Path:
        """The data asked for, or rows of our own for the package's model."""
        if self.data is not None:
            return self.data
        own = sorted(SAMPLES.glob(f"{self._benchmark_name}.*"))
        if own and self.model in (None, NANO):
            warn_user(f"no --data is given: {own[0].name} of the package is used, a few rows in the format of "
                      f"{benchmark.title}")  # fmt: skip
            return own[0]
        if not benchmark.inputs:
            return Path()
        raise DeepGenError(f"give the inputs of {benchmark.title} with --data: {benchmark.inputs}")

    def _say_own(self, benchmark: Benchmark, settings: Settings) -> None:
        used = (settings.width, settings.steps, settings.guidance)
        published = (benchmark.side, benchmark.steps, benchmark.guidance)
        if used != published:
            what = "{}x{} pixels, {} steps, guidance {:g}"
            texts = (what.format(side, side, steps, guidance) for side, steps, guidance in (used, published))
            warn_user("settings are {}; the benchmark's are {}".format(*texts))

    def _command(self) -> str:
        """The words that make the run again; which processes share it is left out."""
        words = ["deepgen", "eval", self.benchmark, *([self.model] if self.model else [])]
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if option.name in ("benchmark", "model", "processes") or value == option.default:
                continue
            words.append(f"--{option.name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
        return shlex.join(words)

    def _description(
        self, benchmark: Benchmark, model: Path, name: str, settings: Settings, items: list[Item]
    ) -> dict[str, Any]:
        """Contents of ``run.json``: everything needed to repeat and read the run."""
        dtype = resolved_dtype(self.dtype)
        return {
            "benchmark": self.benchmark,
            "title": benchmark.title,
            "protocol": benchmark.protocol,
            "model": name,
            "model_folder": str(model.absolute()),
            "model_fingerprint": Model.of(model, dtype).fingerprint,
            "settings": {
                "size": settings.width, "steps": settings.steps, "guidance": settings.guidance, "seed": self.seed,
                "sampler": settings.sampler,
                "negative_prompt": settings.negative_prompt, "dtype": dtype, "padding": settings.padding,
                "images a prompt": len(items[0].files), "seeds": "one an image, from the run's seed and its file",
            },
            "published_settings": {
                "size": benchmark.side, "steps": benchmark.steps, "guidance": benchmark.guidance,
                "images a prompt": benchmark.images,
            },
            "data": sorted({item.file for item in items}),
            "prompts": len(items),
            "limited": self.limit is not None,
            "command": self._command(),
            "deepgen_jax": deepgen_jax.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip


@dataclass(frozen=True)
class ScoreArguments:
    """Positional arguments; a base class, so that options follow them in the help."""

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder of a run."""


@dataclass(frozen=True)
class ScoreCommand(ScoreArguments):
    """Scores a run's images: CVTG-2K by OCR here, judge benchmarks by a judge; for others it prints the command."""

    judge: Annotated[str | None, arg(metavar="URL", help_behavior_hint="")] = None
    """OpenAI-compatible server of the judge, such as http://localhost:8000."""
    judge_model: Annotated[str, arg(metavar="NAME", help_behavior_hint="")] = ""
    """Name of the served model."""
    api_key_variable: Annotated[str, arg(metavar="NAME", help_behavior_hint="")] = ""
    """Environment variable that holds the server's token."""
    concurrency: int = 16
    """Requests under way at once."""
    tries: int = 3
    """Number of attempts for a question whose reply cannot be read."""
    clip: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """CLIP ViT-L/14 as transformers stores it, for CVTG-2K's CLIPScore."""
    results: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Output of the official scorer (GenEval, DPG-Bench), to include its scores in reports."""

    def run(self) -> int:
        """Prints the figures; returns the exit status."""
        from deepgen_jax.evaluation import scoring
        from deepgen_jax.rewards.judge import Judge

        for name in ("tries", "concurrency"):
            if getattr(self, name) < 1:
                raise DeepGenError(f"--{name} is {getattr(self, name)}; use 1 or more")
        folder = RunFolder(self.folder)
        run, items = folder.read(), folder.items()
        benchmark = open_benchmark(run["benchmark"])
        if self.results is not None:
            scores = scoring.score_from_official(benchmark, items, self.folder, self.results)
        elif benchmark.scorer == "official":
            print(_official(benchmark, self.folder, items))
            return 0
        elif benchmark.scorer == "ocr":
            scores = scoring.score_by_ocr(benchmark, items, self.folder, self.clip)
        elif benchmark.scorer == "exact":
            scores = scoring.score_exactly(benchmark, items, self.folder)
        elif self.judge is None or not self.judge_model:
            official = benchmark.official(self.folder, items)
            other = f"; its official scorer: {official[0]}" if official else ""
            raise DeepGenError(
                f"{benchmark.title} is scored by a judge: give its server with --judge URL and --judge-model "
                f"NAME{other}"
            )
        else:
            client = {"concurrency": self.concurrency, "api_key_variable": self.api_key_variable}
            judge = Judge(self.judge, self.judge_model, client=client)
            scores = scoring.score_by_judge(benchmark, items, self.folder, judge, self.tries)
        path = scoring.write_scores(folder, scores)
        for line in scoring.lines(benchmark.title, scores):
            print(line)
        print(f"scores written to {path}; `deepgen report {self.folder}` shows them beside published ones")
        return 0 if len(scores.images) == scores.made else 1


def _split(benchmark: Benchmark, text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in benchmark.splits:
            known = ", ".join(benchmark.splits) or "none"
            raise DeepGenError(f"--split {name}: {benchmark.title} has no such part; known: {known}")
    return names


def _scorer(benchmark: Benchmark) -> str:
    scorers = {
        "judge": "a judge (deepgen eval score --judge URL)",
        "ocr": "OCR and CLIP (deepgen eval score)",
        "official": "its own code (deepgen eval score prints the command)",
        "exact": "exact code (deepgen eval score)",
    }
    return scorers[benchmark.scorer]


def _next(benchmark: Benchmark, out: Path) -> str:
    return f"next: deepgen eval score {out}" + (" --judge URL --judge-model NAME" * (benchmark.scorer == "judge"))


def _official(benchmark: Benchmark, out: Path, items: list[Item]) -> str:
    """How to run the official scorer on the tree."""
    lines = [f"{benchmark.title} is scored by its own code; in a clone of {benchmark.repository}:"]
    lines += [f"    {command}" for command in benchmark.official(out.absolute(), items)]
    lines.append(f"then, for reports: deepgen eval score {out} --results FILE")
    return "\n".join(lines)
