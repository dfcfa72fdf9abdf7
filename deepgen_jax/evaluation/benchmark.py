"""Interface of benchmarks: reading rows, file layout of images, questions to judges, aggregation of scores."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.figures import Cell, Measure
from deepgen_jax.inference.batch import EDIT_NEGATIVE_PROMPT

#: Kind of scorer: a vision-language model, OCR, the benchmark's official code, or an exact program.
Scorer = Literal["judge", "ocr", "official", "exact"]


@dataclass(frozen=True)
class Reading:
    """Inputs of a benchmark.

    Attributes:
      data: file or folder of the benchmark's inputs.
      model: name of the model, which is part of some trees.
      splits: only these; () for all that ``data`` holds.
      images: folder of the source images; None for the folder of the file that names them.
    """

    data: Path
    model: str
    splits: tuple[str, ...] = ()
    images: Path | None = None


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    Attributes:
      key: unique name within the benchmark.
      prompt: text for the model.
      files: paths of the images to make, in the tree.
      file, row: where the prompt was read.
      category: category of its score.
      sources: source images of an edit; relative paths are in the tree.
      facts: attributes of the row that scoring needs, JSON-ready.
    """

    key: str
    prompt: str
    files: tuple[str, ...]
    file: str
    row: int
    category: str = ""
    sources: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Item:
        """The inverse of `to_json`."""
        return cls(**{**values, "files": tuple(values["files"]), "sources": tuple(values["sources"])})


@dataclass(frozen=True)
class Question:
    """A question to a judge about an image, answered with numbers inside ``<answer></answer>``.

    Attributes:
      name: names it among the image's questions.
      text: without the instruction how to answer, which is added.
      images: shown before the text, in this order.
      count: numbers in the answer, separated by commas.
      low, high: the least and the greatest of them, whole numbers.
      yes_no: the answer is "yes" (1) or "no" (0).
    """

    name: str
    text: str
    images: tuple[Path, ...]
    count: int = 1
    low: int = 0
    high: int = 1
    yes_no: bool = False


@dataclass(frozen=True)
class ImageScore:
    """An image's score, for sorting, and what it adds to the benchmark's groups."""

    score: float
    cells: tuple[Cell, ...]


#: Answers by question name; questions without a readable answer are absent.
Answers = Mapping[str, Sequence[float]]


class Benchmark(abc.ABC):
    """A benchmark; subclasses set the attributes and implement `read` and, for judges, `questions` and `score`.

    Attributes:
      title: as its authors write it.
      task: "generate" or "edit".
      images: images a prompt.
      scorer: who scores.
      protocol: version of questions and aggregation, shown with every figure.
      repository, licence: of the official inputs.
      inputs: what --data takes, for help and messages.
      splits: names for --split.
      steps, guidance, side: DeepGen's published settings.
      square_sources: pictures to edit are resized to the image's size, their aspect lost, as DeepGen's scripts do.
    """

    title: ClassVar[str]
    task: ClassVar[Literal["generate", "edit"]] = "generate"
    images: ClassVar[int] = 1
    scorer: ClassVar[Scorer] = "judge"
    protocol: ClassVar[str]
    repository: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    inputs: ClassVar[str] = ""
    splits: ClassVar[tuple[str, ...]] = ()
    steps: ClassVar[int] = 50
    guidance: ClassVar[float] = 4.0
    side: ClassVar[int] = 512
    square_sources: ClassVar[bool] = True
    padding: ClassVar[Literal["reference", "masked"]] = "reference"

    @property
    def negative_prompt(self) -> str:
        """DeepGen's: nothing for generation, a list of faults for editing."""
        return EDIT_NEGATIVE_PROMPT if self.task == "edit" else ""

    @abc.abstractmethod
    def read(self, reading: Reading) -> list[Item]:
        """The benchmark's prompts, in the order of its files.

        Raises:
          DeepGenError: the data cannot be read; the message names file, row and missing column.
        """

    def prepare(self, items: Sequence[Item], reading: Reading, out: Path) -> None:  # noqa: B027
        """Writes files of the tree other than generated images; may be called again on a resumed run."""

    def sheets(self, items: Sequence[Item]) -> Mapping[str, Sequence[str]]:
        """Contact sheets in the tree: file -> files of the images it shows, which are then stored elsewhere."""
        return {}

    def seed(self, item: Item, number: int, seed: int) -> int | None:
        """The seed of an image; None derives it from ``seed`` and the image's file."""
        return None

    def official(self, out: Path, items: Sequence[Item]) -> list[str]:
        """Commands of the official scorer, from the root of its repository."""
        return []

    def read_official(self, path: Path, items: Sequence[Item], out: Path) -> dict[str, ImageScore]:
        """Scores by file from what the official scorer wrote.

        Raises:
          DeepGenError: the file cannot be read, or results of this benchmark cannot be read at all.
        """
        raise DeepGenError(f"results of the official scorer of {self.title} are not read; leave out --results")

    def questions(self, item: Item, number: int, out: Path) -> list[Question]:
        """Questions to the judge about image ``number`` of an item."""
        raise DeepGenError(f"{type(self).__name__} has no questions for a judge; implement questions() and score()")

    def score(self, item: Item, number: int, answers: Answers) -> ImageScore | None:
        """An image's score; None if answers that it needs are missing."""
        raise DeepGenError(f"{type(self).__name__} has no scores from answers; implement score()")

    def score_pixels(self, item: Item, image: np.ndarray) -> ImageScore | None:
        """An image's score by exact code; ``image`` is uint8 [H, W, 3]."""
        raise DeepGenError(f"{type(self).__name__} is not scored by code here; implement score_pixels()")

    def measures(self, groups: Sequence[str]) -> list[Measure]:
        """The benchmark's figures over the groups that have data, the main one first."""
        raise DeepGenError(f"{type(self).__name__} has no figures; implement measures()")


def check_distinct(items: Sequence[Item]) -> None:
    """Raises a DeepGenError where two items have the same key or file."""
    seen: dict[str, Item] = {}
    for item in items:
        for name in (item.key, *item.files):
            first = seen.setdefault(name.casefold(), item)
            if first is not item:
                raise DeepGenError(
                    f"{item.file}, row {item.row}: {name} is also that of {first.file}, row {first.row}; "
                    "remove one of the rows"
                )


def source_path(item: Item, out: Path) -> Path:
    """Path of the single source image."""
    return out / item.sources[0]


def image_file(row_file: Path, images: Path | None, name: str, where: str) -> str:
    """Absolute path of a picture that a row names.

    Raises:
      DeepGenError: it leaves the folder, or there is no such file.
    """
    root = images or row_file.parent
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DeepGenError(f"{where}: the picture {name!r} leaves its folder; check the file")
    if not path.is_file():
        raise DeepGenError(f"{where}: the picture {path} does not exist; give its folder with --images")
    return str(path.absolute())
