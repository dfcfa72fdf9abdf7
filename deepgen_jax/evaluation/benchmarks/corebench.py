"""T2I-CoReBench (Li et al., 2025): 12 dimensions of 90 prompts; a yes/no question for each point of a check list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Answers, Benchmark, ImageScore, Item, Question, Reading
from deepgen_jax.evaluation.figures import Cell, Measure, each, mean_of
from deepgen_jax.evaluation.rows import Row, find_files, read_rows

_QUESTION = """This image was generated from the prompt: {prompt}

Question: {question}
Judge by what is visible in the image alone; the prompt helps to understand the question, and is no evidence. The answer
is yes only where the image shows it clearly and without guessing; for a question with a condition, only where condition
and claim both hold."""


class CoReBench(Benchmark):
    """An image scores its share of yes; dimensions are means; the paper reports the mean of the eight R dimensions."""

    title = "T2I-CoReBench"
    images = 4
    protocol = "corebench/dg-1"
    repository, licence = "github.com/KlingTeam/T2I-CoReBench", "Apache-2.0"
    inputs = (
        "the folder of {DIM}.json (ID -> Prompt, Checklist) or one of them; DeepGen's corebench.jsonl (ID, Prompt) has "
        "no check lists, so that its images cannot be scored"
    )

    def read(self, reading: Reading) -> list[Item]:
        items = []
        names = ["[CR]-*.json", "data/[CR]-*.json", "*.jsonl"]
        for path in find_files(reading.data, names, [".json", ".jsonl"]):
            for row in read_rows(path):
                name = row.key or row.name("ID")
                match = re.fullmatch(r"([A-Z]-[A-Z]+)-\d+", name)
                if match is None:
                    raise DeepGenError(f"{row.where}: ID is {name!r}, expected one such as C-MI-001")
                files = tuple(f"{reading.model}/{match[1]}/{name}-{k}.png" for k in range(self.images))
                facts = {"questions": _questions(row)}
                prompt = row.text("Prompt").strip()
                items.append(Item(name, prompt, files, str(path), row.number, match[1], facts=facts))
        return items

    def official(self, out: Path, items: Sequence[Item]) -> list[str]:
        dimensions = ",".join(dict.fromkeys(item.category for item in items))
        model = Path(items[0].files[0]).parts[0]
        return [
            f"python evaluate.py --mllm Qwen3_VL_32B_Thinking --output_path {out} --model {model} "
            f"--gen_eval_file {dimensions}"
        ]

    def questions(self, item: Item, number: int, out: Path) -> list[Question]:
        template = _QUESTION.replace("{prompt}", item.prompt)
        return [
            Question(f"point {i}", template.replace("{question}", text), (out / item.files[number],), yes_no=True)
            for i, text in enumerate(item.facts["questions"], 1)
        ]

    def score(self, item: Item, number: int, answers: Answers) -> ImageScore | None:
        given = [values[0] for values in answers.values()]
        if not given:
            return None
        value = sum(given) / len(given)
        return ImageScore(value, (Cell(f"dimension/{item.category}", value),))

    def measures(self, groups: Sequence[str]) -> list[Measure]:
        found = [mean_of("reasoning", groups, "dimension/R-", scale=100, digits=1)]
        found.append(mean_of("composition", groups, "dimension/C-", scale=100, digits=1))
        return [*found, *each(groups, "dimension/", scale=100, digits=1)]


def _questions(row: Row) -> list[str]:
    """Questions of the check list; none where the file has no check lists."""
    if row.fields.get("Checklist") is None:
        return []
    try:
        return [str(entry["question"]) for entry in row.fields["Checklist"]]
    except (TypeError, KeyError):
        raise DeepGenError(f"{row.where}: 'Checklist' is no list of questions; download the file again") from None
