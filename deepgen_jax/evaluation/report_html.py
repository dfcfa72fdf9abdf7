"""A report as one HTML page that needs nothing else: no network, no scripts, images inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from deepgen_jax.data.images import load_image
from deepgen_jax.evaluation.benchmark import Item
from deepgen_jax.evaluation.figures import Figure
from deepgen_jax.evaluation.report import Comparison, RunReport, Section

#: Longer side of images on the page, in pixels, and the quality of their JPEG files.
_SIDE, _QUALITY = 256, 82
_STYLE = Path(__file__).with_name("report.css")
_COLOURS = ("--one", "--two", "--three")
_FOOTER = (
    "Intervals are 95%, by bootstrap over prompts. Published scores come from other runs and judges; each is shown "
    "with its protocol."
)
_WORDS = {"first": "First images", "worst": "Lowest scores", "best": "Highest scores"}


def page(sections: Sequence[Section]) -> str:
    """The page.

    Raises:
      DeepGenError: an image of a run cannot be read.
    """
    models = ", ".join(dict.fromkeys(run.label for section in sections for run in section.runs))
    body = [f"<header><h1>Evaluation report</h1><p class=soft>{_text(models)}</p></header><main>"]
    if len(sections) > 1:
        body += _overview(sections)
    for section in sections:
        body += _section(section)
    body.append(f"</main><footer class=soft>{_FOOTER}</footer>")
    style = _STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, '
        f'initial-scale=1"><title>Evaluation of {_text(models)}</title><style>{style}</style>{"".join(body)}</html>\n'
    )


def _overview(sections: Sequence[Section]) -> Iterator[str]:
    yield "<section><h2>Scores</h2><div class=scroll><table><tr><th>benchmark<th>model<th class=number>score"
    yield "<th class=number>95% interval<th class=number>DeepGen SFT / RL, published<th>judge and protocol</tr>"
    for section in sections:
        for run in section.runs:
            figure = run.main
            yield f"<tr><td><a href='#{section.name}'>{_text(section.title)}</a><td>{_text(run.label)}"
            if figure is None or run.scores is None:
                yield f"<td class=number>–<td class=number>–<td class=number>{_deepgen(section, None)}<td>no scores yet"
            else:
                yield f"<td class=number>{figure.shown}<td class=number>{figure.interval}"
                yield f"<td class=number>{_deepgen(section, figure.name)}<td class=soft>{_text(run.scores.by)}"
    yield "</table></div></section>"


def _section(section: Section) -> Iterator[str]:
    yield f"<section id='{section.name}'><h2>{_text(section.title)}</h2><div class=scores>"
    for i, run in enumerate(section.runs):
        yield f"<div class=score>{_dot(i)}{_text(run.label)}"
        if run.main is None or run.scores is None:
            yield f"<b>–</b><span class=soft>{_text(_unscored(run))}</span></div>"
            continue
        yield f"<b>{run.main.shown}</b><span class=soft>{run.main.interval}, {_counts(run)}<br>"
        yield f"{_text(run.scores.by)}</span></div>"
    yield "</div>"
    for run in section.runs:
        yield from _notes(run)
    for comparison in section.comparisons:
        yield f"<p>{_difference(comparison)}</p>"
    yield from _against_published(section)
    yield from _categories(section)
    yield from _pictures(section)
    yield from _settings(section)
    yield "</section>"


def _against_published(section: Section) -> Iterator[str]:
    """Bars of the main figure: the runs with their intervals among published models."""
    names = section.figures[:1] or [name for row in section.published.rows[:1] for name in row["values"]][:1]
    rows = section.published.of(names[0]) if names else []
    if not rows:
        return
    digits = _digits([row["values"][names[0]] for row in rows])
    entries: list[tuple[float, str]] = [
        (row["values"][names[0]], _published_bar(row, names[0], section.top, digits)) for row in rows
    ]
    for i, run in enumerate(section.runs):
        if run.main is not None:
            entries.append((run.main.value, _figure_bar(run.label, run.main, section.top, i, own=True)))
    entries.sort(key=lambda entry: -entry[0])
    yield f"<h3>Beside published scores: {_text(names[0])}</h3>"
    yield f"<p class=soft>Published: {_text(section.published.protocol)}.</p>"
    yield f"<div class=bars>{''.join(bar for _, bar in entries)}</div>"


def _categories(section: Section) -> Iterator[str]:
    """Bars of the further figures, all runs of a figure together; details that are many are folded."""
    names = section.figures[1:]
    if not names:
        return
    groups = [name for name in names if ", " not in name]
    details = [name for name in names if ", " in name]
    yield f"<h3>By category</h3><div class=bars>{''.join(_figure_bars(section, groups))}</div>"
    if details:
        yield f"<details><summary>{len(details)} finer figures</summary>"
        yield f"<div class=bars>{''.join(_figure_bars(section, details))}</div></details>"


def _figure_bars(section: Section, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        for i, run in enumerate(section.runs):
            for figure in run.scores.figures if run.scores else ():
                if figure.name == name:
                    label = name if len(section.runs) == 1 else f"{name}: {run.label}"
                    yield _figure_bar(label, figure, section.top, i)


def _pictures(section: Section) -> Iterator[str]:
    """Images with prompts: the first run's worst and best, those of the other runs beside them."""
    first, others = section.runs[0], section.runs[1:]
    for kind, images in first.shown().items():
        if not images:
            continue
        yield f"<h3>{_WORDS[kind]}{' of ' + _text(first.label) if others else ''}</h3>"
        wide = " wide" if others or any(item.sources for item, _, _ in images) else ""
        yield f"<div class='grid{wide}'>"
        for item, file, score in images:
            yield _picture(first, others, item, file, score)
        yield "</div>"


def _picture(first: RunReport, others: Sequence[RunReport], item: Item, file: str, score: float | None) -> str:
    parts = []
    for path in (first.folder / source for source in item.sources):
        if path.is_file():
            parts.append(f"<div>{_image(path, 'picture to edit')}<figcaption>source</figcaption></div>")
    for i, run in enumerate([first, *others]):
        if not (run.folder / file).is_file():
            continue
        own = score if i == 0 else run.scores.images.get(file) if run.scores else None
        figure = "" if own is None else f"<b>{own:.2f}</b>"
        label = f"{_dot(i)}{figure}" if others else figure
        parts.append(f"<div>{_image(run.folder / file, item.prompt)}<figcaption>{label}</figcaption></div>")
    about = f"{_text(item.category)} · " if item.category else ""
    prompt = f"<span class=clamp title='{_text(item.prompt)}'>{about}{_text(item.prompt)}</span>"
    return f"<figure><div class=pictures>{''.join(parts)}</div><figcaption>{prompt}</figcaption></figure>"


def _settings(section: Section) -> Iterator[str]:
    yield "<details><summary>Settings, to reproduce</summary>"
    for i, run in enumerate(section.runs):
        values: dict[str, Any] = {"model": run.run["model"], "model fingerprint": run.run["model_fingerprint"]}
        values |= {**run.run["settings"], "prompts": run.run["prompts"], "limited": run.run["limited"]}
        values |= {"data": ", ".join(run.run["data"][:4]), "protocol": run.run["protocol"], "date": run.run["date"]}
        values |= {"deepgen-jax": run.run["deepgen_jax"]}
        rows = "".join(f"<dt>{_text(name)}<dd>{_text(str(value))}" for name, value in values.items() if value != "")
        yield f"<p>{_dot(i)}{_text(run.label)}</p><pre>{_text(run.run['command'])}</pre><dl>{rows}</dl>"
    yield "</details>"


def _notes(run: RunReport) -> Iterator[str]:
    if run.scores is None:
        return
    notes = list(run.scores.notes)
    counted = {"questions without an answer": run.scores.missing, "unreadable replies": run.scores.unreadable}
    for label, counts in counted.items():
        if counts:
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            notes.append(f"{label}: {reasons}; none counts as zero")
    for note in notes:
        yield f"<p class=soft>{_text(run.label)}: {_text(note)}</p>"


def _published_bar(row: Mapping[str, Any], name: str, top: float, digits: int) -> str:
    value = row["values"][name]
    colour = ";--c:var(--deepgen)" if row["model"].startswith("DeepGen") else ""
    fill = f"<div class=track><div class=fill style='width:{_share(value, top)}{colour}'></div></div>"
    return f"<div class=name>{_named(row)}</div>{fill}<div class=value>{value:.{digits}f}</div>"


def _digits(values: Sequence[float]) -> int:
    """Decimals that most of the values have."""
    counts = [len(f"{value:g}".partition(".")[2]) for value in values]
    return sorted(counts)[int(len(counts) * 0.8)] if counts else 2


def _figure_bar(label: str, figure: Figure, top: float, colour: int, own: bool = False) -> str:
    low, high = _percent(figure.low, top), _percent(figure.high, top)
    whisker = f"<div class=whisker style='left:{low:.2f}%;width:{high - low:.2f}%'></div>" if low < high else ""
    fill = f"<div class=fill style='width:{_share(figure.value, top)};--c:var({_colour(colour)})'></div>"
    name = f"<div class='name{' own' if own else ''}'>{_dot(colour) if own else ''}{_text(label)}</div>"
    interval = figure.interval if low < high else "all alike"
    value = f"{figure.shown} <small>{interval}</small>"
    return f"{name}<div class=track>{fill}{whisker}</div><div class=value>{value}</div>"


def _image(path: Path, text: str) -> str:
    image = load_image(path)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    code = base64.b64encode(buffer.getvalue()).decode()
    return f"<img loading=lazy src='data:image/jpeg;base64,{code}' alt='{_text(text)}'>"


def _named(row: Mapping[str, Any]) -> str:
    """A published model with its size and, where it is not that of the others, its protocol."""
    about = f"{row['source']}: {row['protocol']}" if row.get("protocol") else row["params"]
    return f"<span title='{_text(row['source'])}'>{_text(row['model'])}</span> <span class=soft>{_text(about)}</span>"


def _deepgen(section: Section, figure: str | None) -> str:
    """Published values of DeepGen itself."""
    found = []
    for version in ("DeepGen 1.0 (SFT)", "DeepGen 1.0 (RL)"):
        for row in section.published.rows:
            name = figure or next(iter(row["values"]))
            if row["model"] == version and name in row["values"]:
                found.append(f"{row['values'][name]:g}")
    return " / ".join(found) or "–"


def _difference(found: Comparison) -> str:
    return (
        f"{_text(found.second)} less {_text(found.first)}: image scores differ by <b>{found.mean:+.3f}</b> "
        f"<span class=soft>({found.low:+.3f} to {found.high:+.3f}); {found.better} of {found.images} images are "
        f"better, {found.worse} worse</span>"
    )


def _counts(run: RunReport) -> str:
    scores = run.scores
    return "" if scores is None else f"{len(scores.images)} of {scores.wanted} images scored"


def _unscored(run: RunReport) -> str:
    return f"{sum(len(item.files) for item in run.items)} images, no scores yet: deepgen eval score {run.folder}"


def _percent(value: float, top: float) -> float:
    return min(max(value / top, 0.0), 1.0) * 100


def _share(value: float, top: float) -> str:
    return f"{_percent(value, top):.2f}%"


def _dot(index: int) -> str:
    return f"<span class=dot style='--c:var({_colour(index)})'></span>"


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _text(value: str) -> str:
    return html.escape(value, quote=True)
