"""RISEBench (Zhao et al., 2025): 360 edits that need temporal, causal, spatial or logical reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import (
    Answers,
    Benchmark,
    ImageScore,
    Item,
    Question,
    Reading,
    image_file,
    source_path,
)
from deepgen_jax.evaluation.figures import Cell, Measure
from deepgen_jax.evaluation.rows import Row, find_files, read_rows

_CATEGORIES = ("temporal_reasoning", "causal_reasoning", "spatial_reasoning", "logical_reasoning")
_EDITED = """The first image was edited by the instruction: {prompt}
The {last} image is the result.
"""
_CONSISTENCY = (
    _EDITED
    + """
Judge only whether all that the instruction leaves alone is kept: objects, background, style, view. What the instruction
asks for, or what follows from it, is no fault. Give one whole number: 5 all is kept, 4 one slight difference, 3 several
slight ones or one clear, 2 much has changed, 1 another picture."""
)
_REASONING = (
    _EDITED
    + """{reference}
Judge only whether the result shows what follows from the instruction, as a person who knows the subject would expect.
Give one whole number: 5 entirely right, 4 right with a slight flaw, 3 partly right, 2 mostly wrong, 1 wrong or nothing
was done."""
)
_QUALITY = """This image was made by a model. Judge only whether it looks plausible and clean, whatever it shows. Give
one whole number: 5 no flaws, 4 slight ones, 3 visible ones, 2 heavy distortion, 1 hardly recognisable."""
_LOGIC_CONSISTENCY = (
    _EDITED
    + """
Are the style and layout of the puzzle kept, all that the task leaves alone included?"""
)
_LOGIC_REASONING = (
    _EDITED
    + """{reference}
Does the result show the right answer to the task, and no wrong one beside it?"""
)


class RISE(Benchmark):
    """Accuracy is the share of images with full marks; the score weighs consistency, reasoning and plausibility.

    Weights are 0.3, 0.5 and 0.2; 0.3 and 0.7 for logic, whose answers are right (5) or wrong (1); 0.8 and 0.2 for
    reasoning and plausibility where a row asks for no consistency. With reasoning at 1 the score is halved, at least 1.
    """

    title = "RISEBench"
    task = "edit"
    protocol = "rise-2026-04/dg-1"
    repository, licence = "github.com/PhoenixZ810/RISEBench", "none stated"
    inputs = (
        "datav2_total_w_subtask.json (index, category, instruction, image, reference); pictures beside it or in "
        "--images"
    )

    def read(self, reading: Reading) -> list[Item]:
        items = []
        names = ["datav2_total_w_subtask.json", "data/datav2_total_w_subtask.json", "*.json"]
        for path in find_files(reading.data, names, [".json"]):
            for row in read_rows(path):
                index, category = row.name("index"), row.text("category")
                if category not in _CATEGORIES:
                    raise DeepGenError(f"{row.where}: category is {category!r}, expected {', '.join(_CATEGORIES)}")
                files = (f"{reading.model}/images/{category}/{index}.png",)
                source = image_file(path, reading.images, row.text("image"), row.where)
                facts: dict[str, Any] = {"subtask": row.fields.get("subtask") or "", "free": _free(row)}
                facts["reference"] = row.fields.get("reference_txt") or row.fields.get("reference") or ""
                if row.fields.get("reference_img"):
                    facts["reference_image"] = image_file(path, reading.images, row.text("reference_img"), row.where)
                prompt = row.text("instruction").strip()
                items.append(Item(index, prompt, files, str(path), row.number, category, (source,), facts))
        return items

    def official(self, out: Path, items: Sequence[Item]) -> list[str]:
        output = out / Path(items[0].files[0]).parts[0]
        return [f"python gpt_eval.py --data data/datav2_total_w_subtask.json --input data --output {output}"]

    def questions(self, item: Item, number: int, out: Path) -> list[Question]:
        source, made = source_path(item, out), out / item.files[number]
        images: tuple[Path, ...] = (source, made)
        reference, last = "", "second"
        if text := item.facts["reference"]:
            reference = f"\nWhat is expected: {text}\n"
        if shown := item.facts.get("reference_image"):
            images, last = (source, Path(shown), made), "third"
            reference += "\nThe second image shows the expected result; other ways to show the same are as good.\n"

        def ask(name: str, template: str, images: tuple[Path, ...], last: str, **options: Any) -> Question:
            text = template.replace("{last}", last).replace("{reference}", reference)
            return Question(name, text.replace("{prompt}", item.prompt), images, **options)

        if item.category == "logical_reasoning":
            found = [ask("reasoning", _LOGIC_REASONING, images, last, yes_no=True)]
            if not item.facts["free"]:
                found.insert(0, ask("consistency", _LOGIC_CONSISTENCY, (source, made), "second", yes_no=True))
            return found
        found = [ask("reasoning", _REASONING, images, last, low=1, high=5)]
        if not item.facts["free"]:
            found.insert(0, ask("consistency", _CONSISTENCY, (source, made), "second", low=1, high=5))
        return [*found, Question("plausibility", _QUALITY, (made,), low=1, high=5)]

    def score(self, item: Item, number: int, answers: Answers) -> ImageScore | None:
        logical = item.category == "logical_reasoning"
        asked = [] if item.facts["free"] else ["consistency"]
        asked += ["reasoning"] if logical else ["reasoning", "plausibility"]
        if any(name not in answers for name in asked):
            return None
        grades = {name: 4 * answers[name][0] + 1 if logical else answers[name][0] for name in asked}
        value = rise_score(grades, logical)
        right = float(all(grade == 5 for grade in grades.values()))
        cells = []
        for group in ("all", item.category):
            cells += [Cell(f"{group}|accuracy", right), Cell(f"{group}|score", value)]
        return ImageScore(value, tuple(cells))

    def measures(self, groups: Sequence[str]) -> list[Measure]:
        found = [
            Measure("accuracy", {"all|accuracy": 1.0}, scale=100, digits=1),
            Measure("score", {"all|score": 1.0}, scale=25, offset=-25, digits=1),
        ]
        for name in _CATEGORIES:
            short = name.removesuffix("_reasoning")
            found.append(Measure(f"{short} accuracy", {f"{name}|accuracy": 1.0}, scale=100, digits=1))
        for name in _CATEGORIES:
            short = name.removesuffix("_reasoning")
            found.append(Measure(f"{short} score", {f"{name}|score": 1.0}, scale=25, offset=-25, digits=1))
        return found


def rise_score(grades: dict[str, float], logical: bool) -> float:
    """The weighted grade, 1 to 5; see `RISE`."""
    reasoning = grades["reasoning"]
    if "consistency" not in grades:
        value = reasoning if logical else 0.8 * reasoning + 0.2 * grades["plausibility"]
    elif logical:
        value = 0.3 * grades["consistency"] + 0.7 * reasoning
    else:
        value = 0.3 * grades["consistency"] + 0.5 * reasoning + 0.2 * grades["plausibility"]
    return max(value / 2, 1.0) if reasoning == 1 else value


def _free(row: Row) -> bool:
    """Whether the row asks for no consistency."""
    value = row.fields.get("consistency_free")
    return bool(value) and value == value
