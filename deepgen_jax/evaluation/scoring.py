"""Scores of a run's images: by a judge, by OCR and CLIP, by exact code, or from what an official scorer wrote."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from deepgen_jax.data.images import load_image
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Benchmark, ImageScore, Item, Question
from deepgen_jax.evaluation.figures import Figure, Table
from deepgen_jax.evaluation.judging import ask_all
from deepgen_jax.evaluation.run import RunFolder
from deepgen_jax.files import read_text, write_text
from deepgen_jax.rewards.judge import Judge
from deepgen_jax.terminal import progress_bar

_SCORES, _ANSWERS, _WORDS = "scores.json", "answers.jsonl", "words.jsonl"


@dataclass(frozen=True)
class Scores:
    """Scores of a run.

    Attributes:
      judge: who scored: the judge's model, "rapidocr ...", "official scorer" or "exact".
      protocol: version of questions and aggregation.
      figures: the main one first.
      images: score of each image by file.
      wanted, made, scored: images that the run asks for, that are there, and that have a score.
      missing: questions without an answer, by reason; never counted as zero.
      unreadable: replies that could not be read, by reason, of questions that may have been answered later.
      notes: what was left out, and how to get it.
    """

    judge: str
    protocol: str
    figures: Sequence[Figure]
    images: Mapping[str, float]
    wanted: int
    made: int
    missing: Mapping[str, int] = field(default_factory=dict)
    unreadable: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "judge": self.judge, "protocol": self.protocol, "wanted": self.wanted, "made": self.made,
            "scored": len(self.images), "missing": dict(self.missing), "unreadable": dict(self.unreadable),
            "notes": list(self.notes), "figures": [figure.to_json() for figure in self.figures],
            "images": dict(self.images),
        }  # fmt: skip

    @property
    def by(self) -> str:
        """Scorer and protocol, shown with every figure."""
        return f"judge: {self.judge}, protocol: {self.protocol}"


def write_scores(folder: RunFolder, scores: Scores) -> Path:
    """Writes ``scores.json`` into the run's records; returns its path."""
    path = folder.records / _SCORES
    write_text(path, json.dumps(scores.to_json(), indent=1, ensure_ascii=False) + "\n")
    return path


def read_scores(folder: RunFolder) -> Scores | None:
    """The scores of a run; None if it has none.

    Raises:
      DeepGenError: they are damaged.
    """
    path = folder.records / _SCORES
    if not path.is_file():
        return None
    try:
        values = json.loads(read_text(path))
        figures = [Figure(**figure) for figure in values["figures"]]
        names = ("judge", "protocol", "images", "wanted", "made", "missing", "unreadable", "notes")
        return Scores(figures=figures, **{name: values[name] for name in names})
    except (ValueError, KeyError, TypeError) as error:
        raise DeepGenError(f"{path} is damaged ({error}); run `deepgen eval score` again") from None


def lines(title: str, scores: Scores) -> Iterator[str]:
    """The figures for people."""
    yield f"{title} ({scores.by})"
    width = max([len(figure.name) for figure in scores.figures] or [0])
    for figure in scores.figures:
        interval = f"95% {figure.interval}" if figure.low < figure.high else figure.interval
        yield f"  {figure.name:<{width}}  {figure.shown}  {interval}  ({figure.prompts} prompts)"
    yield f"  images: {scores.wanted} wanted, {scores.made} made, {len(scores.images)} scored"
    for label, counts in (("without an answer", scores.missing), ("replies that could not be read", scores.unreadable)):
        if counts:
            parts = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            yield f"  {label}: {parts}; none counts as zero"
    for note in scores.notes:
        yield f"  {note}"


@dataclass(frozen=True)
class MadeImage:
    """An image that is there: its item, its number among the item's, and its file in the tree."""

    item: Item
    number: int
    file: str


def made_images(items: Sequence[Item], out: Path) -> list[MadeImage]:
    """The images that are there.

    Raises:
      DeepGenError: there are none.
    """
    found = [MadeImage(item, k, file) for item in items for k, file in enumerate(item.files) if (out / file).is_file()]
    if not found:
        raise DeepGenError(f"{out} holds no image of the run; make them with `deepgen eval` first")
    return found


def score_by_judge(benchmark: Benchmark, items: Sequence[Item], out: Path, judge: Judge, tries: int = 3) -> Scores:
    """Scores of a judge benchmark; see `ask_all`.

    Raises:
      DeepGenError: there is nothing to ask, or the judge cannot be asked.
    """
    there = made_images(items, out)
    questions: list[Question] = []
    owners: list[tuple[int, str]] = []
    for place, shot in enumerate(there):
        for question in benchmark.questions(shot.item, shot.number, out):
            questions.append(question)
            owners.append((place, question.name))
    if not questions:
        raise DeepGenError(
            f"the run's data has nothing to ask a judge about; make the images again with the official files: "
            f"{benchmark.inputs}"
        )
    answered = ask_all(judge, questions, RunFolder(out).records / _ANSWERS, benchmark.protocol, tries)
    answers: list[dict[str, Sequence[float]]] = [{} for _ in there]
    for index, values in answered.answers.items():
        place, name = owners[index]
        answers[place][name] = values
    scored = {
        shot.file: benchmark.score(shot.item, shot.number, given) for shot, given in zip(there, answers, strict=True)
    }
    return _summary(benchmark, items, there, scored, judge.model, answered.missing, answered.unreadable)


def score_by_ocr(benchmark: Benchmark, items: Sequence[Item], out: Path, clip: str | None = None) -> Scores:
    """Scores of CVTG-2K: words by rapidocr and, where the folder of a CLIP model is given, CLIPScore.

    Raises:
      DeepGenError: a package is missing, or an image cannot be read.
    """
    from deepgen_jax.evaluation.cvtg import score_words
    from deepgen_jax.rewards.cache import AnswerCache
    from deepgen_jax.rewards.ocr import OCRReward

    there = made_images(items, out)
    reader = OCRReward(workers=1)
    log = AnswerCache(str(RunFolder(out).records / _WORDS))
    answers: list[dict[str, Sequence[float]]] = []
    try:
        with progress_bar(len(there), 0, "images") as bar:
            bar.set_description_str("", refresh=False)
            for shot in there:
                status = (out / shot.file).stat()
                key = f"{shot.file}:{status.st_size}:{status.st_mtime_ns}"
                if (lines := log.get(key)) is None:
                    found = reader.recognise(np.asarray(load_image(out / shot.file)))
                    lines = [text for text, _ in found]
                    log.put(key, lines)
                answers.append({"words": tuple(score_words(shot.item.prompt, lines))})
                bar.update()
    finally:
        log.close()
        asyncio.run(reader.close())
    notes = []
    if clip is None:
        notes.append("CLIPScore was not computed; give a CLIP ViT-L/14 folder with --clip")
    else:
        for given, value in zip(answers, _clip_scores(there, out, clip), strict=True):
            given["clip"] = [value]
    scored = {
        shot.file: benchmark.score(shot.item, shot.number, given) for shot, given in zip(there, answers, strict=True)
    }
    engine = f"rapidocr {version('rapidocr')} (OCR)"
    return _summary(benchmark, items, there, scored, engine, notes=notes)


def score_from_official(benchmark: Benchmark, items: Sequence[Item], out: Path, results: Path) -> Scores:
    """Scores that the benchmark's own code computed, with intervals.

    Raises:
      DeepGenError: the results cannot be read, or are of other images.
    """
    there = made_images(items, out)
    read = benchmark.read_official(results, items, out)
    scored = {shot.file: read.get(shot.file) for shot in there}
    if not any(scored.values()):
        raise DeepGenError(f"{results} scores no image of {out}; give the results of this run")
    return _summary(benchmark, items, there, scored, "official scorer")


def score_exactly(benchmark: Benchmark, items: Sequence[Item], out: Path) -> Scores:
    """Scores of a benchmark whose code here knows the truth."""
    there = made_images(items, out)
    scored: dict[str, ImageScore | None] = {}
    with progress_bar(len(there), 0, "images") as bar:
        bar.set_description_str("", refresh=False)
        for shot in there:
            scored[shot.file] = benchmark.score_pixels(shot.item, np.asarray(load_image(out / shot.file)))
            bar.update()
    return _summary(benchmark, items, there, scored, "exact")


def _summary(
    benchmark: Benchmark,
    items: Sequence[Item],
    there: Sequence[MadeImage],
    scored: Mapping[str, ImageScore | None],
    judge: str,
    missing: Mapping[str, int] | None = None,
    unreadable: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> Scores:
    table = Table()
    images: dict[str, float] = {}
    for shot in there:
        if (one := scored[shot.file]) is not None:
            images[shot.file] = one.score
            table.add(shot.item.key, one.cells)
    return Scores(
        judge=judge,
        protocol=benchmark.protocol,
        figures=table.figures(benchmark.measures(table.groups)),
        images=images,
        wanted=sum(len(item.files) for item in items),
        made=len(there),
        missing=dict(missing or {}),
        unreadable=dict(unreadable or {}),
        notes=notes,
    )


def _clip_scores(there: Sequence[MadeImage], out: Path, clip: str) -> list[float]:
    """CLIPScore (Hessel et al., 2021): 2.5 max(cos, 0), of the text behind "A photo depicts "."""
    from deepgen_jax.rewards.base import RewardSample
    from deepgen_jax.rewards.clip_score import CLIPReward

    reward = CLIPReward(clip)
    values: list[float] = []
    for start in range(0, len(there), reward.batch_size):
        batch = there[start : start + reward.batch_size]
        samples = [
            RewardSample(np.asarray(load_image(out / shot.file)), f"A photo depicts {shot.item.prompt}")
            for shot in batch
        ]
        scores = asyncio.run(reward.score(samples))
        for entry in scores.missing.values():
            raise DeepGenError(f"CLIPScore cannot be computed: {entry.reason}")
        values += [2.5 * max(float(cosine), 0.0) for cosine in scores.values]
    return values
