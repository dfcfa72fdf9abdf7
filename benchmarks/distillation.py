"""Does a distilled student keep its teacher's pictures and their variety? Scores of models by number of evaluations.

    python benchmarks/distillation.py teacher=out/nano/open_teacher_model@50,4,2,1 student=out/nano/open_student_model

The world's captions leave places, sizes and backgrounds open (``varied`` of the synthetic source), so that many
pictures answer a prompt. For each model and number of evaluations, the exact scorer of the world counts right pictures
of captions that leave the place open, pictures with more things than asked for (doubled), and pictures with a thing
that has no shape or colour of the world, or with no plain background (unclear). The width of outlines measures blur.
Over many seeds of the same prompts, the places of things have a spread, and sizes and backgrounds an entropy; true
scenes of the world give the values to expect. A flow makes one picture of one noise: the PSNR to the first model's
pictures of most evaluations says how well it was followed.

Scores and pictures are kept in ``--out``; later calls add to them. ``--page`` writes the table of all scores there into
a page, with a sheet of pictures and a plot beside it.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import Parser, progress
from PIL import Image, ImageDraw

from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.intervals import wilson
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.nano.benchmark import generated
from deepgen_jax.nano.samples import Sample, make_sample, render
from deepgen_jax.nano.world import pictures
from deepgen_jax.nano.world.find import View, look
from deepgen_jax.nano.world.scene import Scene
from deepgen_jax.nano.world.score import score
from deepgen_jax.nano.world.truth import Truth, Wanted

#: Prompts whose seeds are compared; they say nothing of places, sizes and backgrounds.
OPEN = (("red", "circle"), ("blue", "star"), ("green", "triangle"), ("purple", "cross"))
SIZE = 96
#: Lines of the page around the table of a kind of scenes.
BEGIN, END = "<!-- begin of distillation.py, {} -->", "<!-- end of distillation.py, {} -->"
#: Pictures of an open prompt in the sheet.
SHOWN = 3
#: Resamples of the bootstrap.
RESAMPLES = 1000
#: Name of the row of true scenes.
WORLD = "true scenes"


@dataclass(frozen=True)
class Setting:
    """How pictures are made.

    Attributes:
      name: of the model.
      steps: evaluations; 0 for true scenes.
      guidance: scale, 1 for none.
      spaced: sample a model that is no student as one (Euler's method at a student's noise levels), where the
        scheduler's last step starts from almost no noise.
    """

    name: str
    steps: int
    guidance: float = 1.0
    spaced: bool = False

    @property
    def label(self) -> str:
        """Evaluations in words."""
        words = [str(self.steps or "")]
        words += [f"guidance {self.guidance:g}"] * (self.guidance != 1)
        return ", ".join([*words, *["student's levels"] * self.spaced])


@dataclass(frozen=True)
class Scores:
    """Scores of one setting; each is (value, low, high) with a 95% interval.

    Attributes:
      right: share of all pictures, those of captions of the world and of open prompts.
      doubled, unclear: shares of the pictures of captions of the world.
      outline: mean width of outlines in pixels.
      spread: root mean square distance of things from their mean place, over the seeds of a prompt, as a share of the
        picture's side; mean over things and prompts.
        Of right pictures, as are entropies.
      sizes, backgrounds: entropy over the seeds of a prompt in bits, at most 1 and 2; mean over prompts.
      pictures: whether each picture is right, those of captions first.
    """

    right: tuple[float, float, float]
    doubled: tuple[float, float, float]
    unclear: tuple[float, float, float]
    outline: tuple[float, float, float]
    spread: tuple[float, float, float]
    sizes: tuple[float, float, float]
    backgrounds: tuple[float, float, float]
    pictures: tuple[bool, ...]


def captioned(count: int, varied: str) -> list[Sample]:
    """Samples of single things whose captions leave the place open, of a seed that no training uses."""
    drawn = (make_sample("train", "single", seed=1, index=i, varied=varied) for i in itertools.count())
    return list(itertools.islice((sample for sample in drawn if not sample.truth.things[0].place), count))


def open_samples(seeds: int, varied: str) -> list[Sample]:
    """``seeds`` samples of each prompt of `OPEN`, each with another scene."""
    rng = random.Random(0)
    found: list[Sample] = []
    for colour, shape in OPEN:
        truth = Truth("single", (Wanted(colour, shape),))
        sample = Sample(f"a {colour} {shape}", Scene("white", ()), (), truth, ())
        found += [pictures.varied(rng, sample, varied) for _ in range(seeds)]
    return found


def images_of(setting: Setting, samples: Sequence[Sample], pipe: DeepGenPipeline, batch: int) -> list[np.ndarray]:
    """Pictures of the samples, uint8 [H, W, 3]; sample i is made with seed i."""
    make = generated(
        pipe, SIZE, steps=setting.steps, guidance=setting.guidance, seed=0, batch_size=batch,
        sampler="pi_flow" if setting.spaced else pipe.config.sampler,
    )  # fmt: skip
    return [images.done for images in make(samples)]


def outline_width(image: np.ndarray, view: View) -> float:
    """Mean width of the outlines in a picture, in pixels; NaN without things.

    On a path across an outline the cover of a thing, 0 to 1, changes linearly over the width w; the integral of
    4 c (1 - c) is 2 w / 3. Divided by the length of the outline, which the total variation of c gives.
    """
    if not view.things:
        return math.nan
    pixels = image.astype(np.float32)
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    distance = np.linalg.norm(pixels - np.median(edge, axis=0), axis=-1)
    height, width = distance.shape
    # Each pixel belongs to the nearest thing, whose contrast is the one at its middle.
    rows, columns = np.indices(distance.shape)
    places = [(thing.y * height, thing.x * width) for thing in view.things]
    nearest = np.argmin([np.hypot(rows - y, columns - x) for y, x in places], axis=0)
    peaks = [np.quantile(distance[nearest == i], 0.98) for i in range(len(places))]
    cover = np.clip(distance / np.maximum(np.array(peaks)[nearest], 1), 0, 1)
    cover[cover < 0.08] = 0  # Noise of the background.
    length = np.hypot(*np.gradient(cover)).sum()
    return float(1.5 * (4 * cover * (1 - cover)).sum() / max(length, 1e-6))


def measure(
    samples: Sequence[Sample], images: Sequence[np.ndarray], opened: Sequence[Sample], shown: Sequence[np.ndarray]
) -> Scores:
    """Scores of the pictures of captions of the world and of open prompts."""
    views = [look(image) for image in images]
    right = [score(image, sample.truth, _unread).done for sample, image in zip(samples, images, strict=True)]
    doubled = [len(view.things) > len(sample.truth.things) for sample, view in zip(samples, views, strict=True)]
    unclear = [
        view.background is None or any(None in (thing.colour, thing.shape) for thing in view.things) for view in views
    ]
    widths = np.array([outline_width(image, view) for image, view in zip(images, views, strict=True)])
    widths = widths[np.isfinite(widths)]
    clear = [score(image, sample.truth, _unread).done for sample, image in zip(opened, shown, strict=True)]
    seeds = len(opened) // len(OPEN)
    groups = [
        [look(shown[k]) for k in range(first, first + seeds) if clear[k]] for first in range(0, len(opened), seeds)
    ]
    return Scores(
        _share(right + clear), _share(doubled), _share(unclear), _mean(widths), _resampled(groups, _spread),
        _resampled(groups, _size_entropy), _resampled(groups, _background_entropy), (*right, *clear),
    )  # fmt: skip


def _spread(views: Sequence[View]) -> float:
    places = np.array([(view.things[0].x, view.things[0].y) for view in views])
    return float(np.sqrt(places.var(axis=0).sum()))


def _size_entropy(views: Sequence[View]) -> float:
    return _entropy([view.things[0].size for view in views])


def _background_entropy(views: Sequence[View]) -> float:
    return _entropy([view.background for view in views])


def _entropy(values: Sequence[str | None]) -> float:
    shares = np.array(list(Counter(values).values())) / len(values)
    return float(-(shares * np.log2(shares)).sum())


def _resampled(
    groups: Sequence[Sequence[View]], statistic: Callable[[Sequence[View]], float]
) -> tuple[float, float, float]:
    """Mean over prompts of a statistic of their right pictures, with a bootstrap interval over seeds."""
    kept = [views for views in groups if len(views) > 1]
    if not kept:
        return math.nan, math.nan, math.nan
    rng = random.Random(0)
    draws = [np.mean([statistic(rng.choices(views, k=len(views))) for views in kept]) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(np.mean([statistic(views) for views in kept])), float(low), float(high)


def _share(values: Sequence[bool]) -> tuple[float, float, float]:
    return sum(values) / len(values), *wilson(sum(values), len(values))


def _mean(values: np.ndarray) -> tuple[float, float, float]:
    if len(values) < 2:
        return math.nan, math.nan, math.nan
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def _unread(sign: np.ndarray) -> list[str]:
    """The prompts have no words."""
    return []


def table(results: Results) -> Iterator[str]:
    """The scores in Markdown."""
    columns = ("pictures", "evaluations", "right, %", "points to the teacher", "doubled, unclear, %",
               "outline, pixels", "spread of places", "sizes, backgrounds, bits", "PSNR, dB")  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    for setting, scores in results.rows:
        likeness, points = results.likeness(setting), results.points(setting)
        cells = [
            setting.name, setting.label, _interval(scores.right, 100), "" if points is None else _interval(points, 100),
            f"{100 * scores.doubled[0]:.1f}, {100 * scores.unclear[0]:.1f}", f"{scores.outline[0]:.2f}",
            _interval(scores.spread, 1, 3), "" if math.isnan(scores.sizes[0]) else _pair(scores),
            "" if likeness is None else f"{likeness:.1f}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _pair(scores: Scores) -> str:
    return f"{scores.sizes[0]:.2f}, {scores.backgrounds[0]:.2f}"


def _interval(values: Sequence[float], factor: float, digits: int = 1) -> str:
    """The value and its interval; empty where no prompt has two right pictures."""
    if math.isnan(values[0]):
        return ""
    value, low, high = (f"{factor * x:.{digits}f}" for x in values)
    return f"{value} ({low} to {high})"


class Results:
    """Scores and pictures in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "scores.json"
        values = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else []
        self._rows = {Setting(**row["setting"]): Scores(**row["scores"]) for row in values}

    @property
    def rows(self) -> list[tuple[Setting, Scores]]:
        """By model in the order of their first scores, most evaluations first."""
        names = list(dict.fromkeys(setting.name for setting in self._rows))
        return sorted(self._rows.items(), key=lambda row: (names.index(row[0].name), row[0].spaced, -row[0].steps))

    def add(self, setting: Setting, scores: Scores, images: Sequence[np.ndarray]) -> None:
        """Saves the scores, and the pictures of the open prompts."""
        self._rows[setting] = scores
        values = [{"setting": asdict(key), "scores": asdict(value)} for key, value in self._rows.items()]
        self._file.write_text(json.dumps(values, indent=1), encoding="utf-8")
        np.save(self._pictures(setting), np.stack(images))

    @property
    def _reference(self) -> Setting | None:
        """The first model with most evaluations."""
        return next((setting for setting, _ in self.rows if setting.steps), None)

    def points(self, setting: Setting) -> tuple[float, float, float] | None:
        """Share of right pictures less that of the reference, of the same prompts and noise; None for the reference.

        Raises:
          DeepGenError: the scores are of other numbers of pictures.
        """
        reference = self._reference
        if reference is None or setting == reference or not setting.steps:
            return None
        first, second = (np.array(self._rows[which].pictures, float) for which in (reference, setting))
        if len(first) != len(second):
            raise DeepGenError(f"{self.folder} has scores of other --prompts or --seeds; choose another --out")
        return _mean(second - first)

    def likeness(self, setting: Setting) -> float | None:
        """PSNR in dB to the reference's pictures of the same noise; None where there are none."""
        reference = self._reference
        if reference is None or setting == reference or not setting.steps:
            return None
        paths = [self._pictures(which) for which in (reference, setting)]
        if not all(path.exists() for path in paths):
            return None
        first, second = (np.load(path).astype(np.float32) for path in paths)
        if first.shape != second.shape:
            raise DeepGenError(f"{self.folder} has pictures of other --seeds; choose another --out")
        return float(10 * np.log10(255**2 / max(np.mean(np.square(first - second)), 1e-6)))

    def sheet(self, out: Path) -> None:
        """A row a setting: pictures of the same prompts and seeds."""
        band, width = 14, SHOWN * len(OPEN) * SIZE
        rows = [setting for setting, _ in self.rows if self._pictures(setting).exists()]
        image = Image.new("RGB", (width, len(rows) * (SIZE + band)), "white")
        draw = ImageDraw.Draw(image)
        for row, setting in enumerate(rows):
            top = row * (SIZE + band)
            draw.text((2, top + 1), f"{setting.name} {setting.label}", "black")
            shown = np.load(self._pictures(setting))
            seeds = len(shown) // len(OPEN)
            picked = [shown[prompt * seeds + k] for prompt in range(len(OPEN)) for k in range(SHOWN)]
            image.paste(Image.fromarray(np.concatenate(picked, axis=1)), (0, top + band))
        image.quantize(128).save(out, optimize=True)

    def _pictures(self, setting: Setting) -> Path:
        kind = "_spaced" * setting.spaced
        return self.folder / f"{setting.name}_{setting.steps}_{setting.guidance:g}{kind}.npy".replace(" ", "_")


def plot(rows: Sequence[tuple[Setting, Scores]], out: Path) -> None:
    """Scores over the number of evaluations, a line a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
    titles = {"right": "right pictures", "unclear": "unclear pictures", "spread": "spread of places"}
    for panel, (field, title) in zip(panels, titles.items(), strict=True):
        lines: dict[str, list[tuple[int, tuple[float, float, float]]]] = {}
        for setting, scores in rows:
            if setting.steps:
                name = setting.name + ", student's levels" * setting.spaced
                lines.setdefault(name, []).append((setting.steps, getattr(scores, field)))
        for name, points in lines.items():
            x, y = [steps for steps, _ in points], np.array([values for _, values in points])
            # Wilson's limits can be past 0 or 1 by rounding.
            errors = np.maximum([y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]], 0)
            panel.errorbar(x, y[:, 0], errors, marker="o", capsize=2, label=name)
        true = [getattr(scores, field)[0] for setting, scores in rows if not setting.steps]
        panel.axhline(true[0], color="grey", linestyle=":", label=WORLD)
        panel.set(title=title, xlabel="evaluations", xscale="log")
        ticks = sorted({setting.steps for setting, _ in rows if setting.steps})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(out, dpi=110)


def write_page(results: Results, page: Path, varied: str) -> None:
    """Puts the table between the lines `BEGIN` and `END` of a page, and draws its pictures beside it."""
    text, begin, end = page.read_text(encoding="utf-8"), BEGIN.format(varied), END.format(varied)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise DeepGenError(f"{page} has no place for the table; write {begin!r} and {end!r} there, a line each")
    before, _, rest = text.partition(begin)
    lines = [f"{before}{begin}", "", *table(results), "", end]
    page.write_text("\n".join(lines) + rest.partition(end)[2], encoding="utf-8")
    folder = page.parent / "images"
    folder.mkdir(exist_ok=True)
    results.sheet(folder / f"distillation_{varied}.png")
    plot(results.rows, folder / f"distillation_{varied}_scores.png")


def parse_models(words: Sequence[str]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, folder, numbers of evaluations) of "name=FOLDER@50,4"; without @ the model's own number."""
    found = []
    for word in words:
        name, equals, rest = word.partition("=")
        folder, at, steps = rest.partition("@")
        numbers = steps.split(",") if at else []
        if not (name and equals and folder) or not all(n.isdecimal() and int(n) for n in numbers):
            raise DeepGenError(f"{word!r} is not NAME=FOLDER@STEPS,STEPS, such as teacher=out/teacher@50,4,1")
        found.append((name, folder, tuple(map(int, numbers))))
    return found


def run(args: Any) -> None:
    """Scores the models, and writes the page."""
    models, results = parse_models(args.models), Results(args.out)
    samples, opened = captioned(args.prompts, args.varied), open_samples(args.seeds, args.varied)

    def add(setting: Setting, images: Sequence[np.ndarray]) -> None:
        scores = measure(samples, images[: len(samples)], opened, images[len(samples) :])
        results.add(setting, scores, images[len(samples) :])
        progress(f"{setting.name} {setting.label}: right {scores.right[0]:.1%}, spread {scores.spread[0]:.3f}")

    everything = [*samples, *opened]
    world = Setting(WORLD, 0)
    if world not in dict(results.rows):
        add(world, [np.asarray(render(sample.scene, SIZE)) for sample in everything])
    for name, folder, numbers in models:
        pipe = DeepGenPipeline.from_pretrained(folder, dtype="float32")
        for steps in numbers or (pipe.config.num_inference_steps,):
            setting = Setting(name, steps, args.guidance, args.spaced)
            add(setting, images_of(setting, everything, pipe, args.batch))
    if args.page:
        write_page(results, args.page, args.varied)
    else:
        print("\n".join(table(results)))


def main() -> int:
    """The command line."""
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER@STEPS,...", help="models to score")
    parser.add_argument("--varied", choices=pictures.VARIED_PLACES, default="places", help="places of things (places)")
    parser.add_argument("--prompts", type=int, default=400, help="captions of the world (400)")
    parser.add_argument("--seeds", type=int, default=64, help=f"seeds of each of {len(OPEN)} open prompts (64)")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale (1)")
    parser.add_argument("--spaced", action="store_true", help="Euler's method at the noise levels of a few-step policy")
    parser.add_argument("--batch", type=int, default=32, help="pictures made at once (32)")
    parser.add_argument("--out", type=Path, default=Path("out/distillation"), help="folder of scores and pictures")
    parser.add_argument("--page", type=Path, metavar="MD", help="page to write the table into")
    args = parser.parse_args()
    if args.prompts < 1 or args.seeds < SHOWN:
        parser.error(f"--prompts must be at least 1 and --seeds at least {SHOWN}")
    try:
        run(args)
    except DeepGenError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
