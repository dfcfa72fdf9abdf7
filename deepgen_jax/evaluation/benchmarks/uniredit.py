"""UniREditBench (Han et al., 2025): 2,700 edits of the real world and of games that need reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from deepgen_jax.evaluation.figures import Cell, Measure, each
from deepgen_jax.evaluation.rows import find_files, read_rows

_CONSISTENCY = """The first image was edited by the instruction: {prompt}
The second image is the result.

Judge only whether all that the instruction leaves alone is kept in look: objects, background, style, layout. Give one
whole number: 5 all is kept, 4 one slight difference, 3 several slight ones or one clear, 2 much has changed, 1 another
picture."""
_REASONING = """The first image was edited by the instruction: {prompt}
The {last} image is the result.{reference}

Judge only whether the result shows what the instruction leads to. Give one whole number: 5 entirely right, 4 right with
a slight flaw, 3 partly right, 2 mostly wrong, 1 wrong or nothing was done."""
_QUALITY = """This image was made by a model. Judge only whether it looks plausible and clean, whatever it shows. Give
one whole number: 5 no flaws, 4 slight ones, 3 visible ones, 2 heavy distortion, 1 hardly recognisable."""


class UniREditBench(Benchmark):
    """0.3 consistency + 0.5 reasoning + 0.2 plausibility an image, as percent 25 (s - 1); the mean over images."""

    title = "UniREditBench"
    task = "edit"
    protocol = "uniredit/dg-1"
    repository, licence = "github.com/Maplebb/UniREditBench", "none stated"
    inputs = "data.json (original_image_path, instruction, idx, name, perhaps rules); pictures beside it or in --images"

    def read(self, reading: Reading) -> list[Item]:
        items = []
        for path in find_files(reading.data, ["data.json", "*.json"], [".json"]):
            for row in read_rows(path):
                index, name = row.name("idx"), row.name("name")
                rules = row.fields.get("rules") or ""
                prompt = row.text("instruction").strip()
                if "rules" in row.fields and isinstance(rules, str):
                    prompt = f"{rules} {prompt}" if rules else prompt
                source = image_file(path, reading.images, row.text("original_image_path"), row.where)
                facts = {"world": "game" if rules else "real", "expected": row.fields.get("reference_effect") or ""}
                if row.fields.get("reference_image_path"):
                    shown = row.text("reference_image_path")
                    facts["reference_image"] = image_file(path, reading.images, shown, row.where)
                files = (f"{name}/{index}.png",)
                items.append(Item(f"{name}/{index}", prompt, files, str(path), row.number, name, (source,), facts))
        return items

    def official(self, out: Path, items: Sequence[Item]) -> list[str]:
        return [f"python eval/gpt_eval_uniredit.py --data UniREditBench/data.json --input UniREditBench --output {out}"]

    def questions(self, item: Item, number: int, out: Path) -> list[Question]:
        source, made = source_path(item, out), out / item.files[number]
        images: tuple[Path, ...] = (source, made)
        reference, last = "", "second"
        if text := item.facts["expected"]:
            reference = f"\nWhat is expected: {text}"
        if shown := item.facts.get("reference_image"):
            images, last = (source, Path(shown), made), "third"
            reference += "\nThe second image shows the expected result."
        reasoning = _REASONING.replace("{last}", last).replace("{reference}", reference)
        texts = {"consistency": _CONSISTENCY, "reasoning": reasoning, "plausibility": _QUALITY}
        shown_with = {"consistency": (source, made), "reasoning": images, "plausibility": (made,)}
        return [
            Question(name, text.replace("{prompt}", item.prompt), shown_with[name], low=1, high=5)
            for name, text in texts.items()
        ]

    def score(self, item: Item, number: int, answers: Answers) -> ImageScore | None:
        names = ("consistency", "reasoning", "plausibility")
        if any(name not in answers for name in names):
            return None
        value = sum(w * answers[name][0] for w, name in zip((0.3, 0.5, 0.2), names, strict=True))
        groups = ("all", f"world/{item.facts['world']}", f"name/{item.category}")
        return ImageScore(value, tuple(Cell(group, value) for group in groups))

    def measures(self, groups: Sequence[str]) -> list[Measure]:
        percent = {"scale": 25.0, "offset": -25.0, "digits": 1}
        overall = Measure("overall", {"all": 1.0}, scale=25.0, offset=-25.0, digits=1)
        worlds = [Measure(f"{m.name} world", m.groups, scale=25.0, offset=-25.0, digits=1)
                  for m in each(groups, "world/")]  # fmt: skip
        return [overall, *worlds, *each(groups, "name/", **percent)]
