"""Renders an explanation as a self-contained HTML page without scripts, and as JSON."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from deepgen_jax.evaluation.explain.heat_maps import Trace
from deepgen_jax.evaluation.explain.knockouts import Effect
from deepgen_jax.evaluation.explain.lens import Reading

#: Colour map from the smallest to the largest share.
_COLOURS = np.array([(13, 8, 60), (120, 28, 109), (203, 71, 119), (249, 149, 62), (252, 253, 191)], np.float32)
_KINDS = {
    "vlm layer": "Layers of the language model",
    "think tokens": "Blocks of think tokens",
    "mmdit layer": "Layers of the MMDiT",
}
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #d9603b; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } p { max-width: 46rem; }
.grid { display: flex; flex-wrap: wrap; gap: .6rem; } figure { margin: 0; text-align: center; }
figure img { width: 9rem; height: auto; border-radius: 4px; display: block; } .small img { width: 4.5rem; }
figcaption { font-size: .8rem; max-width: 9rem; overflow-wrap: anywhere; } .small figcaption { max-width: 4.5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td, th { border-bottom: 1px solid var(--line); padding: .15rem .6rem; text-align: left; white-space: pre; }
.bar { display: grid; grid-template-columns: 7rem 1fr 3.5rem; gap: .5rem; align-items: center; font-size: .85rem; }
.bar i { display: block; height: .8rem; background: var(--bar); border-radius: 2px; min-width: 1px; }
code { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Explanation:
    """Explanation of one image.

    Attributes:
      settings: model, prompt, size, steps, seed and the command, in display order.
      words: words of the prompt, one per map.
      trace: the image and its heat maps.
      readings: results of the logit lens; empty if it was not run.
      effects: results of knock-outs; empty if they were not run.
      scores: IoU of heat maps with masks in the procedural world; empty if not requested.
    """

    settings: Mapping[str, Any]
    words: Sequence[str]
    trace: Trace
    readings: Sequence[Reading] = ()
    effects: Sequence[Effect] = ()
    scores: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Everything except pixels, as JSON."""
        maps = [[word, np.round(m, 5).tolist()] for word, m in zip(self.words, self.trace.words, strict=True)]
        values = {
            "settings": dict(self.settings),
            "words": [{"word": word, "map": m} for word, m in maps],
            "think_tokens": [{"token": i, "map": np.round(m, 5).tolist()} for i, m in enumerate(self.trace.think)],
            "logit_lens": [reading._asdict() for reading in self.readings],
            "knock_outs": [{"kind": e.kind, "name": e.name, "effect": round(e.effect, 5)} for e in self.effects],
            "world_scores": dict(self.scores),
        }
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    def to_html(self) -> str:
        """The HTML page."""
        title = f"deepgen explain: {self.settings['prompt']}"
        return "\n".join(
            [
                "<!doctype html>",
                f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<style>{_STYLE}</style></head><body>",
                f"<h1>{html.escape(title)}</h1>",
                *self._body(),
                "</body></html>",
                "",
            ]
        )

    def _body(self) -> Iterator[str]:
        rows = (f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in self.settings.items())
        yield f'<div class="scroll"><table>{"".join(rows)}</table></div>'
        yield f'<div class="grid">{_figure(self.trace.pixels, "the image")}</div>'
        yield "<h2>Where each word acts</h2>"
        yield (
            "<p>Share of each patch among the words of the prompt, from the outputs of the joint attention, averaged "
            "over layers and steps (ConceptAttention). Bright is the word's own maximum, given below it.</p>"
        )
        yield _maps(self.trace.pixels, list(zip(self.words, self.trace.words, strict=True)), "grid")
        if len(self.trace.think):
            yield "<h2>Where each think token acts</h2>"
            named = [(str(i), m) for i, m in enumerate(self.trace.think)]
            yield _maps(self.trace.pixels, named, "grid small")
        if self.readings:
            yield "<h2>Think tokens decoded to words, by layer</h2>"
            yield (
                "<p>Hidden states through the final norm and the output embedding of the language model (logit lens): "
                "the most likely words and the probability of the first.</p>"
            )
            yield self._lens()
        if self.effects:
            yield "<h2>Effect of each component</h2>"
            yield (
                "<p>Change of the final latents without one component, relative to the change between two seeds: 0 "
                "means no change, 1 a change as large as that of a new seed.</p>"
            )
            for kind, heading in _KINDS.items():
                yield from self._bars(kind, heading)
        if self.scores:
            yield "<h2>Accuracy of the heat maps in the procedural world</h2>"
            yield _scores(self.scores)

    def _lens(self) -> str:
        layers = list(dict.fromkeys(reading.layer for reading in self.readings))
        cells = {(reading.token, reading.layer): reading for reading in self.readings}
        head = "".join(f"<th>layer {layer}</th>" for layer in layers)
        rows = []
        for token in dict.fromkeys(reading.token for reading in self.readings):
            found = (cells[token, layer] for layer in layers)
            texts = (f"{' '.join(map(repr, r.words))} {r.probabilities[0]:.0%}" for r in found)
            rows.append(f"<tr><th>{token}</th>{''.join(f'<td>{_text(t)}</td>' for t in texts)}</tr>")
        return f'<div class="scroll"><table><tr><th>token</th>{head}</tr>{"".join(rows)}</table></div>'

    def _bars(self, kind: str, heading: str) -> Iterator[str]:
        chosen = [effect for effect in self.effects if effect.kind == kind]
        if not chosen:
            return
        most = max(effect.effect for effect in chosen) or 1.0
        yield f"<h3>{heading}</h3>"
        for effect in chosen:
            width = 100 * effect.effect / most
            yield (
                f'<div class="bar"><span>{_text(effect.name)}</span><i style="width:{width:.1f}%"></i>'
                f"<span>{effect.effect:.3f}</span></div>"
            )
        figures = "".join(_figure(effect.pixels, f"without {effect.name}") for effect in chosen)
        yield f'<div class="grid small">{figures}</div>'


def _scores(scores: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{_text(row['maps'])}</th><td>{row['iou']:.3f}</td><td>{row['low']:.3f} to {row['high']:.3f}</td></tr>"
        for row in scores["rows"]
    )
    note = f"{scores['things']} things in {scores['scenes']} held-out scenes; noise levels {scores['sigmas']}."
    return (
        f"<p>Intersection over union of each thing's map, thresholded to its area, with its mask. {_text(note)} "
        f"{_text(scores['verdict'])}</p>"
        f"<table><tr><th>maps</th><th>mean IoU</th><th>95% interval</th></tr>{rows}</table>"
    )


def coloured(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Overlays a heat map, float [h, w] of any positive scale, on an image, uint8 [H, W, 3]; uint8 [H, W, 3]."""
    scaled = np.clip(heat / max(float(heat.max()), 1e-12), 0, 1)
    size = pixels.shape[1::-1]
    image = Image.fromarray(np.round(255 * scaled).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    place = np.asarray(image, np.float32) / 255 * (len(_COLOURS) - 1)
    below = np.minimum(place.astype(int), len(_COLOURS) - 2)
    share = (place - below)[..., None]
    colours = _COLOURS[below] * (1 - share) + _COLOURS[below + 1] * share
    grey = pixels.astype(np.float32).mean(axis=-1, keepdims=True)
    return (0.75 * colours + 0.25 * grey).astype(np.uint8)


def _maps(pixels: np.ndarray, named: Sequence[tuple[str, np.ndarray]], style: str) -> str:
    figures = (_figure(coloured(pixels, m), f"{name} ({m.max():.2f})") for name, m in named)
    return f'<div class="{style}">{"".join(figures)}</div>'


def _figure(pixels: np.ndarray, caption: str) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))
