"""``deepgen info``: summary of a model folder or a training run, from its description only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from deepgen_jax.config import DeepGenConfig, SchedulerConfig, to_dict
from deepgen_jax.stores.lineage import read_starting_point
from deepgen_jax.stores.model_folder import Manifest, PartSummary, locate, read_manifest, read_scheduler
from deepgen_jax.stores.run_folder import is_run, last_metrics, read_run, saved_steps

_TITLES = {
    "text": "language model",
    "vision": "vision tower",
    "bridge": "bridge",
    "mmdit": "MMDiT",
    "vae": "VAE",
    "lora": "LoRA adapters",
    "unused": "unused",
}


@dataclass(frozen=True)
class InfoCommand:
    """Shows what a model folder or a training run holds; the weights are not read."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Model folder, folder of a training run, or nano."""
    json: bool = False
    """Print one JSON object instead."""

    def run(self) -> int:
        """Prints; returns the exit status."""
        folder = locate(self.folder)
        if is_run(folder):
            run = run_summary(folder)
            print(json.dumps(run, indent=2) if self.json else "\n".join(run_lines(run)))
            return 0
        manifest, scheduler = read_manifest(folder), read_scheduler(folder)
        if self.json:
            print(json.dumps(model_summary(folder, manifest, scheduler), indent=2))
        else:
            print("\n".join(lines(folder, manifest, scheduler)))
        return 0


def model_summary(folder: Path, manifest: Manifest, scheduler: SchedulerConfig) -> dict[str, Any]:
    """Summary of a model folder, JSON-ready; ``total`` excludes unused parameters."""
    return {
        "folder": str(folder.absolute()),
        "parameters": {part: asdict(summary) for part, summary in manifest.parameters.items()},
        "total": asdict(_total(manifest)),
        "config": to_dict(manifest.config),
        "scheduler": to_dict(scheduler),
        "provenance": manifest.provenance,
    }


def lines(folder: Path, manifest: Manifest, scheduler: SchedulerConfig) -> Iterator[str]:
    """The same for people."""
    yield f"{folder}"
    yield ""
    yield from _table(manifest)
    yield ""
    yield from (f"{title:<15} {text}" for title, text in _architecture(manifest.config))
    yield f"{'LoRA':<15} {_lora(manifest)}"
    if (how := manifest.config.quantization) is not None:
        products = "in 8 bits" if how.products else "in the dtype of the computation"
        yield f"{'quantization':<15} {how.weights} weights, products {products}"
    yield f"{'schedule':<15} {_schedule(scheduler)}"
    yield ""
    yield from _sources(manifest.provenance)


def _total(manifest: Manifest) -> PartSummary:
    used = [summary for part, summary in manifest.parameters.items() if part != "unused"]
    dtypes: Counter[str] = Counter()
    for summary in used:
        dtypes.update(summary.dtypes)
    return PartSummary(sum(s.count for s in used), sum(s.bytes for s in used), dict(dtypes))


def _table(manifest: Manifest) -> Iterator[str]:
    yield f"{'part':<15} {'parameters':>14} {'size':>10}  dtype"
    order = [part for part in (*_TITLES, *manifest.parameters) if part in manifest.parameters]
    parts = {part: manifest.parameters[part] for part in order}
    for part, summary in [*parts.items(), ("total", _total(manifest))]:
        title = _TITLES.get(part, part)
        dtypes = ", ".join(f"{name} ({count:,})" for name, count in sorted(summary.dtypes.items()))
        if len(summary.dtypes) == 1:
            dtypes = next(iter(summary.dtypes))
        note = " (kept for export, not in the total)" if part == "unused" else ""
        yield f"{title:<15} {summary.count:>14,} {_size(summary.bytes):>10}  {dtypes}{note}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _architecture(config: DeepGenConfig) -> Iterator[tuple[str, str]]:
    text, vision, bridge, mmdit, vae = config.text, config.vision, config.bridge, config.mmdit, config.vae
    yield (
        _TITLES["text"],
        f"{text.num_layers} layers, hidden {text.hidden_size}, {text.num_heads} heads ({text.num_kv_heads} KV), "
        f"vocabulary {text.vocab_size:,}, prompts up to {config.max_prompt_tokens} tokens",
    )
    yield _TITLES["vision"], f"{vision.depth} layers, hidden {vision.hidden_size}, {vision.num_heads} heads"
    yield (
        _TITLES["bridge"],
        f"{bridge.num_queries} think tokens, {bridge.num_layers} layers, hidden {bridge.hidden_size}, "
        f"{bridge.num_heads} heads, every {bridge.selection_stride}th hidden state",
    )
    largest = mmdit.pos_embed_max_size * mmdit.patch_size * vae.downscale
    yield (
        _TITLES["mmdit"],
        f"{mmdit.num_layers} layers ({len(mmdit.dual_attention_layers)} with dual attention), "
        f"hidden {mmdit.hidden_size}, {mmdit.num_heads} heads, images up to {largest} pixels a side",
    )
    yield _TITLES["vae"], f"{vae.latent_channels} channels, 1/{vae.downscale} of the size in pixels"


def _lora(manifest: Manifest) -> str:
    if manifest.config.lora is not None:
        return f"kept apart, rank {manifest.config.lora.rank}, alpha {manifest.config.lora.alpha:g}"
    merged = manifest.provenance.get("merged_adapters")
    return f"{merged} adapters merged into the weights" if merged else "none"


def _schedule(scheduler: SchedulerConfig) -> str:
    shift = f"shift {scheduler.shift:g}"
    if scheduler.use_dynamic_shifting:
        shift = f"dynamic shift {scheduler.base_shift:g} to {scheduler.max_shift:g} by image size"
    return f"flow-match Euler, {scheduler.num_train_timesteps} training timesteps, {shift}"


def _sources(provenance: dict[str, Any]) -> Iterator[str]:
    for source in provenance.get("sources", ()):
        where = source.get("path", f"seed {source['seed']}" if "seed" in source else "")
        size = f", {_size(source['bytes'])}" if "bytes" in source else ""
        yield f"{'from':<15} {where} ({source.get('layout', 'unknown layout')}{size})"
    options = {name: value for name, value in provenance.get("options", {}).items() if value not in (None, False)}
    if options:
        yield f"{'options':<15} {', '.join(f'{name} {value}' for name, value in options.items())}"
    yield f"{'written by':<15} deepgen-jax {provenance.get('deepgen_jax', 'unknown')}"


def run_summary(folder: Path) -> dict[str, Any]:
    """Summary of a training run, JSON-ready."""
    description = read_run(folder)
    return {
        "folder": str(folder.absolute()),
        "kind": description["kind"],
        "steps": description["config"]["steps"],
        "checkpoints": saved_steps(folder),
        "origin": read_starting_point(folder).to_json(),
        "last_metrics": last_metrics(folder),
        "chosen": description.get("chosen"),
        "config": description["config"],
    }


def run_lines(summary: dict[str, Any]) -> Iterator[str]:
    """The summary as text."""
    config, origin, saved, last = (summary[name] for name in ("config", "origin", "checkpoints", "last_metrics"))
    yield f"{summary['folder']}"
    yield ""
    yield f"{'training run':<15} {summary['kind']}, {summary['steps']:,} steps, trains {', '.join(config['trains'])}"
    steps = f"step {saved[-1]:,}" if saved else "none yet"
    if saved[:-1]:
        steps += f" (and {', '.join(f'{step:,}' for step in saved[:-1])})"
    yield f"{'checkpoint':<15} {steps}{', with moving average' if saved and config['ema_decay'] else ''}"
    if (chosen := summary["chosen"]) is not None:
        gathered = chosen["gather_frozen"]
        frozen = "" if gathered is None else f", gather_frozen {str(gathered).lower()}"
        yield f"{'devices':<15} {chosen['devices']}, mesh {chosen['mesh']}, remat {chosen['remat']}{frozen}"
    yield f"{'model':<15} {origin['model']}"
    checkpoints: dict[tuple[str, int], list[str]] = {}
    for name, at in origin["inherited"].items():
        checkpoints.setdefault((at["run"], at["step"]), []).append(name)
    for (run, step), names in checkpoints.items():
        yield f"{'continues':<15} {run}, step {step:,} ({', '.join(names)})"
    if last is not None:
        shown = {name: value for name, value in last.items() if name not in ("step", "time") and "/" not in name}
        values = ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if isinstance(value, int | float))
        yield f"{'last metrics':<15} step {last['step']:,}: {values}"
