"""Many images: what to make from prompt records (`plan`), and making it in batches of one shape (`render`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from deepgen_jax.data.images import MAX_PIXELS, image_size, load_image
from deepgen_jax.data.tokens import Padding
from deepgen_jax.errors import DeepGenError, is_out_of_memory
from deepgen_jax.inference.acceleration import Acceleration
from deepgen_jax.inference.image_inputs import fit_reference, reference_size, round_size
from deepgen_jax.inference.prompts import Record
from deepgen_jax.inference.requests import MAX_SEED
from deepgen_jax.user_warnings import warn_user

#: Negative prompt of the published editing scores.
EDIT_NEGATIVE_PROMPT = (
    "blurry, low quality, low resolution, distorted, deformed, broken content, missing parts, damaged details, "
    "artifacts, glitch, noise, pixelated, grainy, compression artifacts, bad composition, wrong proportion, "
    "incomplete editing, unfinished, unedited areas."
)

#: (width, height, steps, guidance, sampler, size of each reference): requests that agree in it share a batch.
Layout = tuple[int, int, int, float, str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Settings:
    """Settings shared by a run's images, and defaults for records that omit some.

    Attributes:
      negative_prompt, seed, steps, guidance, sampler, num_images: for records that do not say. Image k of a record is
        made with its seed + k.
      width, height: in pixels; None takes the first reference's size, or ``side`` where there is no reference.
      images: references for records that name none.
      needs_image: a record without a reference is an error (editing).
      padding, reference_posterior: as in ``DeepGenPipeline``.
      side: of a square image in pixels, where nothing else says the size.
      multiple: image sides are multiples of this.
      strict_size: other sizes are refused, not rounded.
      max_reference_pixels: larger references are reduced to about this area.
      exact_reference_size: (width, height) that every reference is resized to, its aspect lost, as benchmarks ask.
      max_image_pixels: image files of more pixels are not decoded.
      acceleration: work that is skipped.
    """

    negative_prompt: str = ""
    seed: int = 0
    width: int | None = None
    height: int | None = None
    steps: int = 50
    guidance: float = 4.0
    sampler: str = "euler"
    num_images: int = 1
    images: tuple[Path, ...] = ()
    needs_image: bool = False
    padding: Padding = "reference"
    reference_posterior: Literal["mean", "sample"] = "mean"
    side: int = 512
    multiple: int = 32
    strict_size: bool = False
    max_reference_pixels: int = 512 * 512
    exact_reference_size: tuple[int, int] | None = None
    max_image_pixels: int = MAX_PIXELS
    acceleration: Acceleration = field(default_factory=Acceleration)


@dataclass(frozen=True)
class Request:
    """One image to make: everything that decides it but the model and the run's `Settings`.

    Attributes:
      file: its name in the output folder.
      source: where it was asked for, "FILE:LINE", for messages.
      images: paths of the references.
      reference_sizes: (width, height) at which they enter the model.
      metadata: JSON values that do not change the image but belong to its metadata.
    """

    file: str
    source: str
    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    sampler: str = "euler"
    images: tuple[Path, ...] = ()
    reference_sizes: tuple[tuple[int, int], ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def layout(self) -> Layout:
        return (self.width, self.height, self.steps, self.guidance, self.sampler, self.reference_sizes)


@dataclass(frozen=True)
class Failure:
    """A record whose images were not made, and why."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class PromptCheck(Protocol):
    """Raises a DeepGenError for a text that the model cannot take with references of these (width, height)."""

    def __call__(self, text: str, image_sizes: Sequence[tuple[int, int]] | None) -> object: ...


def plan(
    records: Sequence[Record], settings: Settings, check_prompt: PromptCheck, source: str = ""
) -> tuple[list[Request], list[Failure]]:
    """The images to make, ``num_images`` a record, and the records that cannot be used.

    Of reference images only the headers are read here. Files are named after the record's id or its five-digit index,
    with ``_0``, ``_1``, ... where a record has several images.

    Args:
      source: the prompt file, which messages name with the record's line.
    """
    requests: list[Request] = []
    failures: list[Failure] = []
    taken: dict[str, str] = {}
    for record in records:
        where = record.place or (f"{source}:{record.line}" if source else "the prompt")
        try:
            planned = _requests(record, settings, check_prompt, where)
            for request in planned:
                # Some file systems ignore case.
                first = taken.setdefault(request.file.casefold(), where)
                if first != where:
                    raise DeepGenError(f"its image {request.file} is also that of {first}; give it another id")
        except DeepGenError as error:
            failures.append(Failure(where, str(error)))
        else:
            requests.extend(planned)
    return requests, failures


def batch_sizes(requests: Sequence[Request], batch_size: int) -> dict[Layout, int]:
    """Images in a batch of each layout: ``batch_size``, or as many as there are where they are fewer."""
    return {layout: min(batch_size, count) for layout, count in Counter(r.layout for r in requests).items()}


def render(
    pipe: Callable[..., Any],
    requests: Sequence[Request],
    sizes: dict[Layout, int],
    settings: Settings,
    count_evaluations: Callable[[float, float], None] | None = None,
) -> Iterator[list[tuple[Request, Image.Image | DeepGenError]]]:
    """Makes the images, layout by layout in batches; yields a finished batch at a time.

    A batch is always ``sizes[layout]`` rows, so that each layout compiles once: the last one is filled up by repeating
    an item whose further results are dropped. A request that fails comes with its error in place of an image.

    Args:
      pipe: a ``DeepGenPipeline``.
      requests: what to make, in any order.
      sizes: from `batch_sizes` over the whole plan, so that a resumed run uses the same programs.
      settings: shared by all.
      count_evaluations: called after an accelerated batch with the MMDiT layers evaluated, and those without
        acceleration.

    Raises:
      DeepGenError: the device is out of memory.
    """
    layouts: dict[Layout, list[Request]] = {}
    for request in requests:
        layouts.setdefault(request.layout, []).append(request)
    for layout, members in layouts.items():
        size = sizes[layout]
        ready: list[tuple[Request, list[Image.Image]]] = []
        loaded: dict[Path, Image.Image] = {}
        for request in members:
            try:
                ready.append((request, [_reference(path, settings, loaded) for path in request.images]))
            except DeepGenError as error:
                yield [(request, error)]
            if len(ready) == size:
                yield _batch(pipe, ready, size, settings, count_evaluations)
                ready, loaded = [], {}
        if ready:
            yield _batch(pipe, ready, size, settings, count_evaluations)


def _requests(record: Record, settings: Settings, check_prompt: PromptCheck, where: str) -> list[Request]:
    images = record.images or settings.images
    if settings.needs_image and not images:
        raise DeepGenError("there is no image to edit; name it in the field 'image' or with --image")
    sizes = [image_size(path, settings.max_image_pixels) for path in images]
    reference_sizes = tuple(
        settings.exact_reference_size
        or reference_size(*size, multiple=settings.multiple, max_pixels=settings.max_reference_pixels)
        for size in sizes
    )
    width, height = record.width or settings.width, record.height or settings.height
    if width is None or height is None:
        width, height = reference_sizes[0] if reference_sizes else (settings.side, settings.side)
    width, height = round_size(width, height, settings.multiple, settings.strict_size)
    guidance = settings.guidance if record.guidance is None else record.guidance
    negative = settings.negative_prompt if record.negative_prompt is None else record.negative_prompt
    if negative and guidance == 1:
        warn_user("a negative prompt has no effect at guidance 1; give --guidance above 1")
        negative = ""
    check_prompt(record.prompt, reference_sizes or None)
    try:
        check_prompt(negative, reference_sizes or None)
    except DeepGenError as error:
        raise DeepGenError(f"negative prompt: {error}") from error
    seed = settings.seed if record.seed is None else record.seed
    count = record.num_images or settings.num_images
    if seed + count - 1 > MAX_SEED:
        raise DeepGenError(f"seed {seed} and {count} images go beyond the largest seed {MAX_SEED}; use a smaller seed")
    name = record.name or f"{record.index:05d}"
    return [
        Request(
            file=f"{name}.png" if count == 1 else f"{name}_{k}.png",
            source=where,
            prompt=record.prompt,
            negative_prompt=negative,
            seed=seed + k,
            width=width,
            height=height,
            steps=record.steps or settings.steps,
            guidance=guidance,
            sampler=record.sampler or settings.sampler,
            images=tuple(images),
            reference_sizes=reference_sizes,
            metadata=record.metadata,
        )
        for k in range(count)
    ]


def _reference(path: Path, settings: Settings, loaded: dict[Path, Image.Image]) -> Image.Image:
    """The fitted image; the same object for the same path within a batch, so that the model encodes it once."""
    if path not in loaded:
        image = load_image(path, settings.max_image_pixels)
        if settings.exact_reference_size is not None:
            loaded[path] = image.resize(settings.exact_reference_size, Image.Resampling.BICUBIC)
        else:
            loaded[path] = fit_reference(image, settings.multiple, settings.max_reference_pixels, name=str(path))
    return loaded[path]


def _batch(
    pipe: Callable[..., Any],
    ready: list[tuple[Request, list[Image.Image]]],
    size: int,
    settings: Settings,
    count_evaluations: Callable[[float, float], None] | None,
) -> list[tuple[Request, Image.Image | DeepGenError]]:
    rows = ready + ready[-1:] * (size - len(ready))
    requests = [request for request, _ in rows]
    first = requests[0]
    try:
        out = pipe(
            [request.prompt for request in requests],
            image=[references for _, references in rows] if first.images else None,
            negative_prompt=[request.negative_prompt for request in requests],
            height=first.height,
            width=first.width,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance,
            sampler=first.sampler,
            seed=[request.seed for request in requests],
            padding=settings.padding,
            reference_posterior=settings.reference_posterior,
            output_type="pil",
            **settings.acceleration.arguments(),
        )
    except DeepGenError as error:
        return [(request, error) for request, _ in ready]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fix = "use a smaller --batch-size" if size > 1 else "use a smaller --size or split the model with --mesh"
        what = f"{size} images of {first.width}x{first.height} in a batch"
        raise DeepGenError(f"out of memory for {what}; {fix}") from error
    if count_evaluations is not None and (evaluations := getattr(out, "evaluations", None)) is not None:
        count_evaluations(*evaluations)
    return [(request, image) for (request, _), image in zip(ready, out.images, strict=False)]
