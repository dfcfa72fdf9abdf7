"""CVTG-2K (Du et al., 2025): 2,000 prompts with two to five quoted texts, plain or styled; scored by OCR and CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Answers, Benchmark, ImageScore, Item, Reading
from deepgen_jax.evaluation.figures import Cell, Measure
from deepgen_jax.evaluation.rows import objects, read_json

#: Folder in the data -> folder in the tree.
_SETS = {"CVTG": "CVTG", "CVTG-Style": "CVTG-Style", "CVTG-style": "CVTG-Style"}


class CVTG2K(Benchmark):
    """Word accuracy and NED over all words, CLIPScore over images; as a whole, for each set and number of regions."""

    title = "CVTG-2K"
    scorer = "ocr"
    protocol = "cvtg/dg-1"
    repository, licence = "github.com/NJU-PCALab/TextCrafter", "none stated"
    inputs = "the folder with CVTG/ and CVTG-Style/ (or CVTG-style/), each holding 2.json to 5.json"

    def read(self, reading: Reading) -> list[Item]:
        root = reading.data
        paths = sorted(path for name in _SETS for path in root.glob(f"{name}/[2-5].json"))
        paths = list({(_SETS[path.parent.name], path.stem): path for path in paths}.values())
        if not paths:
            raise DeepGenError(f"--data {root} holds no CVTG/2.json; give the folder with CVTG and CVTG-Style")
        items = []
        for path in sorted(paths, key=lambda path: (path.stem, _SETS[path.parent.name])):
            values = read_json(path)
            if not isinstance(values, dict) or "data_list" not in values:
                raise DeepGenError(f"{path}, row 1: there is no column 'data_list'; give 2.json to 5.json of CVTG-2K")
            for row in objects(values["data_list"], path, "data_list"):
                index, name = row.name("index"), f"{_SETS[path.parent.name]}/{path.stem}"
                prompt = row.text("prompt").strip()
                items.append(Item(f"{name}/{index}", prompt, (f"{name}/{index}.png",), str(path), row.number, name))
        return items

    def official(self, out: Path, items: Sequence[Item]) -> list[str]:
        return [
            f"python unified_metrics_eval.py --benchmark_dir CVTG-2K --result_dir {out} "
            f"--output_file {out}/.deepgen/cvtg.json"
        ]

    def score(self, item: Item, number: int, answers: Answers) -> ImageScore | None:
        """From "words" (asked for, found, sum of similarities) and, where CLIP was given, "clip"."""
        if "words" not in answers:
            return None
        words, found, similarity = answers["words"]
        cells = []
        for group in ("all", item.category, item.category.split("/")[0]):
            cells += [Cell(f"{group}|found", found, words), Cell(f"{group}|ned", similarity, words)]
            if "clip" in answers:
                cells.append(Cell(f"{group}|clip", answers["clip"][0]))
        return ImageScore(similarity / words if words else 0.0, tuple(cells))

    def measures(self, groups: Sequence[str]) -> list[Measure]:
        kinds = {"found": "word accuracy", "ned": "NED", "clip": "CLIPScore"}
        found = [Measure(name, {f"all|{kind}": 1.0}, digits=4) for kind, name in kinds.items()]
        for group in sorted({group.split("|")[0] for group in groups} - {"all"}):
            found += [Measure(f"{group}: {name}", {f"{group}|{kind}": 1.0}, digits=4) for kind, name in kinds.items()]
        return found
