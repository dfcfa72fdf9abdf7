"""What `inspect` reports, and the pictures it writes."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from support.make_data import TOKENIZER, edit_samples, model, t2i_samples, write_json

from deepgen_jax.data.data_config import DataConfig, SourceConfig
from deepgen_jax.data.inspect import inspect


def test_report_and_contact_sheet(tmp_path: Path):
    samples = t2i_samples(24, ((96, 96), (160, 96)))
    samples[0] = samples[0]._replace(text="一只小猫坐在窗台上，看着外面的雨。" * 3)
    samples[4] = samples[4]._replace(text="word " * 200)
    write_json(tmp_path / "pairs", samples)
    (tmp_path / "pairs" / "5.img").unlink()
    write_json(tmp_path / "edits", edit_samples(9, references=(1, 2)) + edit_samples(1, size=(80, 96)))
    sources = (
        SourceConfig("pairs", "json", str(tmp_path / "pairs")),
        SourceConfig("edits", "json", str(tmp_path / "edits"), "edit"),
    )
    config = DataConfig(sources, 6, image_size=64, token_multiple=32, cache_dir=str(tmp_path / "cache"))
    sheet = tmp_path / "out" / "sheet.png"
    report = inspect(config, model(max_prompt_tokens=100), TOKENIZER, contact_sheet=sheet, seconds=0.2)
    pairs, edits = report.sources
    assert (pairs.samples, pairs.usable, pairs.bad) == (24, 23, {"missing file": 1})
    assert (edits.samples, edits.usable, edits.filtered) == (10, 9, {"side of at most 80 px": 1})
    assert pairs.share == edits.share == 1.0
    assert sum(bucket.samples for bucket in report.buckets) == 32
    assert report.scarce == 9
    assert report.cut == 1
    assert sum(report.token_lengths.values()) == 32
    assert report.samples_a_second > 0
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        # Buckets: squares and wide pictures, edits with one and with two references.
        assert image.height > 4 * 192
        assert image.width > 4 * 192
    text = "\n".join(report.lines())
    parts = ("pairs: 23 of 24 samples", "bad: 1 missing file, such as", "left out: 1 side", "4 buckets", "a second")
    assert all(part in text for part in parts)
