"""Writes model folders."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgen_jax.config import DeepGenConfig, SchedulerConfig, to_dict
from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import require_space
from deepgen_jax.stores.checksums import checksums
from deepgen_jax.stores.model_folder import FORMAT, VERSION

from .lazy_params import Leaf
from .orbax_writer import write_tree
from .progress import progress_bar
from .tensor_files import write_json

#: Files of a tokenizer; the others in a model's folder are not its business.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json",
)  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """Everything of a model folder but its manifest.

    Attributes:
      config: of the model.
      scheduler: its noise schedule.
      tokenizer: folder to copy the tokenizer's files from.
      params, lora: leaves to write; ``lora`` is empty unless adapters are kept apart.
    """

    config: DeepGenConfig
    scheduler: SchedulerConfig
    tokenizer: Path
    params: Sequence[Leaf]
    lora: Sequence[Leaf]

    def summaries(self) -> dict[str, dict[str, Any]]:
        """Part -> number of parameters, bytes and number by dtype."""
        summaries: dict[str, dict[str, Any]] = {}
        leaves: list[tuple[str, Leaf]] = [(leaf.path[0], leaf) for leaf in self.params]
        for part, leaf in [*leaves, *(("lora", leaf) for leaf in self.lora)]:
            summary = summaries.setdefault(part, {"count": 0, "bytes": 0, "dtypes": {}})
            summary["count"] += leaf.size
            summary["bytes"] += leaf.nbytes
            dtypes = summary["dtypes"]
            dtypes[leaf.dtype.name] = dtypes.get(leaf.dtype.name, 0) + leaf.size
        return summaries


def write_arrays(folder: Path, out: Path, contents: Contents, label: str) -> None:
    """Makes ``folder`` and writes all but the manifest, arrays piece by piece.

    Args:
      folder: the new folder.
      out: where it is going to be, for messages.
      contents: what is written.
      label: of the progress bar.

    Raises:
      DeepGenError: the disk is too small, or there is no tokenizer.
    """
    total = sum(leaf.nbytes for leaf in (*contents.params, *contents.lora))
    require_space(out, total)
    folder.mkdir()
    _copy_tokenizer(contents.tokenizer, folder / "tokenizer")
    with progress_bar(total, label) as progress:
        write_tree(folder / "params", contents.params, progress)
        if contents.lora:
            write_tree(folder / "lora", contents.lora, progress)
    write_json(folder / "scheduler_config.json", to_dict(contents.scheduler))


def write_manifest(folder: Path, contents: Contents, provenance: Mapping[str, Any]) -> None:
    """Writes ``config.json``, the last file of a model folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    arrays = [path for path in files if path.relative_to(folder).parts[0] in ("params", "lora")]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "config": to_dict(contents.config),
        "provenance": provenance,
        "parameters": contents.summaries(),
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
        "checksums": checksums(folder, arrays),
    }
    write_json(folder / "config.json", manifest)


def _copy_tokenizer(source: Path, target: Path) -> None:
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    names = {file.name for file in files}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        wanted = "tokenizer.json, or vocab.json and merges.txt"
        raise DeepGenError(f"{source} holds no tokenizer ({wanted}); download it again")
    target.mkdir()
    for file in files:
        shutil.copyfile(file, target / file.name)
