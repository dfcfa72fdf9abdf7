"""``deepgen report``: scores of benchmark runs beside published ones, on one page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import write_text


@dataclass(frozen=True)
class ReportArguments:
    """Positional arguments; a base class, so that options follow them in the help."""

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR...", help_behavior_hint="")]
    """Folders of runs; two of the same benchmark are shown side by side."""


@dataclass(frozen=True)
class ReportCommand(ReportArguments):
    """Writes one HTML page that needs no network, and the same as JSON and Markdown beside it."""

    out: Annotated[Path, arg(metavar="FILE")] = Path("report.html")
    """The page; the others have its name with .json and .md."""

    def run(self) -> int:
        """Writes; returns the exit status."""
        from deepgen_jax.evaluation.report import collect, to_json
        from deepgen_jax.evaluation.report_html import page
        from deepgen_jax.evaluation.report_markdown import markdown

        if not self.folders:
            raise DeepGenError("give the folder of a run that `deepgen eval` has written")
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise DeepGenError(f"--out {self.out} has the suffix {self.out.suffix!r}; use .html")
        sections = collect(self.folders)
        written = {
            self.out: page(sections),
            self.out.with_suffix(".json"): json.dumps(to_json(sections), indent=1, ensure_ascii=False) + "\n",
            self.out.with_suffix(".md"): markdown(sections),
        }
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeepGenError(f"folder {self.out.parent} cannot be made: {error.strerror or error}") from error
        for path, text in written.items():
            write_text(path, text)
            print(path)
        return 0
