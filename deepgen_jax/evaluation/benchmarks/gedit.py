"""GEdit-Bench (Liu et al., 2025): 606 edits of 11 types in English and in Chinese, graded as VIEScore does."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from deepgen_jax.data.images import load_image
from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import (
    Answers,
    Benchmark,
    ImageScore,
    Item,
    Question,
    Reading,
    source_path,
)
from deepgen_jax.evaluation.figures import Cell, Measure, each, mean_of
from deepgen_jax.evaluation.rows import Row
from deepgen_jax.files import replacing
from deepgen_jax.terminal import progress_bar

_COLUMNS = ("key", "task_type", "instruction", "instruction_language", "Intersection_exist")
_SEMANTIC = """The first image was edited by the instruction: {prompt}
The second image is the result.

Grade it with two whole numbers from 0 to 10.
1. Success of the edit: 0 nothing of the instruction is carried out, 10 all of it is.
2. No overediting: 0 the result is another scene, 10 only what had to change has changed.
Answer with success and no overediting, in this order."""
_PERCEPTUAL = """This image was made by a model. Grade it with two whole numbers from 0 to 10, whatever it shows.
1. Naturalness: 0 light, shadows, distances or proportions are wrong, 10 the scene looks natural.
2. Freedom from artifacts: 0 much is distorted, blurred, doubled or has seams, 10 there are none.
Answer with naturalness and freedom from artifacts, in this order."""


class GEdit(Benchmark):
    """SC and PQ are each the least of two grades, O = sqrt(SC PQ); the mean over each type, then over types."""

    title = "GEdit-Bench"
    task = "edit"
    protocol = "gedit/dg-1"
    repository, licence = "github.com/stepfun-ai/Step1X-Edit", "Apache-2.0"
    inputs = "the data set's folder: *.parquet as downloaded, or *.arrow as save_to_disk writes"
    splits = ("en", "cn")

    def read(self, reading: Reading) -> list[Item]:
        items = []
        for path in _shards(reading.data):
            for number, fields in enumerate(_records(path, _COLUMNS), 1):
                row = Row(fields, path, number)
                language, kind, key = (row.name(name) for name in ("instruction_language", "task_type", "key"))
                if reading.splits and language not in reading.splits:
                    continue
                folder = f"fullset/{kind}/{language}"
                items.append(
                    Item(
                        f"{language}/{kind}/{key}", row.text("instruction").strip(), (f"{folder}/{key}.png",),
                        str(path), number, kind, (f"{folder}/{key}_SRCIMG.png",),
                        {"language": language, "both": bool(row.get("Intersection_exist"))},
                    )
                )  # fmt: skip
        return items

    def prepare(self, items: Sequence[Item], reading: Reading, out: Path) -> None:
        """Writes the pictures to edit into the tree, unresized, those that are not there yet."""
        missing: dict[str, dict[int, Path]] = {}
        for item in items:
            if not (path := source_path(item, out)).exists():
                missing.setdefault(item.file, {})[item.row] = path
        total = sum(map(len, missing.values()))
        with progress_bar(total, 0, "source pictures") as bar:
            for file, paths in missing.items():
                for number, fields in enumerate(_records(Path(file), ("input_image",)), 1):
                    if number in paths:
                        _save_source(fields["input_image"], paths[number], f"{file}, row {number}")
                        bar.update()

    def official(self, out: Path, items: Sequence[Item]) -> list[str]:
        return [
            f"python test_gedit_score.py --model_name {out.name} --save_path SCORES --backbone gpt4o",
            f"python calculate_statistics.py --model_name {out.name} --save_path SCORES --backbone gpt4o --language en",
        ]

    def questions(self, item: Item, number: int, out: Path) -> list[Question]:
        made = out / item.files[number]
        semantic = _SEMANTIC.replace("{prompt}", item.prompt)
        return [
            Question("semantic", semantic, (source_path(item, out), made), count=2, high=10),
            Question("perceptual", _PERCEPTUAL, (made,), count=2, high=10),
        ]

    def score(self, item: Item, number: int, answers: Answers) -> ImageScore | None:
        if "semantic" not in answers or "perceptual" not in answers:
            return None
        semantic, perceptual = min(answers["semantic"]), min(answers["perceptual"])
        overall = math.sqrt(semantic * perceptual)
        values = {"O": overall, "SC": semantic, "PQ": perceptual}
        language = item.facts["language"]
        cells = [Cell(f"{language}|{name}|{item.category}", value) for name, value in values.items()]
        if item.facts["both"]:
            cells.append(Cell(f"{language}|both|{item.category}", overall))
        return ImageScore(overall, tuple(cells))

    def measures(self, groups: Sequence[str]) -> list[Measure]:
        found: list[Measure] = []
        languages = sorted({group.split("|")[0] for group in groups}, key=lambda name: (name != "en", name))
        for language in languages:
            for name, suffix in (("O", ""), ("SC", ", SC"), ("PQ", ", PQ"), ("both", ", both languages' subset")):
                found.append(mean_of(f"{language}{suffix}", groups, f"{language}|{name}|", digits=2))
        for language in languages:
            parts = each(groups, f"{language}|O|", digits=2)
            found += [Measure(f"{language}: {part.name}", part.groups, digits=2) for part in parts]
        return found


def _shards(data: Path) -> list[Path]:
    if data.is_file():
        return [data]
    for pattern in ("*.parquet", "data/*.parquet", "*.arrow", "train/*.arrow"):
        if found := sorted(data.glob(pattern)):
            return found
    raise DeepGenError(f"--data {data} holds no *.parquet or *.arrow; give the folder of GEdit-Bench")


def _records(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Selected columns of a Parquet or Arrow file, read in batches of rows."""
    try:
        import pyarrow as arrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise DeepGenError("GEdit-Bench needs pyarrow; run pip install 'deepgen-jax[eval]'") from error
    try:
        if path.suffix == ".parquet":
            source = parquet.ParquetFile(path)
            names, batches = source.schema_arrow.names, source.iter_batches(8, columns=list(columns))
        else:
            reader = ipc.open_stream(arrow.memory_map(str(path)))
            names, batches = reader.schema.names, iter(reader)
        for column in columns:
            if column not in names:
                raise DeepGenError(f"{path}, row 1: there is no column {column!r}; it has {', '.join(names)}")
        for batch in batches:
            yield from batch.select(list(columns)).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise DeepGenError(f"{path} cannot be read ({str(error).splitlines()[0]}); download it again") from error


def _save_source(value: Any, path: Path, where: str) -> None:
    content = value.get("bytes") if isinstance(value, dict) else None
    if not content:
        raise DeepGenError(f"{where}: 'input_image' holds no picture; download the file again")
    image: Image.Image = load_image(io.BytesIO(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        image.save(partial, "PNG")
