"""``deepgen compile``: memory, collectives and estimated time of a run's programs on devices that are not there."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from deepgen_jax.errors import DeepGenError

if TYPE_CHECKING:
    from deepgen_jax.aot.program_report import Report


@dataclass(frozen=True)
class CompileCommand:
    """Compiles the programs of a run for a TPU slice or GPU cluster, without the devices; estimates memory and time.

    Needs only the compiler: `pip install 'deepgen-jax[tpu]'` or `'deepgen-jax[cuda]'`, in separate environments. A
    compilation takes minutes and about 3 GB of memory.
    """

    config: Annotated[Positional[str], arg(metavar="CONFIG")]
    """A .py file with `get_config()`, or the name of a packaged one: pretrain, sft, grpo or distill."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY=VALUE")] = field(default=())
    """Changes to it, such as data.micro_batch=512 remat=dots."""
    topology: str = ""
    """v5e:16x16, v6e:8x8, v5p:4x4x4, ... (chips along each dimension) or h100:64 (GPUs, 8 a host)."""
    slices: int = 1
    """TPU slices, joined by the data-centre network."""
    mesh: str = ""
    """Sizes of the axes, such as data=8,fsdp=8; by default, as in training, fsdp is 16 chips, or the GPUs of a host."""
    program: str = ""
    """step, encoders (stages 1 and 2), update, rollout (stage 3); or of generation inference (the sampler), prompts or
    decoder. By default the first of its stage."""
    batch: int | None = None
    """Samples of an optimiser step, or images of a rollout or of inference, over all devices."""
    prompt_tokens: int = 100
    """Tokens of a prompt with its template."""
    quantize: Literal["int8", "fp8"] | None = None
    """Generation with 8-bit weights."""
    products: bool = False
    """With --quantize, matrix products in 8 bits, too."""
    stacked: bool = False
    """Generation on a single GPU with layers stacked, which the pipeline splits; to compare."""
    largest_batch: bool = False
    """Search for the largest batch that fits, in the same number of micro-batches."""
    search: bool = False
    """Compile several meshes (or --mesh) with each rematerialisation, and rank them."""
    json: Path | None = None
    """Also write the report to this file."""

    def run(self) -> int:
        """Compiles and prints; 0 also if the program does not fit."""
        from deepgen_jax.aot import topology as topologies

        if not self.topology:
            raise DeepGenError("--topology missing; name one, such as v6e:8x8 or h100:64")
        if self.largest_batch and (self.search or self.batch is not None):
            raise DeepGenError("--largest-batch searches for a batch; leave --batch and --search out")
        if self.products and self.quantize is None:
            raise DeepGenError("--products needs --quantize; add --quantize int8 or fp8")
        if self.json is not None and not self.json.parent.is_dir():
            raise DeepGenError(f"--json {self.json}: there is no folder {self.json.parent}")
        topology = topologies.parse_topology(self.topology, self.slices)
        topologies.prepare(topology)
        from deepgen_jax import settings
        from deepgen_jax.config import QuantizationConfig
        from deepgen_jax.training import config_files

        config = settings.apply(config_files.load_config(self.config), self.overrides)

        from deepgen_jax.aot import compile as compiling
        from deepgen_jax.aot import search as searching
        from deepgen_jax.aot.compile_process import compile_in_subprocess

        mesh = self.mesh or config.mesh
        quantization = None if self.quantize is None else QuantizationConfig(self.quantize, self.products)
        request = compiling.Request(
            config, topology, mesh, self.program, self.batch, self.prompt_tokens, quantization, self.stacked,
            self._command(),
        )  # fmt: skip
        if self.search:
            reports = searching.search(request, compile_in_subprocess, _say)
            print(searching.ranking(reports), end="\n\n")
        elif self.largest_batch:
            reports = [compiling.largest(request, compile_in_subprocess, _say)]
        else:
            reports = [compile_in_subprocess(request)]
        print(reports[0].table())
        self._save(reports)
        return 0

    def _save(self, reports: list[Report]) -> None:
        if self.json is not None:
            found = [report.to_json() for report in reports]
            self.json.write_text(json.dumps(found if self.search else found[0], indent=2) + "\n", encoding="utf-8")

    def _command(self) -> str:
        words = ["deepgen", "compile", self.config, *self.overrides, "--topology", self.topology]
        if self.slices > 1:
            words += ["--slices", str(self.slices)]
        for name, value in (("mesh", self.mesh), ("program", self.program)):
            words += [f"--{name}", value] if value else []
        words += [] if self.batch is None else ["--batch", str(self.batch)]
        words += [] if self.prompt_tokens == 100 else ["--prompt-tokens", str(self.prompt_tokens)]
        words += [] if self.quantize is None else ["--quantize", self.quantize]
        words += ["--products"] if self.products else []
        words += ["--stacked"] if self.stacked else []
        words += ["--largest-batch"] if self.largest_batch else []
        words += ["--search"] if self.search else []
        return shlex.join(words)


def _say(text: str) -> None:
    print(f"deepgen: {text}", file=sys.stderr, flush=True)
