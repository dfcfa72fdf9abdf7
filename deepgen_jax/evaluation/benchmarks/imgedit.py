"""ImgEdit, single turn (Ye et al., 2025): 737 edits of nine types; a judge grades each by its type's rubric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from deepgen_jax.evaluation.figures import Cell, Measure, each, mean_of
from deepgen_jax.evaluation.rows import find_files, read_rows

#: What each type's three grades look at: the edit itself, how it is done, and the rest of the picture.
_RUBRICS = {
    "add": ("the new object is there, of the kind, number and place asked for",
            "its size, light, shadows and edges fit the scene", "everything else is as before"),
    "adjust": ("the attribute asked for has changed, of the right object and to the right value",
               "the change looks natural in material, light and edges", "shape, place and all else are as before"),
    "replace": ("the old object is gone and the new one stands in its place",
                "the new object fits in size, perspective, light and edges", "everything else is as before"),
    "remove": ("the object asked for is gone completely, and nothing else is",
               "what was behind it is filled in plausibly, without traces", "everything else is as before"),
    "background": ("the background is the one asked for, and the subject is kept",
                   "the border between subject and background is clean, and light and perspective agree",
                   "the subject keeps its shape, pose and details"),
    "style": ("the whole picture has the style asked for", "the style is convincing in colour, texture and stroke",
              "objects, their places and the composition are as before"),
    "extract": ("exactly the object asked for is cut out, whole", "its border is clean, the ground plain",
                "its look, colours and details are as before"),
    "action": ("the subject does what is asked for", "the pose is possible in its anatomy and looks natural",
               "the subject is the same, and everything else is as before"),
    "compose": ("each part of the instruction is carried out", "the changes look natural and fit each other",
                "everything that no part mentions is as before"),
}  # fmt: skip
_NAMES = {"hybrid": "compose", "motion": "action", "alter": "adjust", "visual_bench": "compose"}
_QUESTION = """The first image was edited by the instruction: {prompt}
The second image is the result.

Grade the result with three whole numbers from 1 (failed) to 5 (flawless).
1. Compliance: {0}.
2. Quality: {1}.
3. Preservation: {2}.
A result that does not carry out the instruction must not get more for quality or preservation than for compliance.
Answer with compliance, quality and preservation, in this order."""


class ImgEdit(Benchmark):
    """The mean of three grades an image, then over a type, then over types."""

    title = "ImgEdit"
    task = "edit"
    protocol = "imgedit/dg-1"
    repository, licence = "github.com/PKU-YuanGroup/ImgEdit", "none stated"
    inputs = "singleturn.json or basic_edit.json (key -> id, prompt, edit_type); pictures beside it or in --images"

    def read(self, reading: Reading) -> list[Item]:
        items = []
        names = ["singleturn.json", "basic_edit.json", "singleturn/singleturn.json"]
        for path in find_files(reading.data, names, [".json"]):
            for row in read_rows(path):
                if not row.key:
                    raise DeepGenError(f"{row.where}: the file is a list, expected an object of key -> id, prompt, ...")
                if "/" in row.key or row.key.startswith("."):
                    raise DeepGenError(f"{row.where}: the key {row.key!r} cannot be a file name")
                kind = row.text("edit_type")
                rubric = _NAMES.get(kind, kind)
                if rubric not in _RUBRICS:
                    raise DeepGenError(f"{row.where}: edit_type is {kind!r}, expected one of {', '.join(_RUBRICS)}")
                source = image_file(path, reading.images, row.text("id"), row.where)
                prompt, files = row.text("prompt").strip(), (f"{row.key}.png",)
                facts = {"rubric": rubric}
                items.append(Item(row.key, prompt, files, str(path), row.number, kind, (source,), facts))
        return items

    def official(self, out: Path, items: Sequence[Item]) -> list[str]:
        return [
            f"python basic_bench.py --result_img_folder {out} --edit_json basic_edit.json --origin_img_root IMAGES "
            "--prompts_json prompts.json",
            f"python step1_get_avgscore.py --result_json {out}/result.json --average_score_json average.json",
            "python step2_typescore.py --average_score_json average.json --basic_edit basic_edit.json "
            "--typescore_json types.json",
        ]

    def questions(self, item: Item, number: int, out: Path) -> list[Question]:
        text = _QUESTION
        for i, line in enumerate(_RUBRICS[item.facts["rubric"]]):
            text = text.replace(f"{{{i}}}", line)
        images = (source_path(item, out), out / item.files[number])
        return [Question("grades", text.replace("{prompt}", item.prompt), images, count=3, low=1, high=5)]

    def score(self, item: Item, number: int, answers: Answers) -> ImageScore | None:
        if "grades" not in answers:
            return None
        value = sum(answers["grades"]) / 3
        return ImageScore(value, (Cell(f"type/{item.category}", value),))

    def measures(self, groups: Sequence[str]) -> list[Measure]:
        return [mean_of("overall", groups, "type/", digits=2), *each(groups, "type/", digits=2)]
