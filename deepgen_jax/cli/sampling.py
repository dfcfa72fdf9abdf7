"""Common parts of ``deepgen generate`` and ``deepgen edit``: options, output to one file or a resumable folder."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
import string
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image
from tqdm import tqdm
from tyro.conf import OmitArgPrefixes, Positional, arg

from deepgen_jax.cli.image_run import ImageRun, resolved_dtype
from deepgen_jax.cli.processes import ProcessOptions
from deepgen_jax.cli.stopping import Stop
from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.tokens import Padding, PromptTokenizer
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.acceleration import Acceleration, interval_of
from deepgen_jax.inference.batch import Failure, PromptCheck, Request, Settings, plan
from deepgen_jax.inference.defaults import check_acceleration, resolve_sampling
from deepgen_jax.inference.grids import check_free, plan_grids, write_grids
from deepgen_jax.inference.known_words import read_known_words
from deepgen_jax.inference.outputs import FORMATS, Model, OutputFolder, check_format, check_name, describe, save_image
from deepgen_jax.inference.prompts import MAX_IMAGES, MAX_STEPS, Record, parse_size, read_prompts
from deepgen_jax.inference.requests import MAX_SEED
from deepgen_jax.local_paths import LocalPath, refuse_url
from deepgen_jax.stores.model_folder import locate
from deepgen_jax.user_warnings import warn_user


@dataclass
class PromptArguments:
    """The words after the command; a separate class, so that a command's first options can follow them in the help."""

    model: Annotated[Positional[str | None], arg(metavar="[MODEL]", help_behavior_hint="")] = None
    """Model folder, made by `deepgen convert`. Left out, or nano: the small model of the package."""
    prompt: Annotated[Positional[str | None], arg(metavar="PROMPT", help_behavior_hint="")] = None
    """What to show, or how to change the image, in quotes. A word alone is the prompt, unless there is a folder of that
    name."""


@dataclass
class SamplingCommand(PromptArguments):
    """Options of both commands, and what they do."""

    out: Annotated[LocalPath | None, arg(metavar="PATH", help_behavior_hint="(default: image.png)")] = None
    """Image file (.png, .jpg, .webp; several images get _0, _1, ... before the suffix), or a folder, which can be
    resumed and gets a metadata.jsonl."""
    overwrite: bool = False
    """Replace files that exist, finished ones too."""
    prompts: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(with --out FOLDER)")] = None
    """Make many images: .txt (one prompt a line), .jsonl, .json, .csv or .parquet with the fields prompt,
    negative_prompt, image or images, seed, size (or width and height), id, num_images, steps, guidance, sampler; files
    of public benchmarks; a folder of .txt files; or the metadata.jsonl of an earlier run."""
    num_images: int = 1
    """Images of each prompt; image k is made with seed + k."""
    grid: bool = False
    """Show all images of a prompt in one more picture, too, named like them with _grid."""
    batch_size: int = 4
    """Images made at once; changes speed and memory, not the images (bit for bit on a CPU)."""
    seed: int = 0
    """Seed of the noise; the same for every prompt unless the prompt file gives others. -1 draws one and prints it."""
    size: Annotated[str | None, arg(metavar="WIDTHxHEIGHT", help_behavior_hint="")] = None
    """Size in pixels, such as 512x768, or one number for a square. By default that of the first reference image, or
    512x512 (less where the model was made for less)."""
    width: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="")] = None
    """Width, in place of --size."""
    height: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="")] = None
    """Height, in place of --size."""
    strict_size: bool = False
    """Refuse sizes that are not multiples of 32 instead of rounding them."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Denoising steps; by default the model's, 50 for DeepGen and 4 for nano."""
    guidance: Annotated[float | None, arg(metavar="SCALE", help_behavior_hint="")] = None
    """Classifier-free guidance scale; 1 turns guidance off and takes half the time. By default the model's, 4 for
    DeepGen and 1 for nano."""
    sampler: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """euler (default), heun, dpmpp_2m, or with added noise cps, flow, dance; or module:Class."""
    negative_prompt: str = ""
    """What to keep away from."""
    cache: Annotated[float | None, arg(metavar="THRESHOLD", help_behavior_hint="(default: off)")] = None
    """Skip the MMDiT's later layers in steps where its first layer changes by less than this share, such as 0.08."""
    taylor: bool = False
    """With --cache: extrapolate skipped layers from the last two evaluations instead of repeating them."""
    guidance_interval: Annotated[str | None, arg(metavar="START,STOP", help_behavior_hint="(default: all)")] = None
    """Guide only in this part of the steps, such as 0,0.6 for the first three fifths."""
    padding: Padding = "reference"
    """How prompts of different length share a batch: as the released system treats each alone, as it treats the batch
    (one prompt only), or with padding hidden."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights and computation; auto is float32 on CPU and bfloat16 elsewhere."""
    mesh: Annotated[str | None, arg(metavar="AXES", help_behavior_hint="(default: auto)")] = None
    """Split the work over devices: data=8 or, where memory is short, fsdp=8 for many images, tensor=8 for each. auto
    takes all devices so, and one on CPUs."""
    compilation_cache: Annotated[LocalPath | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where compiled programs are kept, or off; by default $DEEPGEN_CACHE_DIR or ~/.cache/deepgen-jax/xla."""
    max_image_megapixels: float = 64.0
    """Larger image files are refused before they are decoded."""
    processes: Annotated[ProcessOptions, OmitArgPrefixes] = field(default_factory=ProcessOptions)

    @property
    def folder(self) -> Path:
        """Of the model."""
        return locate(None if self._prompt_alone() else self.model)

    @property
    def text(self) -> str | None:
        """The prompt among the words, if there is one."""
        return self.model if self._prompt_alone() else self.prompt

    def _prompt_alone(self) -> bool:
        """Whether the only word is the prompt: there is no such folder, and no file that has prompts."""
        if self.model is None or self.prompt is not None or self.prompts is not None:
            return False
        return not self.model or not os.path.isdir(locate(self.model))

    def settings(self, config: DeepGenConfig) -> Settings:
        """The options as the batch planner takes them; commands add theirs."""
        side = config.default_side
        width, height = self._size()
        sampling = resolve_sampling(config, self.steps, self.guidance, self.sampler)
        acceleration = Acceleration(
            self.cache, self.taylor, None if self.guidance_interval is None else interval_of(self.guidance_interval)
        )
        check_acceleration(config, acceleration)
        return Settings(
            negative_prompt=_checked_text(self.negative_prompt, "negative prompt"),
            seed=self.seed,
            width=width,
            height=height,
            steps=sampling.steps,
            guidance=sampling.guidance,
            sampler=sampling.sampler,
            num_images=self.num_images,
            padding=self.padding,
            side=side,
            multiple=config.image_multiple,
            strict_size=self.strict_size,
            max_reference_pixels=side * side,
            max_image_pixels=int(self.max_image_megapixels * 1e6),
            acceleration=acceleration,
        )

    def run(self) -> int:
        """Makes the images; returns the exit status."""
        self._check_numbers()
        if self.seed == -1:
            if self.processes != ProcessOptions():
                raise DeepGenError("--seed -1 would draw another seed in each process; give them all one seed")
            self.seed = secrets.randbelow(MAX_SEED + 1 - self.num_images)
            warn_user(f"the seed is {self.seed}")
        records, failures = self._records()
        config, check_prompt = self._open_model()
        settings = self.settings(config)
        requests, more = plan(records, settings, check_prompt, str(self.prompts) if self.prompts else "")
        failures += more
        if self.prompts is None and failures:
            raise DeepGenError(failures[0].reason)
        known = read_known_words(self.folder)
        if known is not None:
            known.warn([request.prompt for request in requests])
        into_folder = _is_folder(self.out) or self.prompts is not None
        first = self.processes.join()
        with self.processes.peer_watch():
            if not self.processes.same((requests, settings, self.batch_size, self.mesh, self.dtype)):
                raise DeepGenError("processes were asked for different images; give all the same words and files")
            run = self._run(settings)
            if not first:
                return run.follow(requests, into_folder)
            if into_folder:
                return self._fill_folder(run, requests, failures)
            return self._write_files(run, requests)

    def _open_model(self) -> tuple[DeepGenConfig, PromptCheck]:
        try:
            return open_model(self.folder)
        except DeepGenError as error:
            if self.prompt is None or self.model is None or os.path.exists(self.folder):
                raise
            raise DeepGenError(
                f"there is no model folder {self.model!r}; put a prompt of several words in quotes, "
                f'"{self.model} {self.prompt}", or check the name of the folder'
            ) from error

    def _records(self) -> tuple[list[Record], list[Failure]]:
        if self.prompts is None:
            if self.text is None:
                after = "the command" if self.model is None else "the model folder"
                raise DeepGenError(f"there is no prompt; write it after {after}, or give a file with --prompts")
            if not set(self.text) & set(string.whitespace):
                refuse_url(self.text, "MODEL")
            prompt = _checked_text(self.text, "prompt")
            if not prompt.strip():
                raise DeepGenError("the prompt is empty; write what to show")
            if self.out is not None and not _is_folder(self.out):
                check_format(Path(self.out))
            return [Record(index=0, line=0, prompt=prompt)], []
        if self.prompt is not None:
            raise DeepGenError("a prompt and --prompts are both given; keep one of them")
        if self.out is None or (not _is_folder(self.out) and Path(self.out).suffix.lower() in FORMATS):
            raise DeepGenError("--prompts makes many images; give a folder for them with --out FOLDER")
        if self.padding == "batch":
            raise DeepGenError(
                "--padding batch lets an image depend on the other prompts of its batch, so that it could not be made "
                "again; use reference or masked with --prompts"
            )
        records, bad = read_prompts(self.prompts)
        return records, [Failure(f"{line.path}:{line.line}", line.reason) for line in bad]

    def _size(self) -> tuple[int | None, int | None]:
        if (self.width is None) != (self.height is None):
            raise DeepGenError("--width and --height go together; give both, or --size WIDTHxHEIGHT")
        if self.size is None:
            return self.width, self.height
        if self.width is not None:
            raise DeepGenError("--size and --width are both given; keep one of them")
        return parse_size(self.size)

    def _check_numbers(self) -> None:
        limits = {"num_images": (1, MAX_IMAGES), "batch_size": (1, None), "seed": (-1, MAX_SEED)}
        limits["steps"] = (1, MAX_STEPS)
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if value is not None and (value < least or (most is not None and value > most)):
                allowed = f"{least} or more" if most is None else f"{least} to {most}"
                raise DeepGenError(f"--{name.replace('_', '-')} is {value}; use {allowed}")
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise DeepGenError(f"--guidance is {self.guidance}; use 0 or more")
        if not self.max_image_megapixels > 0 or math.isinf(self.max_image_megapixels):
            raise DeepGenError(f"--max-image-megapixels is {self.max_image_megapixels}; use a number above 0")

    def _write_files(self, run: ImageRun, requests: list[Request]) -> int:
        """One prompt, named files: everything or an error."""
        out = Path(self.out or "image.png")
        names = [out.name] if len(requests) == 1 else [f"{out.stem}_{k}{out.suffix}" for k in range(len(requests))]
        requests = [dataclasses.replace(request, file=name) for request, name in zip(requests, names, strict=True)]
        grids = plan_grids(requests) if self.grid else {}
        for name in (*names, *grids):
            check_name(out.with_name(name))
            if os.path.lexists(out.with_name(name)) and not self.overwrite:
                raise DeepGenError(f"{out.with_name(name)} exists; choose another --out or use --overwrite")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeepGenError(f"folder {out.parent} cannot be made: {error.strerror or error}") from error
        if not os.access(out.parent, os.W_OK):
            raise DeepGenError(f"folder {out.parent} cannot be written; choose another --out")
        model = Model.of(self.folder, resolved_dtype(self.dtype))
        metadata = {request.file: describe(request, run.settings, model) for request in requests}

        def save(request: Request, image: Image.Image) -> None:
            path = out.with_name(request.file)
            save_image(image, path, metadata[request.file])
            tqdm.write(str(path), file=sys.stdout)

        with Stop(graceful=False):
            failures = run.make(requests, requests, save, lambda: False)
        if failures:
            raise DeepGenError(failures[0].reason)
        for path in write_grids(out.parent, grids, metadata):
            print(path)
        return 0

    def _fill_folder(self, run: ImageRun, requests: list[Request], failures: list[Failure]) -> int:
        """Many images: what is finished is skipped, what fails is listed at the end."""
        folder = Path(self.out or "")
        grids = plan_grids(requests) if self.grid else {}
        if not self.overwrite:
            check_free(folder, grids)
        return run.fill_folder(
            OutputFolder(folder),
            requests,
            failures,
            overwrite=self.overwrite,
            keep_others=self.prompts is None,
            finish=lambda finished: write_grids(folder, grids, finished),
            derived="grid" if self.grid else "",
        ).status

    def _run(self, settings: Settings) -> ImageRun:
        return ImageRun(
            self.folder, settings, self.batch_size, self.dtype, self.mesh, self.compilation_cache, self.processes
        )


def open_model(folder: Path) -> tuple[DeepGenConfig, PromptCheck]:
    """Config of a model folder and the check of its prompts; weights are not read.

    Raises:
      DeepGenError: no such folder, or no model folder.
    """
    from deepgen_jax.stores.model_folder import read_manifest

    config = read_manifest(folder).config
    tokenizer = PromptTokenizer(folder / "tokenizer", config)
    return config, partial(tokenizer, max_tokens=config.max_prompt_tokens)


def _is_folder(out: str | None) -> bool:
    """Whether ``--out`` names a folder: one that exists, or a name without a suffix or with a slash at the end."""
    return out is not None and (os.path.isdir(out) or out.endswith(("/", os.sep)) or not Path(out).suffix)


def _checked_text(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DeepGenError(f"the {name} is not UTF-8 text; put it into a --prompts file") from None
    return text
