"""WISE (Niu et al., 2025): 1,000 prompts that need world knowledge, in its first form and as WISE-Verified (2026)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Answers, Benchmark, ImageScore, Item, Question, Reading
from deepgen_jax.evaluation.figures import Cell, Measure, each
from deepgen_jax.evaluation.rows import Row, find_files, read_rows

#: Words that name a category in a row's Category and Subcategory.
_WORDS = {
    "cultural": r"cultur",
    "time": r"\btime|tempor",
    "space": r"\bspa(c|t)|geograph|position|different view",
    "biology": r"biolog",
    "physics": r"physic",
    "chemistry": r"chemi",
}
_LEGACY_QUESTION = """This image was generated from the prompt: {prompt}
What the prompt means: {explanation}

Grade the image strictly with three whole numbers from 0 to 2.
1. Consistency: 0 the image misses or contradicts what the prompt means, 1 it shows it in part, 2 it shows all of it,
without doubt.
2. Realism: 0 it breaks physics or looks artificial, 1 it is believable with visible flaws, 2 it could be a photograph.
3. Aesthetics: 0 unpleasant to look at, 1 acceptable, 2 outstanding in composition, colour and light.
Where in doubt, give the lower number. Answer with consistency, realism and aesthetics, in this order."""
_VERIFIED_QUESTION = """This image was generated from the prompt: {prompt}
What the prompt means: {explanation}

Does the image show, clearly and without contradiction, what the prompt means? Judge by what is visible alone; where in
doubt, the answer is no."""


class WISE(Benchmark):
    """WiScore: (0.7 consistency + 0.2 realism + 0.1 aesthetics) / 2 an image; categories weighed by their prompts."""

    title = "WISE"
    protocol = "wise/dg-1"
    repository, licence = "github.com/PKU-YuanGroup/WISE", "none stated"
    inputs = "cultural_common_sense.json, spatio-temporal_reasoning.json, natural_science.json, or their folder"
    weights: ClassVar = {
        "cultural": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1
    }  # fmt: skip
    #: The last prompt_id of each category in the official files, for rows whose words name none.
    last_ids: ClassVar = {
        "cultural": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000
    }  # fmt: skip

    def read(self, reading: Reading) -> list[Item]:
        items = []
        paths = find_files(reading.data, ["*.json", "data/*.json"], [".json"])
        # The repository also holds the prompts rewritten without their riddle.
        for path in [path for path in paths if "rewrite" not in path.stem] or paths:
            for row in read_rows(path):
                name, prompt = row.name("prompt_id"), row.text("Prompt")
                facts = {"explanation": row.text("Explanation"), "subcategory": str(row.get("Subcategory"))}
                category = self._category(row, name)
                items.append(Item(name, prompt.strip(), (f"{name}.png",), str(path), row.number, category, facts=facts))
        return items

    def _category(self, row: Row, name: str) -> str:
        for text in (str(row.get("Category")), str(row.get("Subcategory"))):
            found = [category for category, words in _WORDS.items() if re.search(words, text.lower())]
            if len(found) == 1:
                return found[0]
        if name.isdecimal():
            for category, last in self.last_ids.items():
                if 1 <= int(name) <= last:
                    return category
        raise DeepGenError(
            f"{row.where}: 'Category' is {row.get('Category')!r}, which is none of {', '.join(self.weights)}"
        )

    def official(self, out: Path, items: Sequence[Item]) -> list[str]:
        files = dict.fromkeys(Path(item.file).name for item in items)
        return [
            f"python gpt_eval.py --json_path data/{name} --image_dir {out} --output_dir {out}/.deepgen "
            f"--api_key KEY --model gpt-4o-2024-05-13 --result_full {Path(name).stem}_full.json "
            f"--result_scores {Path(name).stem}.jsonl"
            for name in files
        ]

    def questions(self, item: Item, number: int, out: Path) -> list[Question]:
        text = _LEGACY_QUESTION.replace("{explanation}", item.facts["explanation"]).replace("{prompt}", item.prompt)
        return [Question("grades", text, (out / item.files[number],), count=3, high=2)]

    def score(self, item: Item, number: int, answers: Answers) -> ImageScore | None:
        if "grades" not in answers:
            return None
        consistency, realism, aesthetics = answers["grades"]
        value = (0.7 * consistency + 0.2 * realism + 0.1 * aesthetics) / 2
        return ImageScore(value, (Cell(f"category/{item.category}", value),))

    def measures(self, groups: Sequence[str]) -> list[Measure]:
        overall = Measure("overall", {f"category/{name}": weight for name, weight in self.weights.items()})
        return [overall, *each(groups, "category/")]


class WISEVerified(WISE):
    """Right or wrong an image; 0.40 for culture and 0.12 for each of the five others."""

    title = "WISE-Verified"
    protocol = "wise-verified/dg-1"
    inputs = "the three json files of WISE-Verified (400, 240 and 360 prompts), or their folder"
    weights: ClassVar = {
        "cultural": 0.4, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12
    }  # fmt: skip
    last_ids: ClassVar = {
        "cultural": 400, "time": 520, "space": 640, "biology": 760, "physics": 880, "chemistry": 1000
    }  # fmt: skip

    def questions(self, item: Item, number: int, out: Path) -> list[Question]:
        text = _VERIFIED_QUESTION.replace("{explanation}", item.facts["explanation"]).replace("{prompt}", item.prompt)
        return [Question("right", text, (out / item.files[number],), yes_no=True)]

    def score(self, item: Item, number: int, answers: Answers) -> ImageScore | None:
        if "right" not in answers:
            return None
        value = float(answers["right"][0])
        return ImageScore(value, (Cell(f"category/{item.category}", value),))
