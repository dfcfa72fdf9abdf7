"""Configuration of training data: sources, mixture of tasks, image sizes, reading."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from deepgen_jax.data.images import MAX_PIXELS
from deepgen_jax.data.source_kinds import SOURCE_KINDS
from deepgen_jax.data.transforms import MODES, target_size
from deepgen_jax.errors import DeepGenError, did_you_mean
from deepgen_jax.local_paths import LocalPath

T = TypeVar("T")

TASKS = ("t2i", "edit")
#: What `SourceConfig.fields` may rename.
FIELDS = ("text", "image", "references", "annotation")
#: Left padding that the model sees: none, or up to the longest prompt of the micro-batch, as in the released system.
PADDINGS = ("masked", "batch")
# In bytes.
_LONGEST_NAME = 100


@dataclass(frozen=True)
class SourceConfig:
    """One data set.

    Attributes:
      name: short and unique; used in sample ids, counts and messages.
      kind: its format, a name in `deepgen_jax.data.source_kinds.SOURCE_KINDS`, ``module:Class`` or ``file.py:Class``.
      path: a file, a folder, or a pattern with ``*`` or ``{000..123}``; local or an fsspec address (``gs://...``). Of a
        synthetic source, what is drawn: ``size=96,samples=200000,seed=0``.
      task: "t2i" (text, image) or "edit" (instruction, reference images, image).
      weight: its share of the task's samples, relative to the other sources'. None for all sources of a task draws
        all samples equally often.
      root: folder from which relative image paths start; "" is the folder of the file that names them.
      fields: names in this data set of "text", "image" (the target) and "references", where they are not the usual
        ones; in caption sets also "annotation".
      split: of a TFDS data set, such as "train" or "train[:90%]"; of a synthetic source, "train" or "held_out".
    """

    name: str
    kind: str
    path: str
    task: str = "t2i"
    weight: float | None = None
    root: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/@\\") or not self.name.isprintable():
            raise DeepGenError(f"source name {self.name[:80]!r} must be a word without / \\ or @")
        if len(self.name.encode()) > _LONGEST_NAME:
            # Folders of the index and of cached features are named after it.
            raise DeepGenError(f"source name {self.name[:20]}... is longer than {_LONGEST_NAME} bytes; shorten it")
        where = f"source {self.name}"
        SOURCE_KINDS.target(self.kind, f"{where}: kind")
        _one_of(self.task, TASKS, f"{where}: task")
        if not self.path:
            raise DeepGenError(f"{where}: path is empty; name a file, a folder or a pattern")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise DeepGenError(f"{where}: weight is {self.weight}; it must be positive")
        for name in self.fields:
            _one_of(name, FIELDS, f"{where}: fields")


@dataclass(frozen=True)
class MixtureConfig:
    """How micro-batches of the tasks alternate; give ``cycle`` or ``weights``.

    Attributes:
      cycle: tasks of successive micro-batches, over and over. Accumulate a multiple of its length in a step, so that
        every step holds the same shares.
      weights: (task, weight) pairs instead of a cycle: tasks come in proportion to their weights, evenly spread.
    """

    cycle: tuple[str, ...] = ("edit", "t2i", "t2i")
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "cycle", tuple(self.cycle))
        object.__setattr__(self, "weights", tuple((str(task), float(weight)) for task, weight in self.weights))
        if bool(self.cycle) == bool(self.weights):
            raise DeepGenError("mixture: give either cycle or weights, and leave the other empty")
        for task in self.tasks:
            _one_of(task, TASKS, "mixture: task")
        if any(not 0 < weight < float("inf") for _, weight in self.weights) or len(self.weights) > len(TASKS):
            raise DeepGenError("mixture: weights must be positive, one for each task")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that occur, each once."""
        return tuple(dict.fromkeys(self.cycle or (task for task, _ in self.weights)))


@dataclass(frozen=True)
class DataConfig:
    """Data of a run: sources, order, sizes, and reading.

    Attributes:
      micro_batch: samples of a micro-batch over all hosts.
      seed: of order and text dropping.
      image_size: side of the square aimed at, in pixels.
      transform: how an image gets its size, see `deepgen_jax.data.transforms.target_size`; target and references alike.
      exact_sizes: every size of the rule is a bucket.
      bucket_tolerance: otherwise a rare size joins a common one that differs in at most this share of its pixels ...
      bucket_share: ... where rare means: fewer than this share of the task's samples.
      min_side, max_aspect: samples with an image whose side is at most ``min_side`` pixels, or whose longer side
        exceeds ``max_aspect`` times the shorter, are left out.
      max_references: samples with more reference images are left out.
      max_pixels: larger images count as bad (decompression bombs).
      text_drop: probability with which a text-to-image prompt is replaced by the empty one.
      token_multiple: prompt lengths, think tokens included, are rounded up to multiples of this.
      padding: which padding tokens the model sees, one of `PADDINGS`.
      max_bad_share: a source with a larger share of bad samples stops the run.
      cache_dir: where indices are kept; "" is ``$DEEPGEN_CACHE`` or ``~/.cache/deepgen-jax``.
      threads: threads that read and decode in each reading process; 0 is the number of cores, shared among the workers.
        Remote data need more, because threads wait for the store.
      workers: reading processes; 0 reads in threads of this process.
      prefetch: micro-batches prepared ahead, in each worker.
      index_workers: processes that build an index; 0 chooses by the number of samples.
    """

    sources: tuple[SourceConfig, ...]
    micro_batch: int
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    seed: int = 0
    image_size: int = 512
    transform: str = "fix_pixels"
    exact_sizes: bool = False
    bucket_tolerance: float = 0.07
    bucket_share: float = 0.01
    min_side: int = 80
    max_aspect: float = 10.0
    max_references: int = 8
    max_pixels: int = MAX_PIXELS
    text_drop: float = 0.1
    token_multiple: int = 64
    padding: str = "masked"
    max_bad_share: float = 0.05
    cache_dir: LocalPath = ""
    threads: int = 0
    workers: int = 0
    prefetch: int = 2
    index_workers: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        _one_of(self.transform, MODES, "data: transform")
        _one_of(self.padding, PADDINGS, "data: padding")
        target_size(1, 1, self.image_size, self.transform)
        if not self.sources:
            raise DeepGenError("data: there are no sources; name at least one")
        names = [source.name for source in self.sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DeepGenError(f"data: two sources are called {twice[0]}; give each its own name")
        for name, low, high in (
            ("micro_batch", 1, None), ("seed", 0, 2**63), ("min_side", 0, None), ("max_aspect", 1, None),
            ("max_references", 1, None), ("max_pixels", 1, None), ("text_drop", 0, 1), ("token_multiple", 1, None),
            ("max_bad_share", 0, 1), ("bucket_tolerance", 0, 1), ("bucket_share", 0, 1), ("threads", 0, None),
            ("workers", 0, None), ("prefetch", 1, None), ("index_workers", 0, None),
        ):  # fmt: skip
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                limits = f"at least {low}" if high is None else f"from {low} to {high}"
                raise DeepGenError(f"data: {name} is {value}; it must be {limits}")
        for task in TASKS:
            kinds = {source.kind == "features" for source in self.sources if source.task == task}
            if len(kinds) > 1:
                uncached = ", ".join(s.name for s in self.sources if s.task == task and s.kind != "features")
                raise DeepGenError(
                    f"data: some sources of task {task} are cached features and some are not ({uncached}); run "
                    "`deepgen data cache` over all of the task's sources, or over none"
                )
            weights = [source.weight for source in self.sources if source.task == task]
            some = any(weight is not None for weight in weights)
            if (task in self.mixture.tasks) != bool(weights):
                order = "cycle" if self.mixture.cycle else "weights"
                fix = f"name a source of it, or leave it out of mixture.{order}"
                if weights:
                    fix = f"put it into mixture.{order}, or leave its sources out"
                raise DeepGenError(f"data: task {task} has {len(weights)} sources and the mixture disagrees; {fix}")
            if some and None in weights:
                raise DeepGenError(
                    f"data: some sources of task {task} have a weight and some none; give a weight to all or to none"
                )

    def cached(self, task: str) -> bool:
        """Whether a task's samples are features written by `deepgen data cache`; all of a task are, or none."""
        return any(source.kind == "features" for source in self.sources if source.task == task)


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "data") -> T:
    """A config dataclass from a parsed JSON or YAML file; names that are left out keep their defaults.

    Raises:
      DeepGenError: a name is unknown or a required one is missing.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        _one_of(name, fields, where)
        if hints[name] is MixtureConfig:
            value = from_mapping(MixtureConfig, value, f"{where}.{name}")
        elif name == "sources":
            value = tuple(from_mapping(SourceConfig, item, f"{where}.{name}[{i}]") for i, item in enumerate(value))
        parsed[name] = value
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in parsed]:
        raise DeepGenError(f"{where}: {', '.join(missing)} must be given")
    return cls(**parsed)


def _one_of(name: str, known: Iterable[str], where: str) -> None:
    known = list(known)
    if name not in known:
        raise DeepGenError(f"{where}: {name!r} is unknown{did_you_mean(str(name), known)}")
