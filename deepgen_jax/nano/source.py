"""The procedural world as a data source: rows are numbers, pictures are drawn when they are read.

The path is a list of settings, ``size=96,samples=200000,seed=0``: side of the pictures in pixels, samples of an epoch,
and seed; these values are the defaults. ``skills=single+relation`` cycles through these skills; by default all skills
of the task are mixed. ``background=grey`` selects samples of that background, ``named=shape`` (or colour) edits that
name what they change by that alone, ``things=3`` edits of pictures with three things. ``varied=anywhere`` draws
places, sizes and backgrounds that a caption leaves open, which otherwise have defaults; ``varied=places`` takes only
places that captions could name. ``split`` is "train" or "held_out". With
``questions=1`` and task "edit", the text of a sample is a question about its reference and the answer, to train the
vision-language model.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

from PIL import Image

from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.sources.base import CachedImage, Record, Row, Source
from deepgen_jax.data.storage import FileInfo
from deepgen_jax.data.transforms import UNIT
from deepgen_jax.errors import DeepGenError
from deepgen_jax.nano import samples
from deepgen_jax.nano.world.questions import ask
from deepgen_jax.nano.world.scene import Scene
from deepgen_jax.nano.world.truth import EDIT_SKILLS, PICTURE_SKILLS

_DEFAULTS = {"size": 96, "samples": 200_000, "seed": 0, "questions": 0}


class Synthetic(Source):
    """See `deepgen_jax.nano.samples`."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        values, self._skills, self._only, self._varied = _parse(config)
        self._size, self._samples, self._seed, questions = (values[name] for name in _DEFAULTS)
        self._asks = bool(questions)
        if self._asks and config.task != "edit":
            raise DeepGenError(f"source {config.name}: questions are asked about references; set task=edit")
        if config.split not in samples.SPLITS:
            raise DeepGenError(
                f"source {config.name}: split is {config.split!r}; use {' or '.join(samples.SPLITS)}"
            )

    def files(self) -> list[FileInfo]:
        """One entry without a file; its stamp is the version of the world."""
        return [FileInfo(self.config.path, self._samples, f"world {samples.VERSION}")]

    def scan(self, path: str) -> Iterator[Row]:
        yield from range(self._samples)

    def read(self, row: Row) -> Record:
        text, scenes = self._sample(row)
        return Record(text, tuple(_encoded(samples.render(scene, self._size)) for scene in scenes))

    def read_header(self, row: Row) -> Record:
        text, scenes = self._sample(row)
        return Record(text, (CachedImage((self._size, self._size)),) * len(scenes))

    def _sample(self, row: Row) -> tuple[str, tuple[Scene, ...]]:
        """Text, and scenes of the target and the references."""
        index, kind = int(row), "t2i" if self._asks else self.config.task
        if self._skills:
            index, place = divmod(index, len(self._skills))
            kind = self._skills[place]
        sample = samples.make_sample(
            self.config.split, kind, seed=self._seed, index=index, only=self._only, varied=self._varied
        )
        if self._asks:
            return ask(random.Random(f"{self._seed}/{row}"), sample), (sample.scene, sample.scene)
        return sample.text, (sample.scene, *sample.references)


def _parse(config: SourceConfig) -> tuple[dict[str, int], tuple[str, ...], samples.Only, str]:
    """Numbers by name, the skills (empty for all), the selection of samples, and how scenes vary."""
    values: dict[str, int] = dict(_DEFAULTS)
    skills: tuple[str, ...] = ()
    wanted: dict[str, str] = {}
    things, varied = 0, ""
    for part in config.path.split(","):
        name, equals, text = part.strip().partition("=")
        if name == "skills":
            skills = tuple(text.strip().split("+"))
            continue
        if name in ("background", "named") and text.strip():
            wanted[name] = text.strip()
            continue
        if name == "varied" and text.strip():
            varied = text.strip()
            continue
        if name == "things" and text.strip().isdecimal():
            things = int(text)
            continue
        if name not in values or not equals or not text.strip().isdecimal():
            raise DeepGenError(
                f"source {config.name}: path has {part.strip()!r}; write size=96,samples=200000,seed=0 or a part of "
                "it, skills=single+two for some skills, background=grey, named=shape or things=3 for such samples, "
                "varied=anywhere or varied=places for scenes that vary where captions leave them open"
            )
        values[name] = int(text)
    if values["size"] < 2 * UNIT or values["size"] % UNIT or not values["samples"]:
        raise DeepGenError(
            f"source {config.name}: size is {values['size']} and samples {values['samples']}; sizes are multiples of "
            f"{UNIT} from {2 * UNIT} on, and there must be samples"
        )
    # Questions are asked about pictures of all kinds.
    known = EDIT_SKILLS if config.task == "edit" and not values["questions"] else PICTURE_SKILLS
    if unknown := [skill for skill in skills if skill not in known]:
        raise DeepGenError(
            f"source {config.name}: skill {unknown[0]!r} is none of task {config.task}; use some of {', '.join(known)}"
        )
    if len(set(skills)) < len(skills):
        raise DeepGenError(
            f"source {config.name}: path names a skill twice; use a second source, with a weight"
        )
    try:
        only = samples.Only(**wanted, things=things)
        only.check(skills or known)
        if varied:
            samples.check_varied(skills or known, varied)
    except DeepGenError as error:
        raise DeepGenError(f"source {config.name}: {error}") from None
    return values, skills, only, varied


def _encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    # Barely compressed: it is decoded again at once.
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
