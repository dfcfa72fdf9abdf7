"""The table of subcommands: where each lives, a line about it, and examples. Nothing is imported before it is used."""

from __future__ import annotations

from dataclasses import dataclass


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
            'deepgen generate "a large red circle on a white background" --out circle.png',
            'deepgen generate deepgen "a red fox in fresh snow" --seed -1 --out fox.png',
            "deepgen generate deepgen --prompts prompts.jsonl --out images --batch-size 8",
        ),
    ),
    "edit": Subcommand(
        "deepgen_jax.cli.edit",
        "EditCommand",
        "change reference images by an instruction",
        (
            'deepgen edit "make the red circle blue" --image circle.png --out edited.png',
            'deepgen edit deepgen "make it night" --image fox.png --out night.png',
            'deepgen edit deepgen "the fox beside this house" --image fox.png --image house.jpg',
        ),
    ),
    "train": Subcommand(
        "deepgen_jax.cli.train",
        "TrainCommand",
        "train a stage (pretrain, sft, grpo) or distil to few steps, resumable at any step",
        (
            "deepgen train pretrain model=deepgen out=runs/pretrain data.sources.pairs.path=pairs.json",
            "deepgen train distill start=runs/grpo out=runs/distill evaluations=4",
            "deepgen train configs/tiny_pretrain.py steps=20",
        ),
    ),
    "compile": Subcommand(
        "deepgen_jax.cli.compile",
        "CompileCommand",
        "estimate memory and speed of a run on a TPU pod or GPU cluster, without one",
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
                "show what a configuration reads: counts, sizes, speed, pictures",
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
        "show what a model folder or a training run holds",
        ("deepgen info deepgen", "deepgen info runs/sft --json"),
    ),
    "export": Subcommand(
        "deepgen_jax.cli.export",
        "ExportCommand",
        "export a training run or a model folder to a different format",
        (
            "deepgen export runs/sft --format model --out deepgen-sft",
            "deepgen export deepgen --format diffusers --out DeepGen-diffusers",
        ),
    ),
    "quantize": Subcommand(
        "deepgen_jax.cli.quantize",
        "QuantizeCommand",
        "write a model folder with 8-bit weights, about half as large, for inference",
        (
            "deepgen quantize deepgen --to int8 --out deepgen-int8",
            "deepgen quantize nano --to fp8 --products --out nano-fp8",
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
    "completion": Subcommand(
        "deepgen_jax.cli.completion",
        "CompletionCommand",
        "print a script that completes commands and options in a shell",
        ("deepgen completion bash >> ~/.bashrc", "deepgen completion fish > ~/.config/fish/completions/deepgen.fish"),
    ),
}
