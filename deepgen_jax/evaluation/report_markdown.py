"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepgen_jax.evaluation.figures import Figure
from deepgen_jax.evaluation.report import RunReport, Section


def markdown(sections: Sequence[Section]) -> str:
    """The whole report: scores, published ones, categories, differences and settings; images are on the page."""
    lines = ["# Evaluation report", ""]
    for section in sections:
        lines += [*_section(section), ""]
    return "\n".join(lines)


def value(figure: Figure | None) -> str:
    """A figure with its interval."""
    if figure is None:
        return "–"
    return f"{figure.shown} ({figure.interval})"


def _section(section: Section) -> Iterator[str]:
    yield f"## {section.title}"
    yield ""
    for run in section.runs:
        by = f"{run.scores.by}" if run.scores else "no scores yet"
        yield f"- **{run.label}**: {value(run.main)}, {_counts(run)}, {by}"
        for note in run.scores.notes if run.scores else ():
            yield f"  - {note}"
    for difference in section.comparisons:
        yield (
            f"- {difference.second} less {difference.first}: image scores differ by {difference.mean:+.3f} "
            f"({difference.low:+.3f} to {difference.high:+.3f}); {difference.better} of {difference.images} images are "
            f"better, {difference.worse} worse"
        )
    names = section.figures
    if names:
        yield ""
        yield _row(["figure", *(run.label for run in section.runs)])
        yield _row(["---"] * (1 + len(section.runs)))
        for name in names:
            yield _row([name, *(value(_figure(run, name)) for run in section.runs)])
    rows = section.published.of(names[0] if names else _first(section))
    if rows:
        yield ""
        yield f"Published ({section.published.protocol}):"
        yield ""
        yield _row(["model", "size", names[0] if names else _first(section), "source"])
        yield _row(["---"] * 4)
        for row in rows:
            shown = row["values"][names[0] if names else _first(section)]
            source = row["source"] + (f", {row['protocol']}" if row.get("protocol") else "")
            yield _row([row["model"], row["params"], f"{shown:g}", source])
    for run in section.runs:
        settings = ", ".join(f"{name} {value}" for name, value in run.run["settings"].items() if value != "")
        yield ""
        yield f"{run.label}: {settings}. `{run.run['command']}`"


def _counts(run: RunReport) -> str:
    if run.scores is None:
        return f"{sum(len(item.files) for item in run.items)} images"
    missing = sum(run.scores.missing.values())
    unanswered = f", {missing} questions without an answer" if missing else ""
    return f"{len(run.scores.images)} of {run.scores.wanted} images scored{unanswered}"


def _figure(run: RunReport, name: str) -> Figure | None:
    return next((figure for figure in run.scores.figures if figure.name == name), None) if run.scores else None


def _first(section: Section) -> str:
    """The published main figure of a benchmark that was not scored yet."""
    return next((name for row in section.published.rows for name in row["values"]), "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
