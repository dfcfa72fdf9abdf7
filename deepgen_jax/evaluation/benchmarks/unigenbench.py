"""UniGenBench (Wang et al., 2025): 600 prompts in each of four files; a judge gives 0 or 1 for each test point."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Answers, Benchmark, ImageScore, Item, Question, Reading
from deepgen_jax.evaluation.figures import Cell, Measure, each
from deepgen_jax.evaluation.rows import Row, find_files, read_rows
from deepgen_jax.user_warnings import warn_user

_POINTS = ("Testpoints", "考点")
_DESCRIPTIONS = ("Testpoint Description", "考点对应描述")
_QUESTION = """This image was generated from the prompt: {prompt}

Judge each check point on its own, by what is visible in the image and nothing else. A point is met only where the image
shows clearly what the point asks of this prompt.
{points}
Give 1 for each point that is met and 0 for each that is not, in this order."""


class UniGenBench(Benchmark):
    """Accuracy over test points, for each sub-dimension, dimension and file."""

    title = "UniGenBench"
    images = 4
    protocol = "unigenbench/dg-1"
    repository, licence = "github.com/CodeGoat24/UniGenBench", "CC BY 4.0"
    inputs = (
        "test_prompts_{en,en_long,zh,zh_long}.csv or their folder; columns index, prompt_en and sub_dims_en (or _zh), "
        "or DeepGen's index, prompt and sub_dims"
    )
    splits = ("en", "en_long", "zh", "zh_long")

    def read(self, reading: Reading) -> list[Item]:
        items: list[Item] = []
        for path in find_files(reading.data, ["test_prompts_*.csv", "data/test_prompts_*.csv"], [".csv"]):
            rows = read_rows(path)
            split = self._split(path, rows[0])
            if reading.splits and split not in reading.splits:
                continue
            items += [self._item(row, split, reading.model) for row in rows]
        return items

    def _split(self, path: Path, row: Row) -> str:
        """From the name test_prompts_SPLIT.csv, else from the columns."""
        named = path.stem.removeprefix("test_prompts_")
        return named if named in self.splits else "zh" if "prompt_zh" in row.fields else "en"

    def _item(self, row: Row, split: str, model: str) -> Item:
        language = split.split("_")[0]
        prompt = row.text(f"prompt_{language}", "prompt")
        try:
            index = int(float(row.get("index")))
        except (ValueError, OverflowError):
            raise DeepGenError(f"{row.where}: 'index' is {row.get('index')!r}, expected a number") from None
        points = _points(row, row.get(f"sub_dims_{language}", "sub_dims"))
        files = tuple(f"{split}/{model}/{index}_{k}.png" for k in range(self.images))
        facts = {"split": split, "points": points}
        return Item(f"{split}/{index}", prompt.strip(), files, str(row.file), row.number, split, facts=facts)

    def official(self, out: Path, items: Sequence[Item]) -> list[str]:
        folders = {item.facts["split"]: Path(item.files[0]).parent for item in items}
        return [
            f"python eval/qwenvl_72b_{split.split('_')[0]}_eval.py --data_path {out / folder} --api_url URL "
            f"--csv_file data/test_prompts_{split}.csv"
            for split, folder in folders.items()
        ]

    def questions(self, item: Item, number: int, out: Path) -> list[Question]:
        points = item.facts["points"]
        lines = "\n".join(f"{i}. {name}: {text}" for i, (name, text) in enumerate(points, 1))
        text = _QUESTION.replace("{points}", lines).replace("{prompt}", item.prompt)
        return [Question("points", text, (out / item.files[number],), count=len(points))] if points else []

    def score(self, item: Item, number: int, answers: Answers) -> ImageScore | None:
        if "points" not in answers:
            return None
        split, given = item.facts["split"], answers["points"]
        cells = []
        for (name, _), value in zip(item.facts["points"], given, strict=True):
            for group in ("all", f"dimension/{dimension(name)}", f"point/{name}"):
                cells.append(Cell(f"{split}/{group}", value))
        return ImageScore(sum(given) / len(given), tuple(cells))

    def measures(self, groups: Sequence[str]) -> list[Measure]:
        percent: dict[str, Any] = {"scale": 100, "digits": 2}
        found: list[Measure] = []
        splits = [split for split in self.splits if f"{split}/all" in groups]
        for split in splits:
            found.append(Measure(split, {f"{split}/all": 1.0}, **percent))
        for split in splits:
            for kind in ("dimension", "point"):
                names = each(groups, f"{split}/{kind}/", **percent)
                found += [Measure(f"{split}: {m.name}" if kind == "dimension" else f"{split}, {m.name}", m.groups,
                                  **percent) for m in names]  # fmt: skip
        return found


def dimension(point: str) -> str:
    """The dimension of a test point: the part before its dash, outside parentheses."""
    match = re.match(r"([^()（）-]+?)\s*-\s*\S", point)
    return match[1].strip() if match else point


def _loads(text: str, where: str) -> Any:
    """JSON; a missing comma, as the official test_prompts_en_long.csv has one, is put in with a notice."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Expecting ',' delimiter"):
            raise
        fixed = json.loads(f"{text[: error.pos]},{text[error.pos :]}")
        warn_user(f"{where}: sub_dims lacks a comma in column {error.pos + 1}; it is read as if it had one")
        return fixed


def _points(row: Row, text: Any) -> list[tuple[str, str]]:
    """Test points with their descriptions, from the JSON of the column ``sub_dims``."""
    try:
        values = _loads(text, row.where) if isinstance(text, str) else text
        names = next(values[name] for name in _POINTS if name in values)
        texts = next(values[name] for name in _DESCRIPTIONS if name in values)
    except (ValueError, TypeError, StopIteration, RecursionError):
        raise DeepGenError(
            f"{row.where}: sub_dims is no JSON with 'Testpoints' and 'Testpoint Description'; download the file again"
        ) from None
    if not isinstance(names, list) or not isinstance(texts, list) or len(names) != len(texts) or not names:
        raise DeepGenError(f"{row.where}: sub_dims has not one description a test point; download the file again")
    return [(str(name), str(description)) for name, description in zip(names, texts, strict=True)]
