"""DPG-Bench (Hu et al., 2024): 1,065 dense prompts; mPLUG answers a graph of questions about grids of four images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Benchmark, ImageScore, Item, Reading
from deepgen_jax.evaluation.figures import Cell, Measure
from deepgen_jax.evaluation.rows import Row, find_files, read_rows
from deepgen_jax.files import read_text


class DPGBench(Benchmark):
    """The tree holds only grids of 2 x 2; their images are kept separately."""

    title = "DPG-Bench"
    images = 4
    scorer = "official"
    protocol = "dpg/official"
    repository, licence = "github.com/TencentQQGYLab/ELLA", "Apache-2.0"
    inputs = "the folder of .txt files (first line), or DeepGen's prompts_dpgbench.jsonl (prompt, key)"
    guidance = 7.5

    def read(self, reading: Reading) -> list[Item]:
        paths = find_files(reading.data, ["*.txt", "prompts/*.txt", "*.jsonl"], [".txt", ".jsonl"])
        if paths[0].suffix.lower() == ".jsonl":
            rows = [(row.name("key"), row.text("prompt"), row) for row in read_rows(paths[0])]
        else:
            rows = [(path.stem, _first_line(path), Row({}, path, 1)) for path in paths]
        return [
            Item(
                name, prompt.strip(), tuple(f".deepgen/parts/{name}_{k}.png" for k in range(self.images)),
                str(row.file), row.number,
            )
            for name, prompt, row in rows
        ]  # fmt: skip

    def sheets(self, items: Sequence[Item]) -> Mapping[str, Sequence[str]]:
        return {f"{item.key}.png": item.files for item in items}

    def official(self, out: Path, items: Sequence[Item]) -> list[str]:
        # It writes dpg-bench_TIME_results.txt beside the pictures.
        return [f"PROCESSES=8 bash dpg_bench/dist_eval.sh {out} {self.side}"]

    def read_official(self, path: Path, items: Sequence[Item], out: Path) -> dict[str, ImageScore]:
        """From the lines "path, score of each image, mean" of compute_dpg_bench.py; the mean over prompts."""
        files = {item.key: item.files for item in items}
        scores = {}
        for line in read_text(path).splitlines():
            cells = [cell.strip() for cell in line.split(", ")]
            name = Path(cells[0]).stem
            try:
                values = [float(cell) for cell in cells[1:-1]]
            except ValueError:
                continue
            if name in files and len(cells) > 2:
                for file, value in zip(files[name], values, strict=False):
                    scores[file] = ImageScore(value, (Cell("all", value),))
        if not scores:
            raise DeepGenError(f"{path} holds no scores of these prompts; give what compute_dpg_bench.py wrote")
        return scores

    def measures(self, groups: Sequence[str]) -> list[Measure]:
        return [Measure("overall", {"all": 1.0}, scale=100, digits=2)]


def _first_line(path: Path) -> str:
    first = read_text(path).split("\n")[0]
    if not first.strip():
        raise DeepGenError(f"{path}, row 1 is empty; its first line is the prompt")
    return first
