"""Three rows of our own in the format of each benchmark, and the tree that its official scorer reads."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from deepgen_jax.cli.main import main
from deepgen_jax.evaluation.run import RECORDS

MODEL = "m"


def picture(path: Path, seed: int, size: tuple[int, int] = (90, 60)) -> None:
    """A noise picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)


def dump(path: Path, value: object) -> Path:
    """JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def geneval(folder: Path) -> Path:
    rows = [
        {"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite"},
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
        {"tag": "colors", "include": [{"class": "vase", "count": 1, "color": "red"}], "prompt": "a red vase"},
    ]
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dpg(folder: Path) -> Path:
    for name, text in (("0", "a barn at dusk\nsecond line"), ("midjourney17", "a lamp"), ("whoops31", "a chess board")):
        (folder / f"{name}.txt").write_text(text)
    return folder


POINTS = {
    "en": ("Testpoints", ["Style", "Attribute - Quantity"], "Testpoint Description", ["ink", "two cats"]),
    "zh": ("考点", ["风格", "属性-数量"], "考点对应描述", ["水墨", "两只猫"]),
}


def unigenbench(folder: Path, split: str = "en", ours: bool = False) -> Path:
    language = split.split("_")[0]
    points, names, told, texts = POINTS[language]
    ending = "" if ours else f"_{language}"
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["index", f"prompt{ending}", f"sub_dims{ending}"])
    for index in (0, 1, 7):
        sub_dims = json.dumps({points: names, told: texts}, ensure_ascii=False)
        writer.writerow([index, f'two cats, "ink", {index}', sub_dims])
    path = folder / f"test_prompts_{split}.csv"
    path.write_text(buffer.getvalue(), encoding="utf-8")
    return path


def wise(folder: Path) -> Path:
    rows = {
        "cultural_common_sense.json": (1, "Cultural knowledge", "Festival"),
        "spatio-temporal_reasoning.json": (401, "Spatio-temporal reasoning", "Horizontal time"),
        "natural_science.json": (901, "Chemistry", "Combustion"),
    }
    for name, (number, category, subcategory) in rows.items():
        row = {"Prompt": f"something {number}", "Explanation": "what it is", "prompt_id": number}
        dump(folder / name, [{**row, "Category": category, "Subcategory": subcategory}])
    return folder


def corebench(folder: Path) -> Path:
    for dimension in ("C-MI", "R-LR"):
        checklist = [{"question": "Is there a cup?"}, {"question": "Is it red?"}]
        names = ["001", "002"] if dimension == "C-MI" else ["001"]
        dump(folder / f"{dimension}.json", {
            f"{dimension}-{name}": {"Prompt": f"a cup {name}", "Checklist": checklist} for name in names
        })  # fmt: skip
    return folder


def cvtg(folder: Path) -> Path:
    for name, count in (("CVTG", 2), ("CVTG-style", 5)):
        rows = [{"prompt": f"A sign that says 'Blue Door {count}'", "index": i} for i in range(2 if count == 2 else 1)]
        dump(folder / name / f"{count}.json", {"data_list": rows})
        dump(folder / name / f"{count}_combined.json", {"data_list": rows})
    return folder


def imgedit(folder: Path) -> Path:
    rows = {}
    for i, kind in enumerate(("add", "style", "background")):
        picture(folder / f"{kind}/{i}.jpg", i)
        rows[str(1000 + i)] = {"id": f"{kind}/{i}.jpg", "prompt": f"make it {kind}", "edit_type": kind}
    return dump(folder / "singleturn.json", rows)


def gedit(folder: Path) -> Path:
    import pyarrow as arrow
    from pyarrow import parquet

    rows = []
    for i, (language, kind) in enumerate((("en", "color_alter"), ("cn", "color_alter"), ("en", "subject-add"))):
        buffer = io.BytesIO()
        Image.new("RGB", (70, 50 + i), (i, 9, 9)).save(buffer, "PNG")
        rows.append({
            "key": f"k{i}", "task_type": kind, "instruction": f"change {i}", "instruction_language": language,
            "input_image": {"bytes": buffer.getvalue(), "path": None}, "Intersection_exist": i == 0,
        })  # fmt: skip
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    return folder


def rise(folder: Path) -> Path:
    rows = []
    for i, category in enumerate(("temporal_reasoning", "spatial_reasoning", "logical_reasoning")):
        picture(folder / f"{category}_images/{i}.png", i)
        rows.append({
            "index": f"{category}_{i}", "category": category, "instruction": f"what follows {i}",
            "image": f"{category}_images/{i}.png", "reference": "it grows", "subtask": "Layout",
        })  # fmt: skip
    return dump(folder / "datav2_total_w_subtask.json", rows)


def uniredit(folder: Path) -> Path:
    rows = []
    for i, name in enumerate(("attribute", "sokoban", "sokoban")):
        picture(folder / f"original/{i}.png", i)
        picture(folder / f"reference/{i}.png", 10 + i)
        row = {"original_image_path": f"original/{i}.png", "reference_image_path": f"reference/{i}.png",
               "instruction": f"do {i}", "name": name, "idx": i, "reference_effect": "done"}  # fmt: skip
        rows.append({**row, "rules": "Boxes are pushed."} if name == "sokoban" else row)
    return dump(folder / "data.json", rows)


#: Benchmark -> what writes its rows into a folder and returns --data.
WRITERS: dict[str, Callable[[Path], Path]] = {
    "geneval": geneval, "dpg": dpg, "unigenbench": unigenbench, "wise": wise, "wise_verified": wise,
    "corebench": corebench, "cvtg": cvtg, "imgedit": imgedit, "gedit": gedit, "rise": rise, "uniredit": uniredit,
}  # fmt: skip


def _times(pattern: str, count: int) -> set[str]:
    return {pattern.format(k) for k in range(count)}


#: Benchmark -> the files of its tree, our records left out.
TREES: dict[str, set[str]] = {
    "geneval": {
        file for i in range(3) for file in (f"{i:05d}/metadata.jsonl", *_times(f"{i:05d}/samples/{{:04d}}.png", 4))
    },
    "dpg": {"0.png", "midjourney17.png", "whoops31.png"},
    "unigenbench": {file for i in (0, 1, 7) for file in _times(f"en/{MODEL}/{i}_{{}}.png", 4)},
    "wise": {"1.png", "401.png", "901.png"},
    "wise_verified": {"1.png", "401.png", "901.png"},
    "corebench": {
        file
        for name in ("C-MI-001", "C-MI-002", "R-LR-001")
        for file in _times(f"{MODEL}/{name[:4]}/{name}-{{}}.png", 4)
    },
    "cvtg": {"CVTG/2/0.png", "CVTG/2/1.png", "CVTG-Style/5/0.png"},
    "imgedit": {"1000.png", "1001.png", "1002.png"},
    "gedit": {
        file
        for name in ("color_alter/en/k0", "color_alter/cn/k1", "subject-add/en/k2")
        for file in (f"fullset/{name}.png", f"fullset/{name}_SRCIMG.png")
    },
    "rise": {
        f"{MODEL}/images/{name}/{name}_{i}.png"
        for i, name in enumerate(("temporal_reasoning", "spatial_reasoning", "logical_reasoning"))
    },
    "uniredit": {"attribute/0.png", "sokoban/1.png", "sokoban/2.png"},
}


def tree(out: Path) -> set[str]:
    """Files of the official tree."""
    paths = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    return {path.as_posix() for path in paths if path.parts[0] != RECORDS}


def make(name: str, folder: Path, *words: str) -> Path:
    """Runs the command on three rows of our own; returns the folder of the tree."""
    source = folder / "data"
    if not source.exists():
        source.mkdir()
        (folder / "data.txt").write_text(str(WRITERS[name](source)))
    out = folder / "out"
    given = ["--data", (folder / "data.txt").read_text(), "--out", str(out), "--name", MODEL, "--size", "64"]
    assert main(["eval", name, str(folder / "model"), *given, "--steps", "2", "--dtype", "float32", *words]) == 0
    return out
