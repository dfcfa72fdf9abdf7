"""Report on training data before a run: counts, buckets, prompt lengths, samples left out, speed, and pictures."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.buckets import Bucket
from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.data.loader import Loader
from deepgen_jax.data.plan import Plan
from deepgen_jax.data.reader import Batch
from deepgen_jax.data.sources import BadSample, Row, Source, open_source, read_row

#: Micro-batches looked at for prompt lengths and for pictures.
_LOOKED_AT = 64
_PICTURES = 4


@dataclass(frozen=True)
class SourceReport:
    """One source.

    Attributes:
      samples: rows found; usable: those that are read.
      share: of its task's samples that a run draws from it.
      bad: samples that cannot be used, by reason; examples: one of each.
      notes: usable samples that were read in some special way, by note.
      passed_over: names in the source's folders that were not read, by reason.
      filtered: usable samples that the filters leave out, by reason.
    """

    name: str
    task: str
    samples: int
    usable: int
    share: float
    bad: dict[str, int]
    notes: dict[str, int]
    passed_over: dict[str, int]
    examples: dict[str, str]
    filtered: dict[str, int]


@dataclass(frozen=True)
class Report:
    """Result of `inspect`.

    Attributes:
      buckets: all shapes of batches, with their samples.
      scarce: samples in buckets with fewer than a micro-batch, whose batches hold some of them more than once.
      pixel_difference: mean share of pixels in which sizes differ from the exact rule.
      token_lengths: (from, below) -> samples, prompt with image and think tokens, after the cut.
      cut: samples whose prompt is cut.
      batch_lengths: padded length -> micro-batches, of the first few.
      samples_a_second: on this host, or None if not measured.
      unreadable: samples that failed while the speed was measured, by (source, reason).
      contact_sheet: path of the picture.
    """

    sources: list[SourceReport]
    buckets: list[Bucket]
    scarce: int
    pixel_difference: float
    token_lengths: dict[tuple[int, int], int]
    cut: int
    batch_lengths: dict[int, int]
    samples_a_second: float | None
    unreadable: dict[tuple[str, str], int]
    contact_sheet: Path | None

    def to_json(self) -> dict[str, Any]:
        """The report, ready for JSON."""
        return {
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "buckets": [{"name": str(bucket), **bucket._asdict()} for bucket in self.buckets],
            "scarce": self.scarce,
            "pixel_difference": self.pixel_difference,
            "token_lengths": [
                {"from": low, "below": high, "samples": n} for (low, high), n in self.token_lengths.items()
            ],
            "cut": self.cut,
            "batch_lengths": [{"length": length, "batches": n} for length, n in self.batch_lengths.items()],
            "samples_a_second": self.samples_a_second,
            "unreadable": [
                {"source": name, "reason": reason, "samples": n} for (name, reason), n in self.unreadable.items()
            ],
            "contact_sheet": None if self.contact_sheet is None else str(self.contact_sheet),
        }

    def lines(self) -> list[str]:
        """The report as text."""
        out = []
        for source in self.sources:
            usable = f"{source.usable} of {source.samples} samples usable"
            out.append(f"{source.name}: {usable}, {source.share:.1%} of what {source.task} reads")
            out += [f"  bad: {n} {reason}, such as {source.examples[reason]}" for reason, n in source.bad.items()]
            out += [f"  left out: {count} {reason}" for reason, count in source.filtered.items()]
            out += [f"  note: {count} {note}" for note, count in source.notes.items()]
            out += [f"  passed over: {count} {reason}" for reason, count in source.passed_over.items()]
        out.append(f"{len(self.buckets)} buckets; {self.pixel_difference:.2%} of the pixels differ from the size rule")
        most = max(bucket.samples for bucket in self.buckets)
        out += [f"  {bucket!s:<36} {_bar(bucket.samples, most)}" for bucket in self.buckets]
        if self.scarce:
            out.append(f"  {self.scarce} samples are in buckets with less than a micro-batch")
        out.append(f"tokens of a prompt, image and think tokens included ({self.cut} are cut)")
        most = max(self.token_lengths.values())
        out += [f"  {low:>5} to {high - 1:<5} {_bar(n, most)}" for (low, high), n in self.token_lengths.items()]
        lengths = ", ".join(f"{count} of {length}" for length, count in self.batch_lengths.items())
        out.append(f"padded lengths of the first micro-batches: {lengths}")
        if self.samples_a_second is not None:
            out.append(f"{self.samples_a_second:.1f} samples a second")
        out += [f"  unreadable: {count} of {name}: {reason}" for (name, reason), count in self.unreadable.items()]
        if self.contact_sheet is not None:
            out.append(f"contact sheet: {self.contact_sheet}")
        return out


def inspect(
    config: DataConfig,
    model: DeepGenConfig,
    tokenizer: Path,
    *,
    contact_sheet: Path | None = None,
    seconds: float = 5.0,
    weights: str | None = None,
) -> Report:
    """Builds missing indices and reads for some seconds.

    Args:
      config: of the data.
      model: as for `Loader`.
      tokenizer: folder with ``tokenizer.json``.
      contact_sheet: a PNG with samples of every bucket is written here.
      seconds: time for which the speed is measured; 0 to skip.
      weights: as for `Loader`.

    Raises:
      DeepGenError: as `Loader`.
    """
    with Loader(config, model, tokenizer, weights=weights, images=False) as loader:
        plan = loader.plan
        rate = _speed(loader, seconds) if seconds else None
        if contact_sheet is not None:
            from deepgen_jax.data.contact_sheet import write_contact_sheet

            write_contact_sheet(contact_sheet, _pictures(loader))
        lengths = Counter(plan[number].length for number in range(_LOOKED_AT))
        token_lengths, cut = _token_lengths(plan, model)
        return Report(
            sources=_sources(plan),
            buckets=plan.buckets,
            scarce=sum(bucket.samples for bucket in plan.buckets if bucket.samples < config.micro_batch),
            pixel_difference=plan.pixel_difference,
            token_lengths=token_lengths,
            cut=cut,
            batch_lengths=dict(sorted(lengths.items())),
            samples_a_second=rate,
            unreadable=dict(loader.skipped),
            contact_sheet=contact_sheet,
        )


def _sources(plan: Plan) -> list[SourceReport]:
    reports = []
    for number, (source, index) in enumerate(zip(plan.config.sources, plan.indices, strict=True)):
        filtered = dict(plan.filtered[source.name])
        bad = dict(index.meta["counts"])
        usable = len(index) - sum(bad.values()) - sum(filtered.values())
        share = plan.shares[number]
        listed = open_source(source)
        listed.files()
        reports.append(
            SourceReport(
                name=source.name,
                task=source.task,
                samples=len(index),
                usable=usable,
                share=share,
                bad=bad,
                notes=index.meta["notes"],
                passed_over={reason: count for reason, count in listed.passed_over.items() if count},
                examples=index.meta["examples"],
                filtered=filtered,
            )
        )
    return reports


def _speed(loader: Loader, seconds: float) -> float:
    """Samples a second, after prefetched batches are used up."""
    config = loader.plan.config
    for _ in range((config.prefetch + 1) * max(1, config.workers)):
        next(loader)
    samples, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        samples += len(next(loader)["sample_ids"])
    return samples / elapsed


def _pictures(loader: Loader) -> list[tuple[Batch, list[str]]]:
    """The first batch of each bucket that comes soon, with the texts of its first samples."""
    plan = loader.plan
    sources = [open_source(source) for source in plan.config.sources]
    found: dict[object, tuple[Batch, list[str]]] = {}
    loader.set_state({**loader.get_state(), "position": 0})
    for number in range(_LOOKED_AT):
        batch, planned = next(loader), plan[number]
        if planned.bucket not in found:
            texts: list[str] = []
            for source, row, dropped in zip(planned.sources, planned.rows, planned.dropped, strict=True):
                if len(texts) < _PICTURES:
                    # A sample that cannot be read was replaced by the next one in the batch.
                    text = _text(sources[source], plan.indices[source].row(row))
                    texts.append(f"(dropped) {text}" if dropped else text)
            found[planned.bucket] = batch, texts
    return list(found.values())


def _text(source: Source, row: Row) -> str:
    try:
        return read_row(source, row, header_only=True).text
    except BadSample as bad:
        return f"({bad.reason})"


def _token_lengths(plan: Plan, model: DeepGenConfig) -> tuple[dict[tuple[int, int], int], int]:
    step = plan.config.token_multiple
    counts: Counter[int] = Counter()
    cut = 0
    for lengths, image_tokens in plan.usable_lengths():
        cut += int((lengths > model.max_prompt_tokens).sum())
        total = np.minimum(lengths, model.max_prompt_tokens) + image_tokens + model.bridge.num_queries
        steps, numbers = np.unique((total - 1) // step, return_counts=True)
        counts.update(dict(zip(steps.tolist(), numbers.tolist(), strict=True)))
    return {(step * n + 1, step * (n + 1) + 1): counts[n] for n in sorted(counts)}, cut


def _bar(count: int, most: int) -> str:
    return f"{count:>10} {'#' * max(1, round(40 * count / most))}"
