"""GenEval (Ghosh et al., 2023): 553 prompts in six tags, scored by its own object detector and CLIP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Benchmark, ImageScore, Item, Reading
from deepgen_jax.evaluation.figures import Cell, Measure, each, mean_of
from deepgen_jax.evaluation.rows import find_files, read_rows
from deepgen_jax.files import read_text, write_text
from deepgen_jax.user_warnings import warn_user


class GenEval(Benchmark):
    """Each prompt's folder holds its row, which the scorer reads, and its samples."""

    title = "GenEval"
    images = 4
    scorer = "official"
    protocol = "geneval/official"
    repository, licence = "github.com/djghosh13/geneval", "MIT"
    inputs = (
        "evaluation_metadata.jsonl or DeepGen's geneval_prompt.jsonl; a .txt of captions has no tags, so that its "
        "images cannot be scored"
    )

    def read(self, reading: Reading) -> list[Item]:
        items = []
        names = ["evaluation_metadata.jsonl", "geneval_prompt.jsonl", "geneval_prompt.txt"]
        for path in find_files(reading.data, names, [".jsonl", ".txt"]):
            if path.suffix.lower() == ".txt":
                return self._captions(path)
            for index, row in enumerate(read_rows(path)):
                tag, prompt = row.text("tag"), row.text("prompt")
                if not isinstance(row.get("include"), list):
                    raise DeepGenError(f"{row.where}: 'include' is no list; give evaluation_metadata.jsonl")
                facts = {"row": dict(row.fields)}
                items.append(
                    Item(f"{index:05d}", prompt.strip(), self._files(index), str(path), row.number, tag, facts=facts)
                )
        return items

    def _files(self, index: int) -> tuple[str, ...]:
        return tuple(f"{index:05d}/samples/{k:04d}.png" for k in range(self.images))

    def _captions(self, path: Path) -> list[Item]:
        warn_user(f"{path} holds captions without tags: images are made, and the scorer cannot read them")
        lines = [line.strip() for line in read_text(path).split("\n")]
        return [
            Item(f"{index:05d}", line, self._files(index), str(path), index + 1)
            for index, line in enumerate(line for line in lines if line)
        ]

    def prepare(self, items: Sequence[Item], reading: Reading, out: Path) -> None:
        for item in items:
            if "row" not in item.facts:
                continue
            path = out / item.key / "metadata.jsonl"
            text = json.dumps(item.facts["row"], ensure_ascii=False) + "\n"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)

    def official(self, out: Path, items: Sequence[Item]) -> list[str]:
        results = out / ".deepgen/geneval.jsonl"
        return [
            f"python evaluation/evaluate_images.py {out} --outfile {results} --model-path OBJECT_DETECTOR_FOLDER",
            f"python evaluation/summary_scores.py {results}",
        ]

    def read_official(self, path: Path, items: Sequence[Item], out: Path) -> dict[str, ImageScore]:
        """From the lines of evaluate_images.py: correct or not per image; the mean over images, then over tags."""
        scores = {}
        for row in read_rows(path):
            parts = Path(row.text("filename")).parts[-3:]
            right = float(bool(row.get("correct")))
            tag = row.text("tag")
            scores["/".join(parts)] = ImageScore(right, (Cell(f"tag/{tag}", right),))
        return scores

    def measures(self, groups: Sequence[str]) -> list[Measure]:
        return [mean_of("overall", groups, "tag/"), *each(groups, "tag/")]
